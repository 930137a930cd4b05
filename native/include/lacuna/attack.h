// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>
#include <vector>

#include "lacuna/evaluation.h"

namespace lacuna {

// Self-tests: cheap ways to call an erased concept back, without any model but the two at hand.

enum class Attack {
  kParaphrase,   // written, spelled and described otherwise
  kAdversarial,  // embeddings that the edited weights read like the concept (RECE, closed form)
  kComposition,  // together with other things, and in long prompts
  kEmphasis,     // "(phrase:1.5)"
  kSimilarWord,  // the common words that carry most of the concept after the edit
  kSearched,     // other words that a search through the text encoder finds to mean the same
};
inline constexpr Attack kAttacks[] = {Attack::kParaphrase,  Attack::kAdversarial,
                                      Attack::kComposition, Attack::kEmphasis,
                                      Attack::kSimilarWord, Attack::kSearched};

// "paraphrase", "adversarial embedding", "composition", "emphasis", "similar word",
// "searched words"
std::string_view to_string(Attack attack);

// Ways to write a phrase that none of its synonyms covers, the mildest first; at most 16.
std::vector<std::string> paraphrases(const std::string& phrase);

// Prompts of eight common words, none of them one of the concept's, that the text encoder reads
// most like the concept (Tsai et al. 2024, Ring-A-Bell, on whole words and a small budget: 16
// generations of 16). Best first, `count` distinct ones. The text encoder alone is asked, so that
// what is found depends on no edit.
std::vector<std::string> searched_prompts(TextEncoder& encoder, const Concept& item, int64_t count,
                                          int64_t seed, Progress& progress);

// The prompts of every attack and concept, as many as the level is worth: none for a preflight.
// Texts only; attacked_context() changes the embeddings of those that need it. searched: by
// concept, what searched_prompts() found.
std::vector<EvaluationPrompt> attack_prompts(
    const ConceptSet& set, const EvaluationOptions& options, const ResidualScan& scan,
    const std::vector<std::vector<std::string>>& searched = {});

// Maps an embedding c to the c' that the edited keys and values read most like the original ones
// read c (Gong et al. 2024, RECE, eq. 6, with the ridge on the change):
//   c' = argmin sum ||W' c' - W c||^2 + ridge ||c' - c||^2
//   c' = c - (sum W'^T W' + ridge I)^-1 (sum W'^T D) c
// [d, d] float64 CPU. Exactly the identity when nothing was edited.
at::Tensor adversarial_map(const WeightForms& forms);

// What is drawn instead of `context` [window, d], the embedding of the attack's text. tokens:
// [window], 1 on the phrase's positions; empty: [window, d], the embedding of the empty prompt.
at::Tensor attacked_context(Attack attack, const at::Tensor& context, const at::Tensor& tokens,
                            const at::Tensor& empty, const at::Tensor& adversarial);

}  // namespace lacuna
