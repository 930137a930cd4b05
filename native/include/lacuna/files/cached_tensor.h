// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <optional>
#include <string>
#include <string_view>

namespace lacuna {

// Tensors that cost minutes to compute, kept in a file. Such a file never decides a result and
// never stands in the way: what cannot be trusted is as good as absent.

// Nothing when the file is absent, damaged (it has a checksum), of another format, type or shape,
// or not finite.
std::optional<at::Tensor> load_cached(const std::string& path, std::string_view format,
                                      at::ScalarType type, at::IntArrayRef sizes);

// The same with several tensors of any type and shape, by name.
using CachedTensors = std::map<std::string, at::Tensor>;
std::optional<CachedTensors> load_cached_tensors(const std::string& path, std::string_view format);

// A file that cannot be written costs time later and is no error.
void save_cached(const at::Tensor& tensor, const std::string& path, std::string_view format);
void save_cached_tensors(const CachedTensors& tensors, const std::string& path,
                         std::string_view format);

}  // namespace lacuna
