// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <string>
#include <vector>

#include "lacuna/host.h"

namespace lacuna::testing {

// A vocabulary to tell concepts from: wordaa, wordab, ...
inline std::vector<std::string> vocabulary(int count) {
  std::vector<std::string> words;
  for (int i = 0; i < count; ++i) {
    words.push_back(std::string("word") + static_cast<char>('a' + i / 26) +
                    static_cast<char>('a' + i % 26));
  }
  return words;
}

// What the model draws of a prompt with the usual settings, from an empty latent.
inline at::Tensor drawn(Denoiser& model, TextEncoder& clip, const std::string& prompt) {
  SamplingRequest request;
  request.positive = clip.encode({prompt});
  request.negative = clip.encode({""});
  request.latent = at::zeros({1, 4, 4, 4});
  return model.sample(request, [](int64_t, int64_t) {});
}

}  // namespace lacuna::testing
