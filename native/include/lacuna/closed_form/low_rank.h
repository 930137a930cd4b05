// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "lacuna/host.h"

namespace lacuna {

// The edit W D of every projection as W D V V^T with one shared V: the best rank-r form of all
// stacked projections at once (Eckart-Young in the metric K = sum W^T W).
class SharedFactorization {
 public:
  // delta: D, [d, d]; rows: A, [p, d] with A^T A = K or close to it (entry_rows). Up to
  // max_rank directions are computed: by one eigendecomposition for small d, by subspace iteration
  // (fixed seed) for large d, where a whole decomposition would block cancellation for seconds.
  // With a tolerance no more than it takes to leave out that share.
  SharedFactorization(const at::Tensor& delta, const at::Tensor& rows, int64_t max_rank,
                      Progress& progress, double tolerance = 0.0);

  int64_t max_rank() const;  // directions computed
  // Smallest rank whose relative residual is at most `tolerance`, at least 1; none when that takes
  // more than max_rank() directions.
  std::optional<int64_t> rank_for(double tolerance) const;
  // ||W D - W D V V^T|| / ||W D|| over all projections, Frobenius; 0 when D is zero.
  double residual(int64_t rank) const;
  // ||W D|| over all projections, Frobenius.
  double edit_norm() const;
  // [r, d] rows of V^T, orthonormal, most important first.
  at::Tensor down(int64_t rank) const;

 private:
  // Eigenvalues [k] and vectors [d, k] of the edit's Gram matrix, descending.
  void take(const std::pair<at::Tensor, at::Tensor>& found, int64_t rank);

  at::Tensor directions_;  // [d, max_rank], columns sorted by importance
  at::Tensor residuals_;   // [max_rank + 1], squared relative residual of rank 0, 1, ...
  double total_ = 0.0;     // squared norm of the whole edit
};

}  // namespace lacuna
