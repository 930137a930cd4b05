// SPDX-License-Identifier: Apache-2.0
#include "lacuna/text_statistics.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "lacuna/error.h"

namespace lacuna {
namespace {
constexpr int64_t kBlocks = 4;  // 10 of 16 blocks of a symmetric product are computed

at::Tensor as_rows(const at::Tensor& rows, int64_t width) {
  if (rows.dim() != 2 || rows.size(1) != width) {
    throw Error("text embeddings of another width than the text encoder reports");
  }
  return rows.detach().to(at::kCPU, at::kDouble);
}
}  // namespace

TextStatistics TextStatistics::zeros(int64_t width) {
  auto zero = [&] { return at::zeros({width, width}, at::kDouble); };
  return {zero(), zero(), zero(), 0};
}

int64_t TextStatistics::width() const { return shift.size(0); }
int64_t TextStatistics::bytes() const { return 3 * shift.numel() * 8; }

void TextStatistics::add(const TextStatistics& other, double scale) {
  edited.add_(other.edited, scale);
  kept.add_(other.kept, scale);
  shift.add_(other.shift, scale);
  rows += other.rows;
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

StatisticsAccumulator::StatisticsAccumulator(int64_t width) : sums_(TextStatistics::zeros(width)) {}

void StatisticsAccumulator::add_pairs(const at::Tensor& from, const at::Tensor& to, double weight) {
  const at::Tensor f = as_rows(from, sums_.width());
  const at::Tensor difference = as_rows(to, sums_.width()) - f;
  const at::Tensor changed = difference.ne(0).any(1);
  const at::Tensor edited_rows = changed.nonzero().squeeze(1);
  const at::Tensor kept_rows = changed.logical_not().nonzero().squeeze(1);
  if (edited_rows.numel() > 0) {
    const at::Tensor f_edited = f.index_select(0, edited_rows);
    add_gram_upper(sums_.edited, f_edited, weight);
    sums_.shift.addmm_(difference.index_select(0, edited_rows).transpose(0, 1), f_edited, 1.0,
                       weight);
  }
  if (kept_rows.numel() > 0) add_gram_upper(sums_.kept, f.index_select(0, kept_rows), weight);
  sums_.rows += f.size(0);
}

void StatisticsAccumulator::add_kept(const at::Tensor& rows, double weight) {
  const at::Tensor f = as_rows(rows, sums_.width());
  add_gram_upper(sums_.kept, f, weight);
  sums_.rows += f.size(0);
}

TextStatistics StatisticsAccumulator::finish() const {
  return {symmetrize_upper(sums_.edited), symmetrize_upper(sums_.kept), sums_.shift.clone(),
          sums_.rows};
}

}  // namespace lacuna
