// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lacuna {

// The edit W D of every projection as W D V V^T with one shared V: the best rank-r form of all
// stacked projections at once (Eckart-Young in the metric K = sum W^T W).
class SharedFactorization {
 public:
  // delta: D, [d, d]; gram: K, [d, d]; both float64 CPU.
  SharedFactorization(const at::Tensor& delta, const at::Tensor& gram);

  int64_t width() const;
  // Smallest rank whose relative residual is at most `tolerance`; at least 1.
  int64_t rank_for(double tolerance) const;
  // ||W D - W D V V^T|| / ||W D|| over all projections, Frobenius; 0 when D is zero.
  double residual(int64_t rank) const;
  // ||W D|| over all projections, Frobenius.
  double edit_norm() const;
  // [r, d] rows of V^T, orthonormal, most important first.
  at::Tensor down(int64_t rank) const;

 private:
  at::Tensor directions_;  // [d, d], columns sorted by importance
  at::Tensor energies_;    // [d], squared norms of W D v, descending, float64
};

}  // namespace lacuna
