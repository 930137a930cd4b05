// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/text_statistics.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "lacuna/error.h"

namespace lacuna {
namespace {
// Copies in float64 stay so small that the allocator has them at hand.
constexpr int64_t kRowsAtOnce = 512;
constexpr int64_t kBlocks = 8;  // 36 of 64 blocks of a symmetric product are computed
// Directions that are multiplied in float64, found from a few more random combinations. On CLIP
// embeddings 1.6e-3 of the energy is left after 16 of them, 2e-4 after 64.
constexpr int64_t kDirections = 48;
constexpr int64_t kExtraDirections = 8;
// Share of the energy that may be left to float32.
constexpr double kLeftToFloat32 = 3e-3;

at::Tensor as_rows(const at::Tensor& rows, int64_t width) {
  if (rows.dim() != 2 || rows.size(1) != width) {
    throw Error("text embeddings of another width than the text encoder reports");
  }
  return rows.detach().to(at::kCPU, at::kDouble);
}
}  // namespace

TextStatistics TextStatistics::zeros(int64_t width) {
  auto zero = [&] { return at::zeros({width, width}, at::kDouble); };
  return {zero(), zero(), zero()};
}

int64_t TextStatistics::width() const { return shift.size(0); }

void TextStatistics::add(const TextStatistics& other, double scale) {
  edited.add_(other.edited, scale);
  kept.add_(other.kept, scale);
  shift.add_(other.shift, scale);
}

void add_gram_upper(at::Tensor& upper, const at::Tensor& rows, double weight) {
  const int64_t d = upper.size(0);
  const int64_t step = (d + kBlocks - 1) / kBlocks;
  for (int64_t begin = 0; begin < d; begin += step) {
    const int64_t size = std::min(step, d - begin);
    at::Tensor target = upper.narrow(0, begin, size).narrow(1, begin, d - begin);
    target.addmm_(rows.narrow(1, begin, size).transpose(0, 1), rows.narrow(1, begin, d - begin),
                  1.0, weight);
  }
}

at::Tensor symmetrize_upper(const at::Tensor& upper) {
  return upper.triu() + upper.triu(1).transpose(0, 1);
}

SplitRows::SplitRows(const at::Tensor& all) : rows(all) {
  const int64_t n = rows.size(0);
  const int64_t d = rows.size(1);
  const int64_t k = kDirections + kExtraDirections;
  if (std::min(n, d) <= 4 * k) return;
  at::Generator generator = at::detail::createCPUGenerator(1);
  const at::Tensor mix = at::randn({k, n}, generator, at::TensorOptions(at::kFloat));
  const at::Tensor found = at::matmul(mix, rows.to(at::kFloat)).to(at::kDouble);
  basis = std::get<0>(at::linalg_qr(found.transpose(0, 1)));
  along = at::empty({n, k}, at::kDouble);
  rest = at::empty({n, d}, at::kFloat);
  double energy = 0.0;
  double left = 0.0;
  for (int64_t begin = 0; begin < n; begin += kRowsAtOnce) {
    const int64_t size = std::min(kRowsAtOnce, n - begin);
    at::Tensor block = rows.narrow(0, begin, size).to(at::kDouble, false, /*copy=*/true);
    at::Tensor block_along = along.narrow(0, begin, size);
    energy += std::pow(block.norm().item<double>(), 2);
    at::matmul_out(block_along, block, basis);
    block.addmm_(block_along, basis.transpose(0, 1), 1.0, -1.0);
    left += std::pow(block.norm().item<double>(), 2);
    rest.narrow(0, begin, size).copy_(block);
  }
  split = left <= kLeftToFloat32 * energy;
}

at::Tensor SplitRows::transposed_product(const at::Tensor& other) const {
  if (!split) return at::matmul(rows.to(at::kDouble).transpose(0, 1), other);
  // `other` is parted along the same directions, so that float32 sees small numbers only.
  const at::Tensor other_along = at::matmul(other, basis);
  const at::Tensor other_rest = at::addmm(other, other_along, basis.transpose(0, 1), 1.0, -1.0);
  at::Tensor product = at::matmul(rest.transpose(0, 1), other_rest.to(at::kFloat)).to(at::kDouble);
  product.addmm_(rest_product(other_along), basis.transpose(0, 1));
  return product.addmm_(basis, at::matmul(along.transpose(0, 1), other));
}

at::Tensor SplitRows::rest_product(const at::Tensor& other) const {
  at::Tensor product = at::zeros({rest.size(1), other.size(1)}, at::kDouble);
  for (int64_t begin = 0; begin < rest.size(0); begin += kRowsAtOnce) {
    const int64_t size = std::min(kRowsAtOnce, rest.size(0) - begin);
    product.addmm_(rest.narrow(0, begin, size).to(at::kDouble).transpose(0, 1),
                   other.narrow(0, begin, size));
  }
  return product;
}

GramSum::GramSum(int64_t width) : upper_(at::zeros({width, width}, at::kDouble)) {}

void GramSum::add(const at::Tensor& rows, double weight) {
  const SplitRows parts(rows);
  if (!parts.split) {
    add_gram_upper(upper_, rows.to(at::kDouble), weight);
    return;
  }
  // (along basis^T + rest)^T (along basis^T + rest), parted by precision.
  at::Tensor small = at::zeros(upper_.sizes(), at::kFloat);
  add_gram_upper(small, parts.rest, 1.0);
  upper_.add_(small, weight);
  const at::Tensor mixed =
      at::matmul(parts.basis, at::matmul(parts.along.transpose(0, 1), parts.along))
          .mul_(0.5)
          .add_(parts.rest_product(parts.along));
  if (!half_.defined()) half_ = at::zeros_like(upper_);
  half_.addmm_(mixed, parts.basis.transpose(0, 1), 1.0, weight);
}

at::Tensor GramSum::finish() const {
  at::Tensor sum = symmetrize_upper(upper_);
  if (half_.defined()) sum.add_(half_).add_(half_.transpose(0, 1));
  return sum;
}

StatisticsAccumulator::StatisticsAccumulator(int64_t width)
    : width_(width), edited_(width), kept_(width), shift_(at::zeros({width, width}, at::kDouble)) {}

void StatisticsAccumulator::add_pairs(const at::Tensor& from, const at::Tensor& to, double weight) {
  const at::Tensor f = as_rows(from, width_);
  const at::Tensor difference = as_rows(to, width_) - f;
  const at::Tensor changed = difference.ne(0).any(1);
  const at::Tensor edited_rows = changed.nonzero().squeeze(1);
  const at::Tensor kept_rows = changed.logical_not().nonzero().squeeze(1);
  if (edited_rows.numel() > 0) {
    const at::Tensor f_edited = f.index_select(0, edited_rows);
    edited_.add(f_edited, weight);
    shift_.addmm_(difference.index_select(0, edited_rows).transpose(0, 1), f_edited, 1.0, weight);
  }
  if (kept_rows.numel() > 0) kept_.add(f.index_select(0, kept_rows), weight);
}

void StatisticsAccumulator::add_kept(const at::Tensor& rows, double weight) {
  kept_.add(as_rows(rows, width_), weight);
}

TextStatistics StatisticsAccumulator::finish() const {
  return {edited_.finish(), kept_.finish(), shift_.clone()};
}

}  // namespace lacuna
