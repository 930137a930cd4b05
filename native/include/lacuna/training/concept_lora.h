// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lacuna/concepts/concept_set.h"
#include "lacuna/files/weight_samples.h"

namespace lacuna {

// W + up @ down for one projection (scale 1: alpha equals the rank).
struct LoraPair {
  at::Tensor up;    // [out, r] float32 CPU
  at::Tensor down;  // [r, d] float32 CPU
};

// What one concept contributes to a fusion (MACE Eq. 7 in the form of independent terms): the
// LoRA, and the statistics of the concept's own prompts. Depends on the concept, the base model,
// the options and the seed only, never on other concepts. Matrices are [d, d] on the CPU,
// float32 as in files.
struct ConceptLora {
  Concept item;
  std::map<std::string, LoraPair> pairs;  // by TextEntry::lora_name
  // B: mean over the concept's prompts of sum_positions e e^T.
  at::Tensor prompt_gram;
  // The refinement the LoRA was trained on top of, where the prompts' position f reads as g (mean
  // over the prompts, like B): A = sum f f^T and C - A = sum (g - f) f^T. Undefined without one.
  at::Tensor refinement_gram;
  at::Tensor refinement_shift;
  std::string training;  // how it was made: JSON of options, steps, first and last loss
};

// LACUNA_LORAS: trained concepts of one base model, and the file format `lacuna.bundle/1`.
struct LoraBundle {
  std::vector<std::shared_ptr<const ConceptLora>> concepts;  // targets are unique
  std::vector<PreservedPhrase> preserve;
  GeneralPriorSize general_prior = GeneralPriorSize::kSmall;
  std::string model_fingerprint;
  std::string encoder_fingerprint;
  WeightSamples model_samples;  // of the same weights; empty in files of earlier versions
  WeightSamples encoder_samples;
};

}  // namespace lacuna
