// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

namespace lacuna {

class OutputFile;

// image: [H, W, 3] float in 0..1 (clamped). `text` becomes tEXt chunks, e.g. "prompt" with the
// workflow, which ComfyUI reads back when the picture is dropped on its page. Throws Error.
void save_png(const at::Tensor& image, const std::string& path,
              const std::map<std::string, std::string>& text = {});
// The same without the commit, e.g. under a number that is not known yet.
void write_png(const at::Tensor& image, OutputFile& out,
               const std::map<std::string, std::string>& text = {});

}  // namespace lacuna
