// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/lora_export.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "lacuna/error.h"

namespace lacuna {
namespace {
// Below float32 resolution of the edit: nothing a float32 host could keep is lost.
constexpr double kExact = 3e-7;

at::Tensor matmul_on_device(const at::Tensor& weight, const at::Tensor& right) {
  const at::Tensor w = weight.detach().to(at::kFloat);
  return at::matmul(w, right.to(w.device(), at::kFloat)).to(at::kCPU);
}

// W D over the shared directions: as many as it takes, at most `limit`.
class SharedPart {
 public:
  SharedPart(const at::Tensor& delta, const SharedFactorization& factors, int64_t limit)
      : delta_(delta) {
    const std::optional<int64_t> rank =
        factors.edit_norm() > 0.0 ? factors.rank_for(kExact) : std::optional<int64_t>(0);
    exact_ = rank && *rank <= limit;
    rank_ = exact_ ? *rank : std::min(limit, factors.max_rank());
    down_ = factors.down(rank_);
    edited_ = at::matmul(delta, down_.transpose(0, 1));
    left_out_ = exact_ ? 0.0 : factors.residual(rank_) * factors.edit_norm();
  }

  bool exact() const { return exact_; }
  int64_t rank() const { return rank_; }
  const at::Tensor& down() const { return down_; }      // [rank, d]
  const at::Tensor& edited() const { return edited_; }  // D down^T, [d, rank]
  // Norm, over all projections, of what is left out.
  double left_out() const { return left_out_; }
  // (D - D V V^T) x for columns x.
  at::Tensor remainder(const at::Tensor& x) const {
    return at::matmul(delta_, x) - at::matmul(edited_, at::matmul(down_, x));
  }

 private:
  at::Tensor delta_;
  bool exact_ = true;
  int64_t rank_ = 0;
  at::Tensor down_;
  at::Tensor edited_;
  double left_out_ = 0.0;
};

// Gives both factors of every rank-one part the same size: float16 keeps eleven bits between 6e-5
// and 65504.
void balance(at::Tensor& up, at::Tensor& down) {
  const at::Tensor up_norm = up.norm(2, 0);
  const at::Tensor down_norm = down.norm(2, 1);
  const at::Tensor usable = up_norm.gt(0).logical_and(down_norm.gt(0));
  const at::Tensor factor = (down_norm / up_norm).sqrt().masked_fill(usable.logical_not(), 1.0);
  up = up * factor.unsqueeze(0);
  down = down / factor.unsqueeze(1);
}

// The factor, [r, d], with zeros for the columns of the weight that read something else.
at::Tensor over_all_columns(const at::Tensor& down, Denoiser& model, const TextEntry& entry) {
  if (entry.columns == 0) return down;
  const int64_t all = model.effective_weight(entry.name).size(1);
  return at::constant_pad_nd(down, {entry.first_column, all - entry.first_column - entry.columns});
}

// As many singular values (descending) as the limits ask for.
int64_t rank_of(const at::Tensor& singular, const LoraLimits& limits) {
  const double allowed = limits.left_out * limits.left_out * singular.square().sum().item<double>();
  const double* value = singular.const_data_ptr<double>();
  int64_t rank = singular.size(0);
  double lost = 0.0;
  while (rank > 1) {
    lost += value[rank - 1] * value[rank - 1];
    if (lost > allowed) break;
    --rank;
  }
  return std::min(rank, limits.rank);
}

double sum_of_products(const at::Tensor& a, const at::Tensor& b) {
  return (a * b).sum().item<double>();
}
}  // namespace

LoraExport export_lora(Denoiser& model, const std::vector<TextEntry>& projections,
                       const at::Tensor& delta, const SharedFactorization& factors,
                       const LoraLimits& limits, double strength, Progress& progress) {
  LoraExport out;
  out.edit_norm = std::abs(strength) * factors.edit_norm();
  out.rank =
      std::min(limits.rank,
               factors.rank_for(std::max(kExact, limits.left_out)).value_or(factors.max_rank()));
  out.residual = factors.residual(out.rank);
  const at::Tensor down = factors.down(out.rank);
  const at::Tensor edited = at::matmul(delta, down.transpose(0, 1)) * strength;  // [d, r]

  // float16 keeps eleven bits between 6e-5 and 65504: give both factors of a rank-one part the same
  // size. The balance is shared by all layers because `down` is.
  const double layers = static_cast<double>(projections.size());
  std::vector<at::Tensor> ups;
  at::Tensor energy;
  for (const TextEntry& projection : projections) {
    progress.check();
    ups.push_back(matmul_on_device(entry_weight(model, projection), edited));
    const at::Tensor squares = ups.back().to(at::kDouble).square().sum(0);
    energy = energy.defined() ? energy + squares : squares;
  }
  const at::Tensor balance = (energy / layers).sqrt().sqrt().clamp_min(1e-4);  // [r]
  const at::Tensor half_down = (down * balance.unsqueeze(1)).to(at::kHalf).contiguous();
  for (size_t i = 0; i < projections.size(); ++i) {
    const std::string& name = projections[i].lora_name;
    const at::Tensor up = std::exchange(ups[i], at::Tensor());  // never all of them twice
    out.tensors[name + ".lora_up.weight"] =
        (up / balance.to(at::kFloat).unsqueeze(0)).to(at::kHalf).contiguous();
    out.tensors[name + ".lora_down.weight"] =
        over_all_columns(half_down, model, projections[i]).clone();
    out.tensors[name + ".alpha"] =
        at::scalar_tensor(static_cast<double>(out.rank), at::TensorOptions(at::kHalf));
  }
  return out;
}

LoraExport export_lora(Denoiser& model, const std::vector<TextEntry>& projections,
                       const ErasurePatch& patch, const SharedFactorization& factors,
                       const LoraLimits& limits, double strength, Progress& progress) {
  if (patch.pairs.empty()) {
    return export_lora(model, projections, patch.delta, factors, limits, strength, progress);
  }
  const SharedPart shared(patch.delta, factors, 2 * limits.rank);
  LoraExport out;
  double whole = shared.left_out() * shared.left_out();  // squared norms
  double lost = whole;
  for (const TextEntry& projection : projections) {
    progress.check();
    const at::Tensor weight = model.effective_weight(projection.name);
    const LowRankPair* pair = pair_of(patch, projection, weight);
    const bool edits = patch.edits(projection) && shared.rank() > 0;
    std::vector<at::Tensor> ups;
    std::vector<at::Tensor> downs;
    if (edits) {
      ups.push_back(matmul_on_device(weight, shared.edited()).to(at::kDouble));
      downs.push_back(shared.down());
    }
    if (pair != nullptr) {
      ups.push_back(pair->b.to(at::kCPU, at::kDouble));
      downs.push_back(pair->r.to(at::kCPU, at::kDouble).transpose(0, 1));
    }
    if (ups.empty()) continue;
    at::Tensor up = at::cat(ups, 1);
    at::Tensor down = at::cat(downs, 0);
    whole +=
        sum_of_products(at::matmul(up.transpose(0, 1), up), at::matmul(down, down.transpose(0, 1)));
    if (up.size(1) > limits.rank || limits.left_out > 0.0) {
      const auto [up_basis, up_mix] = at::linalg_qr(up);
      const auto [down_basis, down_mix] = at::linalg_qr(down.transpose(0, 1));
      const auto [u, s, vh] =
          at::linalg_svd(at::matmul(up_mix, down_mix.transpose(0, 1)), /*full_matrices=*/false);
      const int64_t rank = rank_of(s, limits);
      up = at::matmul(up_basis, u.narrow(1, 0, rank) * s.narrow(0, 0, rank).unsqueeze(0));
      down = at::matmul(vh.narrow(0, 0, rank), down_basis.transpose(0, 1));
      lost += s.narrow(0, rank, s.size(0) - rank).square().sum().item<double>();
    }
    if (edits && !shared.exact()) {
      // What the shared part left out is orthogonal to that part, but not to the pairs.
      double with_pair = 0.0;
      if (pair != nullptr) {
        with_pair = sum_of_products(
            ups.back(), matmul_on_device(weight, shared.remainder(downs.back().transpose(0, 1)))
                            .to(at::kDouble));
      }
      const double with_result = sum_of_products(
          up, matmul_on_device(weight, shared.remainder(down.transpose(0, 1))).to(at::kDouble));
      whole += 2.0 * with_pair;
      lost += 2.0 * (with_pair - with_result);
    }
    up = up * strength;
    balance(up, down);
    const std::string& name = projection.lora_name;
    out.tensors[name + ".lora_up.weight"] = up.to(at::kHalf).contiguous();
    out.tensors[name + ".lora_down.weight"] = down.to(at::kHalf).contiguous();
    out.tensors[name + ".alpha"] =
        at::scalar_tensor(static_cast<double>(up.size(1)), at::TensorOptions(at::kHalf));
    out.rank = std::max(out.rank, up.size(1));
  }
  out.edit_norm = std::abs(strength) * std::sqrt(std::max(0.0, whole));
  out.residual = whole > 0.0 ? std::sqrt(std::max(0.0, lost) / whole) : 0.0;
  return out;
}

}  // namespace lacuna
