// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string_view>

#include "lacuna/host.h"

namespace lacuna {

// Pictures as latents, drawn the same way in every host: with classifier-free guidance on
// Denoiser::denoise.

enum class Sampler {
  kEuler,    // Karras et al. 2022
  kDpmpp2M,  // DPM-Solver++ of second order, multistep (Lu et al. 2022)
};

std::string_view to_string(Sampler sampler);
Sampler sampler_from_string(std::string_view text);

struct LatentRequest {
  at::Tensor noise;        // [n, c, h, w], standard normal
  TextEmbedding positive;  // of n prompts
  TextEmbedding negative;  // of one prompt
  int64_t steps = 20;
  double cfg = 7.0;
  Sampler sampler = Sampler::kEuler;
};

// [steps + 1] noise levels from the largest down to 0, evenly spaced in time. levels: ascending.
at::Tensor sampling_sigmas(const at::Tensor& levels, int64_t steps);

// Sigma of a timestep that may lie between two training timesteps.
double sigma_at(const at::Tensor& levels, double timestep);

// [n, c, h, w] float32 CPU, in the model's own latent scale. before_step(step) is called before
// every step, may throw, and returns the tap for that step's forward pass, whose first n samples
// are the conditional ones; null for none.
at::Tensor sample_latents(Denoiser& model, const LatentRequest& request,
                          const std::function<AttentionTap*(int64_t step)>& before_step);

}  // namespace lacuna
