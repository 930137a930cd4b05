// SPDX-License-Identifier: Apache-2.0
#include "lacuna/files/cached_tensor.h"

#include <ATen/ops/isfinite.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "lacuna/error.h"
#include "lacuna/files/checksum.h"
#include "lacuna/files/safetensors_file.h"

namespace lacuna {
namespace {
constexpr const char* kTensor = "tensor";
constexpr const char* kChecksum = "checksum";
}  // namespace

std::optional<CachedTensors> load_cached_tensors(const std::string& path, std::string_view format) {
  try {
    SafetensorsFile file = load_safetensors(path);
    const auto finite = [](const auto& entry) {
      return !entry.second.is_floating_point() ||
             at::isfinite(entry.second).all().template item<bool>();
    };
    if (file.metadata.at("format") == format && file.metadata.at(kChecksum) == checksum_of(file) &&
        std::all_of(file.tensors.begin(), file.tensors.end(), finite)) {
      return std::move(file.tensors);
    }
  } catch (const std::exception&) {
    // Whatever is wrong with it, it is computed again and replaced.
  }
  return std::nullopt;
}

std::optional<at::Tensor> load_cached(const std::string& path, std::string_view format,
                                      at::ScalarType type, at::IntArrayRef sizes) {
  const std::optional<CachedTensors> known = load_cached_tensors(path, format);
  if (!known || !known->contains(kTensor)) return std::nullopt;
  const at::Tensor& tensor = known->at(kTensor);
  if (tensor.scalar_type() != type || tensor.sizes() != sizes) return std::nullopt;
  return tensor;
}

void save_cached_tensors(const CachedTensors& tensors, const std::string& path,
                         std::string_view format) {
  SafetensorsFile file{{}, {{"format", std::string(format)}}};
  for (const auto& [name, tensor] : tensors) file.tensors[name] = tensor.to(at::kCPU).contiguous();
  file.metadata[kChecksum] = checksum_of(file);
  try {
    save_safetensors(file, path);
  } catch (const Error&) {
  }
}

void save_cached(const at::Tensor& tensor, const std::string& path, std::string_view format) {
  save_cached_tensors({{kTensor, tensor}}, path, format);
}

}  // namespace lacuna
