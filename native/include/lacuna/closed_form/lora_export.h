// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "lacuna/closed_form/erasure_patch.h"
#include "lacuna/closed_form/low_rank.h"
#include "lacuna/host.h"

namespace lacuna {

// A LoRA in kohya naming that ComfyUI, A1111/Forge and diffusers load: per projection
// `<lora_name>.lora_up.weight` [out, r], `.lora_down.weight` [r, d], `.alpha` = r; float16, CPU.
struct LoraExport {
  std::map<std::string, at::Tensor> tensors;
  int64_t rank = 0;
  double residual = 0.0;   // relative Frobenius distance to the patch before float16 rounding
  double edit_norm = 0.0;  // Frobenius norm of the whole edit over all projections
};

// The smallest rank that leaves out at most `left_out` of the edit (relative Frobenius norm), but
// never more than `rank`.
struct LoraLimits {
  int64_t rank = 64;
  double left_out = 0.0;
};

// strength multiplies the edit.
LoraExport export_lora(Denoiser& model, const std::vector<TextEntry>& projections,
                       const at::Tensor& delta, const SharedFactorization& factors,
                       const LoraLimits& limits, double strength, Progress& progress);

// The same for patches with low-rank pairs: shared factor and pairs of a projection are put side by
// side, exactly where the limits allow, else reduced to them by QR of both factors and a small
// SVD, projection by projection. `factors` are those of patch.delta over the edited projections;
// about twice limits.rank directions are enough. LoraExport::rank is the largest rank used.
LoraExport export_lora(Denoiser& model, const std::vector<TextEntry>& projections,
                       const ErasurePatch& patch, const SharedFactorization& factors,
                       const LoraLimits& limits, double strength, Progress& progress);

}  // namespace lacuna
