// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/low_rank.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
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
constexpr int64_t kFirstRank = 64;
constexpr int64_t kOversampling = 16;
constexpr int kMaxIterations = 30;
// Shares of the energy: what float32 products cannot tell from nothing, and how well what is left
// out is known.
constexpr double kNothing = 3e-8;
constexpr double kSettled = 1e-2;

struct Eigenpairs {
  at::Tensor values;   // [k] descending
  at::Tensor vectors;  // [d, k]
};

Eigenpairs descending(const at::Tensor& symmetric) {
  auto [values, vectors] = at::linalg_eigh((symmetric + symmetric.transpose(0, 1)) * 0.5);
  return {values.flip(0).clamp_min(0.0).contiguous(), vectors.flip(1).contiguous()};
}

// Leading eigenpairs of B^T B by subspace iteration with Rayleigh-Ritz, from directions that are
// known already; b: [p, d] float32. Spectra of edits fall off fast, so a few rounds do; whatever
// subspace comes out, its captured energy is exact. Where two rounds leave out more than
// `too_much` of the energy, more directions are called for, and no better ones.
Eigenpairs leading(const at::Tensor& b, double total, int64_t k, const at::Tensor& known,
                   double too_much, Progress& progress) {
  at::Generator generator = at::detail::createCPUGenerator(1);
  at::Tensor q =
      at::randn({b.size(1), k - known.size(1)}, generator, at::TensorOptions(at::kFloat));
  q = at::cat({known.to(at::kFloat), q}, 1);
  at::Tensor image = at::matmul(b, q);
  double captured = 0.0;
  Eigenpairs ritz;
  for (int round = 0; round < kMaxIterations; ++round) {
    progress.check();
    q = std::get<0>(at::linalg_qr(at::matmul(b.transpose(0, 1), image).to(at::kDouble)));
    image = at::matmul(b, q.to(at::kFloat));
    const at::Tensor exact = image.to(at::kDouble);
    ritz = descending(at::matmul(exact.transpose(0, 1), exact));
    const double now = ritz.values.sum().item<double>();
    if (round > 0 && total - now > too_much * total) break;
    if (now - captured <= kSettled * std::max(total - now, kNothing * total)) break;
    captured = now;
  }
  return {ritz.values, at::matmul(q, ritz.vectors)};
}

}  // namespace

SharedFactorization::SharedFactorization(const at::Tensor& delta, const at::Tensor& rows,
                                         int64_t max_rank, Progress& progress, double tolerance) {
  const int64_t d = delta.size(0);
  const bool whole = d <= kWholeDecomposition;
  max_rank = std::min(max_rank, d);
  const auto type = whole ? at::kDouble : at::kFloat;
  const at::Tensor b = at::matmul(rows.to(type), delta.to(type));  // the edit, [p, d]
  total_ = b.square().sum(at::kDouble).item<double>();
  if (whole) {
    const Eigenpairs all = descending(at::matmul(b.transpose(0, 1), b));
    take({all.values, all.vectors}, d);
    return;
  }
  Eigenpairs found{{}, at::zeros({d, 0}, at::kDouble)};
  const int64_t first = tolerance > 0.0 ? std::min(max_rank, kFirstRank) : max_rank;
  for (int64_t rank = first;; rank = std::min(max_rank, 2 * rank)) {
    const double too_much = rank < max_rank ? 2 * tolerance * tolerance : 1.0;
    found =
        leading(b, total_, std::min(d, rank + kOversampling), found.vectors, too_much, progress);
    take({found.values, found.vectors}, rank);
    if (rank == max_rank || rank_for(tolerance)) return;
  }
}

void SharedFactorization::take(const std::pair<at::Tensor, at::Tensor>& found, int64_t rank) {
  const auto& [values, vectors] = found;
  directions_ = vectors.narrow(1, 0, rank).contiguous();
  // Sums from the small end, where cancellation would hurt; what was not computed is the remainder.
  residuals_ = at::zeros({rank + 1}, at::kDouble);
  if (total_ <= 0.0) return;
  const double* value = values.const_data_ptr<double>();
  double* residual = residuals_.mutable_data_ptr<double>();
  const int64_t computed = values.size(0);
  double tail = 0.0;
  if (computed < vectors.size(0)) {
    tail = std::max(0.0, total_ - values.sum().item<double>());
    if (tail <= kNothing * total_) tail = 0.0;
  }
  for (int64_t r = computed; r >= 0; --r) {
    if (r <= rank) residual[r] = tail / total_;
    if (r > 0) tail += value[r - 1];
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
