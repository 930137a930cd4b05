// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>
#include <vector>

#include "lacuna/evaluation/evaluation_record.h"

namespace lacuna {

// An evaluation in numbers and sentences.

// One list of prompts: of one concept, or of the whole set.
struct ListSummary {
  PromptList list = PromptList::kTarget;
  int64_t concept_index = -1;  // -1: the whole set
  Count seen_before;           // pictures that show what the list is about
  Count seen_after;
  double p = 1.0;       // exact McNemar test: seen before and after
  double p_holm = 1.0;  // corrected for the number of concepts; as p for the whole set
  MeanEstimate latent_change;
  MeanEstimate pixel_change;
  double attention_ratio = kUnknown;  // attention mass after over before
  double noise_gap_ratio = kUnknown;  // noise-prediction gap after over before
  double implausibility = kUnknown;   // median
  // With an image encoder: cosine of before and after; how much nearer to its text a picture came.
  MeanEstimate image_similarity;
  MeanEstimate text_change;
  int64_t by_detector = 0;  // pictures that a detector judged
  int64_t detector_errors = 0;

  // What the list is there to count: pictures without the concept, or those that still show theirs.
  Count hits() const;
};

// Shares in 0..1; kUnknown where there was nothing to count. Of a preflight they are estimates from
// the weights: one minus what remains of the phrase, one minus the drift of what should stay.
struct Scores {
  double erased = kUnknown;
  double synonyms = kUnknown;
  double preserved = kUnknown;
  double neighbours = kUnknown;
  double unrelated = kUnknown;
  double harmonic_mean = 0.0;  // of those that are known, preserved and neighbours as one
};

// One attack on one concept.
struct AttackSummary {
  Attack attack{};
  int64_t concept_index = 0;
  Count back;  // pictures after the edit that show the concept
};

// A prompt that should not show its concept, and does in some of its pictures after the edit.
struct FailingPrompt {
  size_t prompt = 0;
  Count back;
};

struct EvaluationSummary {
  std::vector<ListSummary> lists;  // of each concept, then of the whole set
  std::vector<AttackSummary> attacks;
  std::vector<FailingPrompt> failing;  // most often first
  Scores scores;
  std::vector<std::string> verdict;  // sentences, most important first
};

EvaluationSummary summarize(const Evaluation& evaluation);

// The list of a concept, or with -1 of the whole set; null where nothing was counted.
const ListSummary* find_list(const EvaluationSummary& summary, PromptList list, int64_t index);

// The concepts with what came through as further synonyms, to be erased with them: the phrases of
// failing prompts, where they can be phrases of a Concept Set.
ConceptSet with_failing_prompts(const Evaluation& evaluation, const EvaluationSummary& summary);

}  // namespace lacuna
