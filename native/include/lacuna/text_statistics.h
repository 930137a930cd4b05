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
  int64_t rows = 0;

  static TextStatistics zeros(int64_t width);
  int64_t width() const;
  int64_t bytes() const;
  // this += scale * other
  void add(const TextStatistics& other, double scale = 1.0);
};

// Adds rows in blocks. A Gram matrix built in float32 or less is not accurate enough for the solve,
// so products run in float64; only the upper triangle is computed.
class StatisticsAccumulator {
 public:
  explicit StatisticsAccumulator(int64_t width);

  // from, to: [n, d], any float dtype or device. Rows that are equal in both count as kept.
  void add_pairs(const at::Tensor& from, const at::Tensor& to, double weight = 1.0);
  // rows: [n, d]
  void add_kept(const at::Tensor& rows, double weight = 1.0);

  TextStatistics finish() const;

 private:
  TextStatistics sums_;
};

// Upper-triangular sum of rows^T rows added to `upper` ([d, d], type and device of `rows`); what is
// below the diagonal is meaningless afterwards.
void add_gram_upper(at::Tensor& upper, const at::Tensor& rows, double weight);
// Copies the upper triangle to the lower one.
at::Tensor symmetrize_upper(const at::Tensor& upper);

}  // namespace lacuna
