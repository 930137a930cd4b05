// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/concept_lora.h"
#include "lacuna/concept_prompts.h"
#include "lacuna/host.h"
#include "lacuna/refinement.h"
#include "lacuna/timestep_sampler.h"

namespace lacuna {

// The second half of MACE: for each concept a small LoRA on the cross-attention keys and values
// that takes attention away from the concept's tokens wherever the model would draw the concept.
// Concepts are independent of each other: alone or in a list of a hundred, the same LoRA.

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

struct TrainedConcept {
  std::shared_ptr<const ConceptLora> lora;
  std::vector<double> losses;  // by step
  double mass_before = 0.0;    // the loss at fixed draws, before and after training
  double mass_after = 0.0;
  at::Tensor pictures;  // [n, H, W, 3] in 0..1: pictures, darkened outside their masks
};

// Throws Error for options out of range, a rank the model has no room for, a refinement of another
// text encoder or of values only, and unusable pictures. Nothing is computed.
void check(const LoraTraining& training, const LoraOptions& options);

// What a LoRA depends on besides concept and model, as JSON: options (the batch aside), refinement,
// the user's own pictures. Two equal texts: no need to train again.
std::string recipe(const LoraOptions& options, const Refinement* refinement,
                   const TrainingImages& images);
// The recipe in ConceptLora::training; empty when there is none.
std::string recipe_of(const ConceptLora& lora);

// Trains in groups of options.batch; every finished concept is handed over at once, so that a
// cancelled or failed run loses the unfinished group only. Runs under any grad or inference mode of
// the caller, which are restored on every path. Throws Error that names the concept whose loss is
// NaN or infinity.
void train_loras(const LoraTraining& training, const std::vector<Concept>& concepts,
                 const LoraOptions& options, Progress& progress,
                 const std::function<void(TrainedConcept)>& on_finished);

}  // namespace lacuna
