// SPDX-License-Identifier: Apache-2.0
#include "lacuna/training/attention_mask.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones.h>

#include <string>

#include "lacuna/error.h"

namespace lacuna {
namespace {
constexpr int64_t kBins = 256;
constexpr double kSmallestArea = 0.02;
constexpr double kLargestArea = 0.95;

at::Tensor source_index(int64_t from, int64_t to) {
  return at::arange(to, at::kLong).mul(from).floor_divide(to);
}
}  // namespace

MapSize map_size(int64_t pixels, int64_t latent_height, int64_t latent_width) {
  MapSize size{latent_height, latent_width};
  while (size.height * size.width > pixels && size.height * size.width > 1) {
    size = {(size.height + 1) / 2, (size.width + 1) / 2};
  }
  if (size.height * size.width != pixels) {
    throw Error("cannot tell the shape of an attention map of " + std::to_string(pixels) +
                " pixels for a latent of " + std::to_string(latent_width) + " x " +
                std::to_string(latent_height) + "; use a width and height that divide by 64");
  }
  return size;
}

at::Tensor resize_nearest(const at::Tensor& mask, int64_t height, int64_t width) {
  const at::Tensor rows = source_index(mask.size(0), height).to(mask.device());
  const at::Tensor columns = source_index(mask.size(1), width).to(mask.device());
  return mask.index_select(0, rows).index_select(1, columns);
}

double otsu_threshold(const at::Tensor& values) {
  const at::Tensor histogram =
      at::histc(values.to(at::kCPU, at::kFloat), kBins, 0.0, 1.0).to(at::kDouble);
  const double* counts = histogram.data_ptr<double>();
  double total = 0.0;
  double moment = 0.0;
  for (int64_t bin = 0; bin < kBins; ++bin) {
    total += counts[bin];
    moment += counts[bin] * static_cast<double>(bin);
  }
  double below = 0.0;
  double below_moment = 0.0;
  double best = -1.0;
  int64_t first = 0;
  int64_t last = 0;
  for (int64_t bin = 0; bin + 1 < kBins; ++bin) {
    below += counts[bin];
    below_moment += counts[bin] * static_cast<double>(bin);
    const double above = total - below;
    if (below == 0.0 || above == 0.0) continue;
    const double difference = below_moment / below - (moment - below_moment) / above;
    const double between = below * above * difference * difference;
    if (between > best) {
      best = between;
      first = bin;
    }
    if (between == best) last = bin;  // an empty gap: take its middle
  }
  return (0.5 * static_cast<double>(first + last) + 1.0) / static_cast<double>(kBins);
}

at::Tensor mask_from_map(const at::Tensor& map) {
  const at::Tensor values = map.detach().to(at::kCPU, at::kFloat);
  const at::Tensor everything = at::ones(values.sizes(), values.options());
  if (!at::isfinite(values).all().item<bool>()) return everything;
  const at::Tensor low = values.min();
  const at::Tensor range = values.max() - low;
  if (range.item<float>() <= 0.0f) return everything;
  const at::Tensor scaled = (values - low) / range;
  at::Tensor mask = scaled.gt(otsu_threshold(scaled)).to(at::kFloat);
  const double area = mask.mean().item<double>();
  return area < kSmallestArea || area > kLargestArea ? everything : mask;
}

}  // namespace lacuna
