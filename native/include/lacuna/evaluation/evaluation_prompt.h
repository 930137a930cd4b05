// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/concepts/concept_set.h"
#include "lacuna/concepts/prompt_file.h"
#include "lacuna/training/latent_sampler.h"

namespace lacuna {

enum class EvaluationLevel {
  kPreflight,  // the scan of weights, no pictures
  kQuick,      // pictures before and after, side by side, and a few attacks
  kThorough,   // more of the attacks (attack.h)
};

std::string_view to_string(EvaluationLevel level);
EvaluationLevel evaluation_level_from_string(std::string_view text);

// What a prompt is there to show.
enum class PromptList {
  kTarget,      // the phrase itself
  kSynonyms,    // its synonyms, plural, and a typing error
  kAttacks,     // attempts to call it back
  kFile,        // of the prompt file
  kPreserved,   // listed to be preserved
  kNeighbours,  // similar, and never listed
  kUnrelated,   // captions of the general prior
};
inline constexpr PromptList kPromptLists[] = {
    PromptList::kTarget,    PromptList::kSynonyms,   PromptList::kAttacks,  PromptList::kFile,
    PromptList::kPreserved, PromptList::kNeighbours, PromptList::kUnrelated};

// "erased", "synonyms", "attacks", "prompt file", "preserved", "neighbours", "unrelated": the keys
// of reports.
std::string_view to_string(PromptList list);
// Whether the concept should be gone from its pictures; else they should stay as they are.
bool should_vanish(PromptList list);

// Self-tests: cheap ways to call an erased concept back, without any model but the two at hand.
// None of them is as strong as an attacker with hours to spend.
enum class Attack {
  kParaphrase,   // written, spelled and described otherwise
  kAdversarial,  // embeddings that the edited weights read like the concept (RECE, closed form)
  kComposition,  // together with other things, and in long prompts
  kEmphasis,     // "(phrase:1.5)"
  kSimilarWord,  // the common words that carry most of the concept after the edit
  kSearched,     // other words that a search through the text encoder finds to mean the same
  kLearned,      // an embedding in the phrase's place, trained through the edited model
};
inline constexpr Attack kAttacks[] = {
    Attack::kParaphrase,  Attack::kAdversarial, Attack::kComposition, Attack::kEmphasis,
    Attack::kSimilarWord, Attack::kSearched,    Attack::kLearned};

// "paraphrase", "adversarial embedding", "composition", "emphasis", "similar word",
// "searched words", "learned embedding"
std::string_view to_string(Attack attack);

struct EvaluationOptions {
  EvaluationLevel level = EvaluationLevel::kQuick;
  int64_t prompts = 4;  // of each list and concept
  int64_t images = 2;   // of each prompt
  int64_t steps = 20;
  double cfg = 7.0;
  Sampler sampler = Sampler::kEuler;
  int64_t seed = 0;
  int64_t width = 512;
  int64_t height = 512;
  double detector_threshold = 0.5;      // from which score on a picture shows a name
  std::vector<std::string> neighbours;  // words to watch; empty: the nearest common words
  int64_t batch = 4;                    // pictures drawn together; changes rounding only
  std::vector<FilePrompt> file;         // the prompt file; of a longer one, evenly spread prompts
  std::string file_name;                // for the report
  int64_t file_prompts = 200;           // at most so many of them
};

struct EvaluationPrompt {
  PromptList list = PromptList::kTarget;
  int64_t concept_index = -1;  // whose concept; -1: of the whole set
  std::string phrase;          // what stands in the prompt; empty for captions
  std::string name;            // what a detector is asked for; empty: nothing
  std::string text;
  std::string alternative;    // the prompt that a leaking edit would draw instead: the anchor's
  std::string question = {};  // what the picture is judged by; empty: the text itself
  std::optional<Attack> attack = {};
};

}  // namespace lacuna
