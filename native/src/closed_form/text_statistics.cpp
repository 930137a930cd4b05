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
#include <functional>
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
constexpr int64_t kMostDirections = 112;
// Share of the energy that may be left to float32.
constexpr double kLeftToFloat32 = 3e-3;

double squared_norm(const at::Tensor& rows) { return std::pow(rows.norm().item<double>(), 2); }

// Wide encoders are several encoders side by side.
int64_t directions(int64_t width) {
  return std::clamp(width / 16, kLeastDirections, kMostDirections);
}

// Not worth parting.
int64_t few_rows(int64_t width) { return 4 * directions(width); }

int64_t block_step(int64_t width) { return (width + kBlocks - 1) / kBlocks; }

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

void check_embeddings(const at::Tensor& embeddings) {
  if (std::isfinite(embeddings.sum(at::kDouble).item<double>())) return;
  throw Error(
      "the text encoder returns NaN or infinity; load an undamaged checkpoint, or another text "
      "encoder");
}

void add_gram_upper(at::Tensor& upper, const at::Tensor& rows, double weight) {
  add_product_upper(upper, rows, rows, weight);
}

void add_product_upper(at::Tensor& upper, const at::Tensor& rows, const at::Tensor& other,
                       double weight) {
  const int64_t d = upper.size(0);
  const int64_t step = block_step(d);
  for (int64_t begin = 0; begin < d; begin += step) {
    const int64_t size = std::min(step, d - begin);
    at::Tensor target = upper.narrow(0, begin, size).narrow(1, begin, d - begin);
    target.addmm_(rows.narrow(1, begin, size).transpose(0, 1), other.narrow(1, begin, d - begin),
                  1.0, weight);
  }
}

void mirror_upper(at::Tensor& upper) {
  const int64_t d = upper.size(0);
  const int64_t step = block_step(d);
  for (int64_t begin = 0; begin < d; begin += step) {
    const int64_t size = std::min(step, d - begin);
    at::Tensor block = upper.narrow(0, begin, size).narrow(1, begin, size);
    block.copy_(block.triu() + block.triu(1).transpose(0, 1));
    const int64_t end = begin + size;
    upper.narrow(0, end, d - end)
        .narrow(1, begin, size)
        .copy_(upper.narrow(0, begin, size).narrow(1, end, d - end).transpose(0, 1));
  }
}

void add_transposed_product(at::Tensor& sum, const at::Tensor& rows, const at::Tensor& other) {
  const int64_t n = rows.size(0);
  const int64_t d = rows.size(1);
  const auto in_float64 = [&] { sum.addmm_(rows.to(at::kDouble).transpose(0, 1), other); };
  if (std::min(n, d) <= few_rows(d)) return in_float64();
  const at::Tensor basis = leading_directions(rows.to(at::kFloat));
  const auto each_block = [&](const std::function<void(int64_t, int64_t)>& take) {
    for (int64_t begin = 0; begin < n; begin += kRowsAtOnce) {
      take(begin, std::min(kRowsAtOnce, n - begin));
    }
  };
  // rows = along basis + rest. `other` is parted along the same directions, so that float32 sees
  // small numbers only.
  const at::Tensor along = at::empty({n, basis.size(0)}, at::kDouble);
  double energy = 0.0;
  each_block([&](int64_t begin, int64_t size) {
    const at::Tensor block = rows.narrow(0, begin, size).to(at::kDouble);
    energy += squared_norm(block);
    at::Tensor part = along.narrow(0, begin, size);
    at::matmul_out(part, block, basis.transpose(0, 1));
  });
  if (energy - squared_norm(along) > kLeftToFloat32 * energy) return in_float64();
  const at::Tensor other_along = at::matmul(other, basis.transpose(0, 1));
  at::Tensor product = at::zeros({d, d}, at::kFloat);                  // rest^T rest
  at::Tensor rest_along = at::zeros({basis.size(0), d}, at::kDouble);  // other_along^T rest
  each_block([&](int64_t begin, int64_t size) {
    const auto rest_of = [&](const at::Tensor& all, const at::Tensor& directions) {
      return all.narrow(0, begin, size)
          .to(at::kDouble, false, /*copy=*/true)
          .addmm_(directions.narrow(0, begin, size), basis, 1.0, -1.0);
    };
    const at::Tensor rest = rest_of(rows, along);
    rest_along.addmm_(other_along.narrow(0, begin, size).transpose(0, 1), rest);
    product.addmm_(rest.to(at::kFloat).transpose(0, 1), rest_of(other, other_along).to(at::kFloat));
  });
  sum.add_(product);
  sum.addmm_(rest_along.transpose(0, 1), basis);
  sum.addmm_(basis.transpose(0, 1), at::matmul(along.transpose(0, 1), other));
}

GramSum::GramSum(int64_t width)
    : block_(at::empty({kRowsAtOnce, width}, at::kDouble)),
      upper_(at::zeros({width, width}, at::kDouble)) {}

void GramSum::add(const at::Tensor& rows, double weight) {
  if (held_rows_ > 0 && (weight != held_weight_ || rows.dtype() != held_.dtype())) fold_held();
  for (int64_t begin = 0; begin < rows.size(0);) {
    const int64_t size = std::min(kRowsAtOnce - held_rows_, rows.size(0) - begin);
    const at::Tensor part = rows.narrow(0, begin, size);
    begin += size;
    if (size == kRowsAtOnce) {
      fold(part, weight);
      continue;
    }
    if (!held_.defined() || held_.dtype() != rows.dtype()) {
      held_ = at::empty(block_.sizes(), rows.options());
    }
    held_.narrow(0, held_rows_, size).copy_(part);
    held_rows_ += size;
    held_weight_ = weight;
    if (held_rows_ == kRowsAtOnce) fold_held();
  }
}

void GramSum::fold_held() {
  if (held_rows_ > 0) fold(held_.narrow(0, 0, held_rows_), held_weight_);
  held_rows_ = 0;
}

void GramSum::fold(const at::Tensor& rows, double weight) {
  at::Tensor block = block_.narrow(0, 0, rows.size(0)).copy_(rows);
  if (!fold_parts(rows, block, weight)) add_gram_upper(upper_, block, weight);
}

bool GramSum::fold_parts(const at::Tensor& rows, at::Tensor& block, double weight) {
  const bool few = std::min(block.size(0), block.size(1)) <= few_rows(block.size(1));
  if (!basis_.defined() && few) return false;
  if (!single_.defined()) single_ = at::empty(block_.sizes(), at::kFloat);
  at::Tensor rest = single_.narrow(0, 0, block.size(0));
  for (bool known = basis_.defined();; known = false) {
    const at::Tensor single = rows.to(at::kFloat);
    if (!known) {
      basis_ = leading_directions(single);
      inner_ = at::zeros({basis_.size(0), basis_.size(0)}, at::kDouble);
      cross_ = at::zeros_like(basis_);
    }
    // Rounding of `along` is made up for by the rest, which takes the block's place.
    const at::Tensor along =
        at::matmul(single, basis_.to(at::kFloat).transpose(0, 1)).to(at::kDouble);
    block.addmm_(along, basis_, 1.0, -1.0);
    rest.copy_(block);
    const double left = squared_norm(rest);
    if (left <= kLeftToFloat32 * (left + squared_norm(along))) {
      inner_.addmm_(along.transpose(0, 1), along, 1.0, weight);
      cross_.addmm_(along.transpose(0, 1), block, 1.0, weight);
      if (!rest_upper_.defined()) rest_upper_ = at::zeros(upper_.sizes(), at::kFloat);
      add_gram_upper(rest_upper_, rest, weight);
      rest_rows_ += block.size(0);
      if (rest_rows_ >= kRowsInFloat32) fold_rest();
      return true;
    }
    block.copy_(rows);
    if (known) expand();
    basis_ = at::Tensor();
    if (!known || few) return false;
  }
}

void GramSum::fold_rest() {
  if (rest_rows_ == 0) return;
  const int64_t d = upper_.size(0);
  const int64_t step = block_step(d);
  for (int64_t begin = 0; begin < d; begin += step) {
    const int64_t size = std::min(step, d - begin);
    const auto part = [&](const at::Tensor& of) {
      return of.narrow(0, begin, size).narrow(1, begin, d - begin);
    };
    part(upper_).add_(part(rest_upper_));
  }
  rest_upper_.zero_();
  rest_rows_ = 0;
}

// (along basis + rest)^T (along basis + rest) without rest^T rest, as half + half^T.
void GramSum::expand() {
  const at::Tensor half = at::addmm(cross_, inner_, basis_, 1.0, 0.5);  // basis^T half
  add_product_upper(upper_, basis_, half, 1.0);
  add_product_upper(upper_, half, basis_, 1.0);
  basis_ = at::Tensor();
}

at::Tensor GramSum::finish() {
  fold_held();
  fold_rest();
  held_ = block_ = single_ = rest_upper_ = at::Tensor();
  if (basis_.defined()) expand();
  mirror_upper(upper_);
  return std::exchange(upper_, at::Tensor());
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
