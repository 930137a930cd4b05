// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/evaluation/evaluation_prompt.h"
#include "lacuna/evaluation/residual_scan.h"
#include "lacuna/host.h"

namespace lacuna {

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

inline constexpr int64_t kLearningSteps = 60;

// Trains what stands at the phrase's places until the edited model denoises the pictures with it as
// the model before the edit drew them: the objective of Zhang et al. 2024 (UnlearnDiffAtk), on
// embeddings instead of tokens like Pham et al. 2024 (CCE), with a small budget. It is a textual
// inversion of the erased concept.
// text: of one prompt, [1, window, d]; tokens: [window], 1 on the phrase's places; latents:
// [n, c, h, w], what the base model draws for the prompt. Returns [window, d] CPU; other places are
// as they were. before_step(step) is called before every step and may throw. Ends early when the
// edited model predicts NaN: what it draws tells that it is broken.
at::Tensor learned_context(Denoiser& edited, const TextEmbedding& text, const at::Tensor& tokens,
                           const at::Tensor& latents, at::Generator random,
                           const std::function<void(int64_t step)>& before_step);

// What is drawn instead of `context` [window, d], the embedding of the attack's text. tokens:
// [window], 1 on the phrase's positions; empty: [window, d], the embedding of the empty prompt.
at::Tensor attacked_context(Attack attack, const at::Tensor& context, const at::Tensor& tokens,
                            const at::Tensor& empty, const at::Tensor& adversarial);

}  // namespace lacuna
