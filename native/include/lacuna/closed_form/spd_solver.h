// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace lacuna {

// Embeddings carry float32 rounding: eigenvalues of a Gram matrix below this share of the largest
// one are noise.
inline constexpr double kNoiseFloor = 1e-10;

// One float64 Cholesky factorisation of a symmetric positive definite matrix, shared by every
// solve that needs it. No explicit inverse. Runs on the CPU: consumer GPUs have no fast float64.
class SpdSolver {
 public:
  // matrix: [d, d], any float dtype or device; symmetrised and copied, never modified.
  // Eigenvalues below floor_ratio * largest are lifted by adding that floor to the diagonal: those
  // directions are rounding noise of float32 embeddings. Throws Error when the matrix holds
  // NaN or infinity, or is not positive definite even with the floor.
  explicit SpdSolver(const at::Tensor& matrix, double floor_ratio = 1e-12);

  // rhs: [d, n]. Returns matrix^-1 rhs, [d, n] float64 on the CPU.
  at::Tensor solve(const at::Tensor& rhs) const;
  // rhs: [n, d]. Returns rhs matrix^-1, [n, d] float64 on the CPU.
  at::Tensor solve_right(const at::Tensor& rhs) const;

  double condition() const { return condition_; }  // estimate of the 2-norm condition number
  double largest_eigenvalue() const { return largest_; }
  double floor_added() const { return floor_added_; }  // 0 when none was needed

 private:
  at::Tensor factor_;  // lower triangular, [d, d] float64
  double condition_ = 1.0;
  double largest_ = 0.0;
  double floor_added_ = 0.0;
};

}  // namespace lacuna
