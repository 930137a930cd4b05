// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace lacuna {

// A CLIP vision model: pictures that mean the same have embeddings of the same direction.
class ImageEncoder {
 public:
  virtual ~ImageEncoder() = default;
  // images: [n, H, W, 3] in 0..1. [n, d], projected; comparable with the pooled embeddings of a
  // text encoder that was trained with it.
  virtual at::Tensor embed(const at::Tensor& images) = 0;
};

}  // namespace lacuna
