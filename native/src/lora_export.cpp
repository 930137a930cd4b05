// SPDX-License-Identifier: Apache-2.0
#include "lacuna/lora_export.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <optional>

#include "lacuna/error.h"

namespace lacuna {
namespace {
// Below float32 resolution of the edit: nothing a float32 host could keep is lost.
constexpr double kExact = 3e-7;

at::Tensor matmul_on_device(const at::Tensor& weight, const at::Tensor& right) {
  const at::Tensor w = weight.detach().to(at::kFloat);
  return at::matmul(w, right.to(w.device(), at::kFloat)).to(at::kCPU);
}
}  // namespace

LoraExport export_lora(Denoiser& model, const std::vector<AttentionProjection>& projections,
                       const at::Tensor& delta, const SharedFactorization& factors,
                       int64_t rank_limit, double strength, Progress& progress) {
  LoraExport out;
  out.rank = std::min(rank_limit, factors.rank_for(kExact).value_or(factors.max_rank()));
  out.residual = factors.residual(out.rank);
  const at::Tensor down = factors.down(out.rank);
  const at::Tensor edited = at::matmul(delta, down.transpose(0, 1)) * strength;  // [d, r]

  // float16 keeps eleven bits between 6e-5 and 65504: give both factors of a rank-one part the same
  // size. The balance is shared by all layers because `down` is.
  const double layers = static_cast<double>(projections.size());
  std::vector<at::Tensor> ups;
  at::Tensor energy;
  for (const AttentionProjection& projection : projections) {
    progress.check();
    ups.push_back(matmul_on_device(model.effective_weight(projection.name), edited));
    const at::Tensor squares = ups.back().to(at::kDouble).square().sum(0);
    energy = energy.defined() ? energy + squares : squares;
  }
  const at::Tensor balance = (energy / layers).sqrt().sqrt().clamp_min(1e-4);  // [r]
  const at::Tensor half_down = (down * balance.unsqueeze(1)).to(at::kHalf).contiguous();
  for (size_t i = 0; i < projections.size(); ++i) {
    const std::string& name = projections[i].lora_name;
    out.tensors[name + ".lora_up.weight"] =
        (ups[i] / balance.to(at::kFloat).unsqueeze(0)).to(at::kHalf).contiguous();
    out.tensors[name + ".lora_down.weight"] = half_down.clone();
    out.tensors[name + ".alpha"] =
        at::scalar_tensor(static_cast<double>(out.rank), at::TensorOptions(at::kHalf));
  }
  return out;
}

std::vector<WeightDelta> weight_deltas(Denoiser& model,
                                       const std::vector<AttentionProjection>& projections,
                                       const at::Tensor& delta, const SharedFactorization& factors,
                                       Progress& progress) {
  const int64_t d = delta.size(0);
  const std::optional<int64_t> rank = factors.rank_for(kExact);
  at::Tensor down;
  at::Tensor edited;
  if (rank) {
    down = factors.down(*rank).to(at::kFloat);
    edited = at::matmul(delta, factors.down(*rank).transpose(0, 1));
  }
  std::vector<WeightDelta> deltas;
  for (const AttentionProjection& projection : projections) {
    progress.check();
    const at::Tensor weight = model.effective_weight(projection.name);
    const int64_t out = weight.size(0);
    const bool low_rank = rank && *rank * (out + d) < out * d;
    deltas.push_back({projection.name, matmul_on_device(weight, low_rank ? edited : delta),
                      low_rank ? down : at::Tensor()});
  }
  return deltas;
}

}  // namespace lacuna
