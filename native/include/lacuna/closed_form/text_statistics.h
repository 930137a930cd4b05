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

// Throws Error unless every number of what a text encoder returned is finite: asked of every batch,
// because what is read of a damaged encoder takes minutes.
void check_embeddings(const at::Tensor& embeddings);

// Products of text embeddings, as accurate as float64 for half its cost or less.
//
// Text embeddings hold nearly all of their energy in a few dozen directions, and a product in
// float32 alone is wrong by 1e-7 of that energy: too much for the solve. So those directions are
// found first (randomised range finder with one power step, Halko et al. 2011, fixed seed) and
// multiplied in float64; what is left of the rows is less than a hundredth of the energy, and
// float32 products of it are exact enough. Rows without such directions stay float64 throughout.

// Adds rows^T other to `sum`, [d, d] float64; rows: [n, d] float32 or float64, other: [n, d]
// float64 of the same kind, all on the CPU.
void add_transposed_product(at::Tensor& sum, const at::Tensor& rows, const at::Tensor& other);

// Sum of weight f f^T over rows, of which only the upper triangle is computed. The directions found
// in the first rows serve all that follow, for as long as they hold their energy.
class GramSum {
 public:
  explicit GramSum(int64_t width);
  // rows: [n, d], float32 or float64 on the CPU; weight >= 0
  void add(const at::Tensor& rows, double weight = 1.0);
  // [d, d] float64, symmetric. Ends the sum: nothing may be added afterwards.
  at::Tensor finish();

 private:
  void fold_held();
  void fold(const at::Tensor& rows, double weight);
  bool fold_parts(const at::Tensor& rows, at::Tensor& block, double weight);
  void fold_rest();
  void expand();

  at::Tensor held_;  // [rows at once, d]: rows that are too few to be folded yet
  int64_t held_rows_ = 0;
  double held_weight_ = 1.0;
  at::Tensor block_;       // [rows at once, d] float64: room for rows that are being folded
  at::Tensor single_;      // the same in float32
  at::Tensor basis_;       // [k, d] float64, orthonormal rows; undefined until needed
  at::Tensor inner_;       // [k, k] float64: sum along^T along, where rows = along basis + rest
  at::Tensor cross_;       // [k, d] float64: sum along^T rest
  at::Tensor rest_upper_;  // [d, d] float32: sum rest^T rest of the last rows
  int64_t rest_rows_ = 0;
  at::Tensor upper_;  // [d, d] float64: only the upper triangle counts
};

// Statistics of pairs of embeddings, prompt by prompt.
class StatisticsAccumulator {
 public:
  explicit StatisticsAccumulator(int64_t width);

  // from, to: [n, d], any float dtype or device. Rows that are equal in both count as kept.
  void add_pairs(const at::Tensor& from, const at::Tensor& to, double weight = 1.0);
  // rows: [n, d]
  void add_kept(const at::Tensor& rows, double weight = 1.0);

  // Ends the sums.
  TextStatistics finish();

 private:
  int64_t width_;
  GramSum edited_;
  GramSum kept_;
  at::Tensor shift_;
};

// Upper-triangular sum of rows^T rows added to `upper` ([d, d], type and device of `rows`); what is
// below the diagonal is meaningless afterwards.
void add_gram_upper(at::Tensor& upper, const at::Tensor& rows, double weight);
// The same of weight rows^T other, where only the upper triangle of the whole sum is wanted.
void add_product_upper(at::Tensor& upper, const at::Tensor& rows, const at::Tensor& other,
                       double weight);
// Copies the upper triangle to the lower one, in place.
void mirror_upper(at::Tensor& upper);

}  // namespace lacuna
