// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

#include "lacuna/closed_form/refinement.h"
#include "lacuna/concepts/concept_prompts.h"
#include "lacuna/host.h"
#include "lacuna/training/timestep_sampler.h"

namespace lacuna {

enum class LoraGradient {
  kFull,    // backward through the model, as in the paper
  kCached,  // queries are captured without gradients; every layer's keys are trained on their own
};
enum class MaskSource {
  kAttention,  // from the model's own cross-attention; styles have none
  kNone,
};

std::string_view to_string(LoraGradient gradient);
std::string_view to_string(MaskSource mask);
LoraGradient lora_gradient_from_string(std::string_view text);
MaskSource mask_source_from_string(std::string_view text);

struct LoraOptions {
  LoraGradient gradient = LoraGradient::kFull;
  int64_t rank = 1;
  int64_t steps = 50;
  double learning_rate = 1e-3;
  int64_t images = 8;  // pictures of each concept
  int64_t sampling_steps = 20;
  double cfg = 7.0;
  int64_t width = 512;
  int64_t height = 512;
  FocalTimesteps focal;
  MaskSource mask = MaskSource::kAttention;
  TokenSet tokens = TokenSet::kPhraseAndPadding;
  int64_t seed = 0;
  int64_t refresh = 1;          // cached: how often queries are captured again on the way
  int64_t captures = 4;         // cached: forward passes of each capture
  double suppress_value = 0.0;  // cached: weight of the norm of what the tokens' values contribute
  int64_t evaluations = 4;      // forward passes that measure the loss before and after
  // Concepts trained together, pictures drawn together. Results depend on it by rounding only.
  int64_t batch = 4;
};

// Pictures of a concept, in the model's own latent scale, on the CPU.
struct TrainingImages {
  at::Tensor latents;  // [n, c, h, w] float32
  at::Tensor masks;    // [n, H, W] in 0..1; undefined: the whole picture
};

// Everything that training reads besides concepts and options.
struct LoraTraining {
  Denoiser& model;
  TextEncoder& encoder;
  ImageDecoder* decoder = nullptr;  // for previews
  // Train on top of its edit, as its method makes it for each concept alone; its weights do not
  // matter here, they are those of the fusion.
  const Refinement* refinement = nullptr;
  TrainingImages images = {};  // the user's own; undefined latents: the model draws them
  int64_t pictures = 8;        // at most so many pictures of a concept in its result
};

// Throws Error naming the option that is out of range.
void check(const LoraOptions& options);
// Throws Error for pictures and masks that do not fit each other, and for empty masks.
void check(const TrainingImages& images);

}  // namespace lacuna
