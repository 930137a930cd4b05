// SPDX-License-Identifier: Apache-2.0
#include "lacuna/low_rank.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/matmul.h>

#include <cmath>

namespace lacuna {

SharedFactorization::SharedFactorization(const at::Tensor& delta, const at::Tensor& gram) {
  const at::Tensor energy = at::matmul(at::matmul(delta.transpose(0, 1), gram), delta);
  auto [values, vectors] = at::linalg_eigh((energy + energy.transpose(0, 1)) * 0.5);
  energies_ = values.flip(0).clamp_min(0.0).contiguous();
  directions_ = vectors.flip(1).contiguous();
}

int64_t SharedFactorization::width() const { return energies_.size(0); }

double SharedFactorization::residual(int64_t rank) const {
  const double total = energies_.sum().item<double>();
  if (total <= 0.0 || rank >= width()) return 0.0;
  return std::sqrt(energies_.narrow(0, rank, width() - rank).sum().item<double>() / total);
}

int64_t SharedFactorization::rank_for(double tolerance) const {
  const double total = energies_.sum().item<double>();
  if (total <= 0.0) return 1;
  const double* energy = energies_.const_data_ptr<double>();
  // Sums from the small end, where cancellation would hurt.
  double tail = 0.0;
  int64_t rank = width();
  while (rank > 1 && tail + energy[rank - 1] <= tolerance * tolerance * total) {
    tail += energy[--rank];
  }
  return rank;
}

double SharedFactorization::edit_norm() const { return std::sqrt(energies_.sum().item<double>()); }

at::Tensor SharedFactorization::down(int64_t rank) const {
  return directions_.narrow(1, 0, rank).transpose(0, 1).contiguous();
}

}  // namespace lacuna
