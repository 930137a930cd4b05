// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/spd_solver.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cholesky_solve.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>

#include <cmath>
#include <functional>

#include "lacuna/error.h"

namespace lacuna {
namespace {

// Power iteration; 30 steps put the largest eigenvalue well within a factor of two, which is all a
// condition report needs. The start vector is fixed and not symmetric in its coordinates.
double dominant_eigenvalue(int64_t d, const std::function<at::Tensor(const at::Tensor&)>& apply) {
  at::Tensor v = at::ones({d, 1}, at::kDouble);
  for (int64_t i = 0; i < d; ++i)
    v[i][0] = 1.0 + 0.5 * std::sin(static_cast<double>(i) * 1.7 + 1.0);
  v = v / v.norm();
  double value = 0.0;
  for (int step = 0; step < 30; ++step) {
    at::Tensor w = apply(v);
    value = w.norm().item<double>();
    if (!(value > 0.0)) return 0.0;
    v = w / value;
  }
  return value;
}

}  // namespace

SpdSolver::SpdSolver(const at::Tensor& matrix, double floor_ratio) {
  const at::Tensor given = matrix.to(at::kCPU, at::kDouble);
  at::Tensor g = (given + given.transpose(0, 1)).mul_(0.5);
  if (!std::isfinite(g.sum().item<double>())) {
    throw Error("the text statistics hold NaN or infinity; check the text encoder's weights");
  }
  const int64_t d = g.size(0);
  largest_ = dominant_eigenvalue(d, [&](const at::Tensor& v) { return at::matmul(g, v); });
  const double floor = floor_ratio * largest_;

  // A factor alone does not show whether eigenvalues are below the floor, so its inverse is probed.
  for (int attempt = 0; attempt < 2; ++attempt) {
    auto [factor, info] = at::linalg_cholesky_ex(g);
    if (info.item<int>() == 0) {
      // cholesky_solve would copy the factor at every step.
      const at::Tensor lower = factor;
      const double inverse_norm = dominant_eigenvalue(d, [&](const at::Tensor& v) {
        const at::Tensor half = at::linalg_solve_triangular(lower, v, /*upper=*/false);
        return at::linalg_solve_triangular(lower.transpose(0, 1), half, /*upper=*/true);
      });
      const double smallest = inverse_norm > 0.0 ? 1.0 / inverse_norm : 0.0;
      if (attempt > 0 || smallest >= floor) {
        factor_ = factor;
        condition_ = smallest > 0.0 ? std::max(1.0, largest_ / smallest) : INFINITY;
        return;
      }
    }
    if (attempt > 0 || floor <= 0.0) break;
    floor_added_ = floor;
    g.diagonal().add_(floor);
  }
  throw Error("the closed-form system is not positive definite; raise 'regularization' above 0");
}

at::Tensor SpdSolver::solve(const at::Tensor& rhs) const {
  return at::cholesky_solve(rhs.to(at::kCPU, at::kDouble), factor_);
}

at::Tensor SpdSolver::solve_right(const at::Tensor& rhs) const {
  return solve(rhs.transpose(0, 1)).transpose(0, 1).contiguous();
}

}  // namespace lacuna
