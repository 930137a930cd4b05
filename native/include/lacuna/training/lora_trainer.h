// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/closed_form/refinement.h"
#include "lacuna/concepts/concept_prompts.h"
#include "lacuna/host.h"
#include "lacuna/training/concept_lora.h"
#include "lacuna/training/lora_options.h"

namespace lacuna {

// The second half of MACE: for each concept a small LoRA on the cross-attention keys and values
// that takes attention away from the concept's tokens wherever the model would draw the concept.
// Concepts are independent of each other: alone or in a list of a hundred, the same LoRA.

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
