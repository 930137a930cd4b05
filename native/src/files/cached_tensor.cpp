// SPDX-License-Identifier: Apache-2.0
#include "lacuna/files/cached_tensor.h"

#include <ATen/ops/isfinite.h>

#include <exception>

#include "lacuna/error.h"
#include "lacuna/files/checksum.h"
#include "lacuna/files/safetensors_file.h"

namespace lacuna {
namespace {
constexpr const char* kTensor = "tensor";
constexpr const char* kChecksum = "checksum";
}  // namespace

std::optional<at::Tensor> load_cached(const std::string& path, std::string_view format,
                                      at::ScalarType type, at::IntArrayRef sizes) {
  try {
    const SafetensorsFile file = load_safetensors(path);
    const at::Tensor& tensor = file.tensors.at(kTensor);
    if (file.metadata.at("format") == format && file.metadata.at(kChecksum) == checksum_of(file) &&
        tensor.scalar_type() == type && tensor.sizes() == sizes &&
        at::isfinite(tensor).all().item<bool>()) {
      return tensor;
    }
  } catch (const std::exception&) {
    // Whatever is wrong with it, it is computed again and replaced.
  }
  return std::nullopt;
}

void save_cached(const at::Tensor& tensor, const std::string& path, std::string_view format) {
  SafetensorsFile file{{{kTensor, tensor.to(at::kCPU).contiguous()}},
                       {{"format", std::string(format)}}};
  file.metadata[kChecksum] = checksum_of(file);
  try {
    save_safetensors(file, path);
  } catch (const Error&) {
  }
}

}  // namespace lacuna
