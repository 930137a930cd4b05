// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "lacuna/erasure_patch.h"
#include "lacuna/host.h"
#include "lacuna/low_rank.h"

namespace lacuna {

// A LoRA in kohya naming that ComfyUI, A1111/Forge and diffusers load: per projection
// `<lora_name>.lora_up.weight` [out, r], `.lora_down.weight` [r, d], `.alpha` = r; float16, CPU.
struct LoraExport {
  std::map<std::string, at::Tensor> tensors;
  int64_t rank = 0;
  double residual = 0.0;   // relative Frobenius distance to the patch before float16 rounding
  double edit_norm = 0.0;  // Frobenius norm of the whole edit over all projections
};

// strength multiplies the edit; rank_limit bounds the rank; the rank is lower where that is exact.
LoraExport export_lora(Denoiser& model, const std::vector<AttentionProjection>& projections,
                       const at::Tensor& delta, const SharedFactorization& factors,
                       int64_t rank_limit, double strength, Progress& progress);

// The same edit as patches for the host: low rank where that is smaller, full difference elsewhere.
// tolerance: relative residual that the host's storage type cannot resolve anyway.
std::vector<WeightDelta> weight_deltas(Denoiser& model,
                                       const std::vector<AttentionProjection>& projections,
                                       const at::Tensor& delta, const SharedFactorization& factors,
                                       Progress& progress);

// The same for patches with low-rank pairs: shared factor and pairs of a projection are put side by
// side, exactly where the rank limit allows, else reduced to it by QR of both factors and a small
// SVD, projection by projection. `factors` are those of patch.delta over the edited projections;
// about twice rank_limit directions are enough. LoraExport::rank is the largest rank used.
LoraExport export_lora(Denoiser& model, const std::vector<AttentionProjection>& projections,
                       const ErasurePatch& patch, const SharedFactorization& factors,
                       int64_t rank_limit, double strength, Progress& progress);
std::vector<WeightDelta> weight_deltas(Denoiser& model,
                                       const std::vector<AttentionProjection>& projections,
                                       const ErasurePatch& patch,
                                       const SharedFactorization& factors, Progress& progress);

}  // namespace lacuna
