// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

namespace lacuna {

// PNG out, PNG or JPEG in, by stb_image.

// image: [H, W, 3] float in 0..1 (clamped). `text` becomes tEXt chunks, e.g. "prompt" with the
// workflow, which ComfyUI reads back when the picture is dropped on its page. Throws Error.
void save_png(const at::Tensor& image, const std::string& path,
              const std::map<std::string, std::string>& text = {});

// [H, W, 3] float32 in 0..1. Throws Error for damaged files and for more than 64 megapixels.
at::Tensor load_image(const std::string& path);

}  // namespace lacuna
