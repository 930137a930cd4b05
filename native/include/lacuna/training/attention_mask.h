// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lacuna {

// Where in a picture a concept is: 1 inside, 0 outside. Found from the model's own cross-attention
// while it draws the picture, so that no segmentation model is needed.

// Rows and columns of an attention map of `pixels` queries in a model that halves the latent
// (rounding up) from level to level. Throws Error when no level has that many.
struct MapSize {
  int64_t height = 0;
  int64_t width = 0;
};
MapSize map_size(int64_t pixels, int64_t latent_height, int64_t latent_width);

// mask: [H, W]. Row i of the result is row floor(i H / height) of the mask, columns likewise.
at::Tensor resize_nearest(const at::Tensor& mask, int64_t height, int64_t width);

// The threshold that splits values in 0..1 into two groups with the largest variance between them.
double otsu_threshold(const at::Tensor& values);

// map: [h, w], how much each pixel attends to the concept. [h, w] float32 CPU of zeros and ones.
// All ones when the map does not single out a region: constant, or one that covers less than 2 % or
// more than 95 % of the picture.
at::Tensor mask_from_map(const at::Tensor& map);

}  // namespace lacuna
