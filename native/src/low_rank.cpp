// SPDX-License-Identifier: Apache-2.0
#include "lacuna/low_rank.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <tuple>

namespace lacuna {
namespace {

constexpr int64_t kWholeDecomposition = 1024;  // 0.2 s on two desktop cores
constexpr int64_t kOversampling = 16;
constexpr int kMaxIterations = 30;

struct Eigenpairs {
  at::Tensor values;   // [k] descending
  at::Tensor vectors;  // [d, k]
};

Eigenpairs descending(const at::Tensor& symmetric) {
  auto [values, vectors] = at::linalg_eigh((symmetric + symmetric.transpose(0, 1)) * 0.5);
  return {values.flip(0).clamp_min(0.0).contiguous(), vectors.flip(1).contiguous()};
}

// Leading eigenpairs by subspace iteration with Rayleigh-Ritz. Spectra of edits fall off fast, so a
// few rounds do; whatever subspace comes out, its captured energy is exact.
Eigenpairs leading(const at::Tensor& m, int64_t k, Progress& progress) {
  at::Generator generator = at::detail::createCPUGenerator(1);
  at::Tensor q = at::randn({m.size(0), k}, generator, at::TensorOptions(at::kDouble));
  double captured = 0.0;
  Eigenpairs ritz;
  for (int round = 0; round < kMaxIterations; ++round) {
    progress.check();
    q = std::get<0>(at::linalg_qr(at::matmul(m, q)));
    ritz = descending(at::matmul(q.transpose(0, 1), at::matmul(m, q)));
    const double now = ritz.values.sum().item<double>();
    if (now - captured <= 1e-9 * now) break;
    captured = now;
  }
  return {ritz.values, at::matmul(q, ritz.vectors)};
}

}  // namespace

SharedFactorization::SharedFactorization(const at::Tensor& delta, const at::Tensor& gram,
                                         int64_t max_rank, Progress& progress) {
  const int64_t d = delta.size(0);
  const at::Tensor energy = at::matmul(at::matmul(delta.transpose(0, 1), gram), delta);
  total_ = std::max(0.0, energy.diagonal().sum().item<double>());
  const int64_t k = std::min(d, max_rank + kOversampling);
  const Eigenpairs found =
      d <= kWholeDecomposition ? descending(energy) : leading(energy, k, progress);
  max_rank = std::min(d <= kWholeDecomposition ? d : max_rank, d);
  directions_ = found.vectors.narrow(1, 0, max_rank).contiguous();

  // Sums from the small end, where cancellation would hurt; what was not computed is the remainder.
  residuals_ = at::zeros({max_rank + 1}, at::kDouble);
  if (total_ <= 0.0) return;
  const double* value = found.values.const_data_ptr<double>();
  double* residual = residuals_.mutable_data_ptr<double>();
  const int64_t computed = found.values.size(0);
  double tail = computed == d ? 0.0 : std::max(0.0, total_ - found.values.sum().item<double>());
  for (int64_t rank = computed; rank >= 0; --rank) {
    if (rank <= max_rank) residual[rank] = tail / total_;
    if (rank > 0) tail += value[rank - 1];
  }
}

int64_t SharedFactorization::max_rank() const { return directions_.size(1); }

double SharedFactorization::residual(int64_t rank) const {
  return std::sqrt(residuals_[rank].item<double>());
}

std::optional<int64_t> SharedFactorization::rank_for(double tolerance) const {
  const double* residual = residuals_.const_data_ptr<double>();
  for (int64_t rank = 1; rank <= max_rank(); ++rank) {
    if (residual[rank] <= tolerance * tolerance) return rank;
  }
  return std::nullopt;
}

double SharedFactorization::edit_norm() const { return std::sqrt(total_); }

at::Tensor SharedFactorization::down(int64_t rank) const {
  return directions_.narrow(1, 0, rank).transpose(0, 1).contiguous();
}

}  // namespace lacuna
