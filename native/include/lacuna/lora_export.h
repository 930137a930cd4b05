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
  double residual = 0.0;  // relative Frobenius distance to the patch before float16 rounding
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

}  // namespace lacuna
