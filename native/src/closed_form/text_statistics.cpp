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
#include <utility>

#include "lacuna/error.h"

namespace lacuna {
namespace {
// Copies in float64 stay so small that the caches hold them.
constexpr int64_t kRowsAtOnce = 512;
constexpr int64_t kRowsInFloat32 = 2048;  // summed before they go to the float64 sum
constexpr int64_t kBlocks = 8;            // 36 of 64 blocks of a symmetric product are computed
// Directions that are multiplied in float64. On CLIP embeddings 1.6e-3 of the energy is left after
// 16 of them, 2e-4 after 64.
constexpr int64_t kLeastDirections = 48;
constexpr int64_t kMostDirections = 96;
// Share of the energy that may be left to float32.
constexpr double kLeftToFloat32 = 3e-3;

double squared_norm(const at::Tensor& rows) { return std::pow(rows.norm().item<double>(), 2); }

// Wide encoders are several encoders side by side.
int64_t directions(int64_t width) {
  return std::clamp(width / 16, kLeastDirections, kMostDirections);
}

// Not worth parting.
int64_t few_rows(int64_t width) { return 4 * directions(width); }

// [directions(d), d] float64, orthonormal; rows: [n, d] float32.
at::Tensor leading_directions(const at::Tensor& rows) {
  at::Generator generator = at::detail::createCPUGenerator(1);
  const at::Tensor mix =
      at::randn({directions(rows.size(1)), rows.size(0)}, generator, at::TensorOptions(at::kFloat));
  const at::Tensor first = at::matmul(mix, rows);
  const at::Tensor found = at::matmul(at::matmul(first, rows.transpose(0, 1)), rows);
  return std::get<0>(at::linalg_qr(found.to(at::kDouble).transpose(0, 1)))
      .transpose(0, 1)
      .contiguous();
}

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

at::Tensor transposed_product(const at::Tensor& rows, const at::Tensor& other) {
  const int64_t n = rows.size(0);
  const int64_t d = rows.size(1);
  if (std::min(n, d) <= few_rows(d)) return at::matmul(rows.to(at::kDouble).transpose(0, 1), other);
  const at::Tensor basis = leading_directions(rows.to(at::kFloat));
  // rows = along basis + rest. `other` is parted along the same directions, so that float32 sees
  // small numbers only.
  const at::Tensor other_along = at::matmul(other, basis.transpose(0, 1));
  at::Tensor other_rest = at::addmm(other, other_along, basis, 1.0, -1.0);
  const at::Tensor along = at::empty({n, basis.size(0)}, at::kDouble);
  const at::Tensor rest = at::empty({n, d}, at::kFloat);
  at::Tensor rest_along = at::zeros({basis.size(0), d}, at::kDouble);  // other_along^T rest
  double energy = 0.0;
  double left = 0.0;
  for (int64_t begin = 0; begin < n; begin += kRowsAtOnce) {
    const int64_t size = std::min(kRowsAtOnce, n - begin);
    at::Tensor block = rows.narrow(0, begin, size).to(at::kDouble, false, /*copy=*/true);
    at::Tensor block_along = along.narrow(0, begin, size);
    energy += squared_norm(block);
    at::matmul_out(block_along, block, basis.transpose(0, 1));
    block.addmm_(block_along, basis, 1.0, -1.0);
    left += squared_norm(block);
    rest_along.addmm_(other_along.narrow(0, begin, size).transpose(0, 1), block);
    rest.narrow(0, begin, size).copy_(block);
  }
  if (left > kLeftToFloat32 * energy) {
    return at::matmul(rows.to(at::kDouble).transpose(0, 1), other);
  }
  at::Tensor product = at::matmul(rest.transpose(0, 1), other_rest.to(at::kFloat)).to(at::kDouble);
  product.addmm_(rest_along.transpose(0, 1), basis);
  return product.addmm_(basis.transpose(0, 1), at::matmul(along.transpose(0, 1), other));
}

GramSum::GramSum(int64_t width)
    : held_(at::empty({kRowsAtOnce, width}, at::kDouble)),
      upper_(at::zeros({width, width}, at::kDouble)) {}

void GramSum::add(const at::Tensor& rows, double weight) {
  for (int64_t begin = 0; begin < rows.size(0);) {
    const int64_t size = std::min(kRowsAtOnce - held_rows_, rows.size(0) - begin);
    at::Tensor place = held_.narrow(0, held_rows_, size).copy_(rows.narrow(0, begin, size));
    if (weight != 1.0) place.mul_(std::sqrt(weight));
    begin += size;
    held_rows_ += size;
    if (held_rows_ == kRowsAtOnce) fold();
  }
}

void GramSum::fold() {
  at::Tensor block = held_.narrow(0, 0, held_rows_);
  if (!fold_parts(block)) add_gram_upper(upper_, block, 1.0);
  held_rows_ = 0;
}

bool GramSum::fold_parts(at::Tensor& block) {
  const bool few = std::min(block.size(0), block.size(1)) <= few_rows(block.size(1));
  if (!basis_.defined() && few) return false;
  if (!single_.defined()) single_ = at::empty(held_.sizes(), at::kFloat);
  at::Tensor single = single_.narrow(0, 0, block.size(0)).copy_(block);
  for (bool known = basis_.defined();; known = false) {
    if (!known) {
      basis_ = leading_directions(single);
      inner_ = at::zeros({basis_.size(0), basis_.size(0)}, at::kDouble);
      cross_ = at::zeros_like(basis_);
    }
    // Rounding of `along` is made up for by the rest, which takes the block's place.
    const at::Tensor along =
        at::matmul(single, basis_.to(at::kFloat).transpose(0, 1)).to(at::kDouble);
    block.addmm_(along, basis_, 1.0, -1.0);
    single.copy_(block);
    const double left = squared_norm(single);
    if (left <= kLeftToFloat32 * (left + squared_norm(along))) {
      inner_.addmm_(along.transpose(0, 1), along);
      cross_.addmm_(along.transpose(0, 1), block);
      if (!rest_upper_.defined()) rest_upper_ = at::zeros(upper_.sizes(), at::kFloat);
      add_gram_upper(rest_upper_, single, 1.0);
      rest_rows_ += block.size(0);
      if (rest_rows_ >= kRowsInFloat32) fold_rest();
      return true;
    }
    block.addmm_(along, basis_);
    if (known) expand();
    basis_ = at::Tensor();
    if (!known || few) return false;
    single.copy_(block);
  }
}

void GramSum::fold_rest() {
  if (rest_rows_ == 0) return;
  upper_.add_(rest_upper_);
  rest_upper_.zero_();
  rest_rows_ = 0;
}

// (along basis + rest)^T (along basis + rest) without rest^T rest.
void GramSum::expand() {
  if (!half_.defined()) half_ = at::zeros_like(upper_);
  half_.addmm_(basis_.transpose(0, 1), at::addmm(cross_, inner_, basis_, 1.0, 0.5));
  basis_ = at::Tensor();
}

at::Tensor GramSum::finish() {
  fold();
  fold_rest();
  held_ = single_ = rest_upper_ = at::Tensor();
  if (basis_.defined()) expand();
  at::Tensor sum = symmetrize_upper(std::exchange(upper_, at::Tensor()));
  if (half_.defined()) sum.add_(half_ + half_.transpose(0, 1));
  half_ = at::Tensor();
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

TextStatistics StatisticsAccumulator::finish() {
  return {edited_.finish(), kept_.finish(), shift_};
}

}  // namespace lacuna
