// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "lacuna/closed_form/edit_method.h"
#include "lacuna/closed_form/statistics_cache.h"
#include "lacuna/closed_form/text_entry.h"
#include "lacuna/closed_form/text_statistics.h"
#include "lacuna/concepts/concept_set.h"
#include "lacuna/host.h"

namespace lacuna {

// Closed-form cross-attention refinement (MACE Eq. 1-2, UCE) in its shared form:
//   W' = W N,  N = I + shift G^-1,  G = edited + kept + preserve + prior + regularization I
// One d x d matrix N serves every key and value matrix of every layer. N - I is computed directly:
// directions that nobody edits keep exactly the identity.

struct RefinementOptions {
  std::string method = "uce";
  ReadAt read_at = ReadAt::kAll;
  EditedMatrices matrices = EditedMatrices::kKeyAndValue;
  double regularization = 10.0;  // lambda: pull of every direction towards no change
  double preserve_weight = 1.0;  // weight of a preserved phrase, where an erased one counts 1
  double prior_weight = 10.0;    // weight of the general prior, likewise
  int adversarial_rounds = 0;    // 0..3, closed-form adversarial embeddings (RECE)
};

// What one problem sums up to. Sums over prompts are divided by the number of prompts of the
// concept or phrase, so that weights do not depend on the template count.
struct RefinementProblem {
  TextStatistics concepts;  // summed over concepts
  at::Tensor preserve;      // [d, d] summed over preserved phrases; may be undefined
  at::Tensor prior;         // [d, d] general_prior_gram; may be undefined
  at::Tensor retain;        // [d, d] of the retain set; may be undefined
};

// What a closed form must leave alone, [d, d] float64 CPU each.
struct KeptText {
  at::Tensor preserve;  // summed over preserved phrases, each a mean over its prompts
  at::Tensor prior;     // general_prior_gram without the captions that name something erased
  at::Tensor retain;    // of the retain set; may be undefined
};

struct Refinement {
  at::Tensor delta;  // N - I, [d, d] float64 CPU
  EditedMatrices matrices = EditedMatrices::kKeyAndValue;
  double condition = 1.0;
  double floor_added = 0.0;
  ConceptSet concepts;
  RefinementOptions options;
  std::string encoder_fingerprint;
  WeightSamples encoder_samples;
};

// Throws Error for options out of range.
void check(const RefinementOptions& options);

// entry_gram is needed for adversarial rounds only (else undefined).
Refinement solve_refinement(const RefinementProblem& problem, const RefinementOptions& options,
                            const at::Tensor& entry_gram = {});

// Throws Error when a phrase does not fit the encoder's window with the longest template, or when
// the tokenizer reads target and anchor as the same tokens. Tokenises only.
void check_phrases(TextEncoder& encoder, const ConceptSet& set);

// Encodes what is not in the cache and sums up. `cache` may be null.
RefinementProblem collect_problem(TextEncoder& encoder, const ConceptSet& set,
                                  const RefinementOptions& options, StatisticsCache* cache,
                                  Progress& progress);

// How the prompts of one concept should read after the edit.
struct AnchoredPrompts {
  at::Tensor context;         // [n, window, d]: edited positions hold the anchor's embeddings
  TextStatistics statistics;  // of those rows, mean over the prompts
};

// context: [n, window, d] on the CPU, every template with every phrase of `item` (encode_prompts);
// anchor: [templates, window, d], every template with the anchor. Neither is changed.
AnchoredPrompts anchor_prompts(TextEncoder& encoder, const Concept& item, const at::Tensor& context,
                               const at::Tensor& anchor, const RefinementOptions& options);

// What must stay, alone. erased: phrases that the general prior must not protect.
// Results are shared with the cache: not to be written to.
KeptText collect_kept_text(TextEncoder& encoder, const std::vector<PreservedPhrase>& preserve,
                           GeneralPriorSize general_prior, const std::vector<std::string>& erased,
                           StatisticsCache* cache, Progress& progress);

}  // namespace lacuna
