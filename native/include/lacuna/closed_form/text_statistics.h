// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lacuna {

// The sufficient statistics of the closed forms: d x d, free of model weights, additive over
// prompts and concepts (MACE Eq. 2 rewritten in delta form). Always float64 on the CPU.
//
// f: embedding the model reads now, g: embedding it should read instead, both columns.
struct TextStatistics {
  at::Tensor edited;  // sum f f^T over rows with g != f, [d, d], symmetric
  at::Tensor kept;    // sum f f^T over rows with g == f (context before the phrase, preserved text)
  at::Tensor shift;   // sum (g - f) f^T = C - A, [d, d]

  static TextStatistics zeros(int64_t width);
  int64_t width() const;
  // this += scale * other
  void add(const TextStatistics& other, double scale = 1.0);
};

// Rows as along basis^T + rest. along and basis are float64 and hold nearly all of the energy; what
// is left is so small that float32 products of it are exact enough.
//
// Text embeddings hold nearly all of their energy in a few dozen directions, and a Gram matrix
// built in float32 alone is wrong by 1e-7 of that energy: too much for the solve. So those
// directions are found first (randomised range finder, Halko et al. 2011, fixed seed) and
// multiplied in float64; what is left of the rows is a thousandth of the energy, and float32
// products of it, of which only the upper triangle is computed, are exact enough. Rows without such
// directions stay float64 throughout.
struct SplitRows {
  // rows: [n, d], float32 or float64 on the CPU
  explicit SplitRows(const at::Tensor& rows);
  // rows^T other, [d, d] float64; other: [n, d] float64, rows of the same kind
  at::Tensor transposed_product(const at::Tensor& other) const;

  // rest^T other, [d, m] float64; other: [n, m] float64. Only if split.
  at::Tensor rest_product(const at::Tensor& other) const;

  bool split = false;
  at::Tensor rows;   // [n, d]: as given
  at::Tensor basis;  // [d, k], only if split
  at::Tensor along;  // [n, k], only if split
  at::Tensor rest;   // [n, d] float32, only if split
};

// Sum of weight f f^T over rows, as accurate as float64 products for half their cost.
class GramSum {
 public:
  explicit GramSum(int64_t width);
  // rows: [n, d], float32 or float64 on the CPU
  void add(const at::Tensor& rows, double weight = 1.0);
  // [d, d] float64, symmetric
  at::Tensor finish() const;

 private:
  at::Tensor upper_;  // [d, d]: only the upper triangle counts
  at::Tensor half_;   // [d, d] or undefined: half_ + half_^T belongs to the sum
};

// Statistics of pairs of embeddings, prompt by prompt.
class StatisticsAccumulator {
 public:
  explicit StatisticsAccumulator(int64_t width);

  // from, to: [n, d], any float dtype or device. Rows that are equal in both count as kept.
  void add_pairs(const at::Tensor& from, const at::Tensor& to, double weight = 1.0);
  // rows: [n, d]
  void add_kept(const at::Tensor& rows, double weight = 1.0);

  TextStatistics finish() const;

 private:
  int64_t width_;
  GramSum edited_;
  GramSum kept_;
  at::Tensor shift_;
};

// Upper-triangular sum of rows^T rows added to `upper` ([d, d], type and device of `rows`); what is
// below the diagonal is meaningless afterwards.
void add_gram_upper(at::Tensor& upper, const at::Tensor& rows, double weight);
// Copies the upper triangle to the lower one.
at::Tensor symmetrize_upper(const at::Tensor& upper);

}  // namespace lacuna
