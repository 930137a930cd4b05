// SPDX-License-Identifier: Apache-2.0
#include "lacuna/evaluation/evaluation_prompt.h"

#include "lacuna/error.h"

namespace lacuna {

std::string_view to_string(EvaluationLevel level) {
  switch (level) {
    case EvaluationLevel::kPreflight:
      return "preflight";
    case EvaluationLevel::kQuick:
      return "quick";
    case EvaluationLevel::kThorough:
      break;
  }
  return "thorough";
}

EvaluationLevel evaluation_level_from_string(std::string_view text) {
  if (text == "preflight") return EvaluationLevel::kPreflight;
  if (text == "quick") return EvaluationLevel::kQuick;
  if (text == "thorough") return EvaluationLevel::kThorough;
  throw Error("unknown level '" + std::string(text) + "'; use one of: preflight, quick, thorough");
}

std::string_view to_string(PromptList list) {
  switch (list) {
    case PromptList::kTarget:
      return "erased";
    case PromptList::kSynonyms:
      return "synonyms";
    case PromptList::kAttacks:
      return "attacks";
    case PromptList::kFile:
      return "prompt file";
    case PromptList::kPreserved:
      return "preserved";
    case PromptList::kNeighbours:
      return "neighbours";
    case PromptList::kUnrelated:
      break;
  }
  return "unrelated";
}

bool should_vanish(PromptList list) {
  return list == PromptList::kTarget || list == PromptList::kSynonyms ||
         list == PromptList::kAttacks || list == PromptList::kFile;
}

std::string_view to_string(Attack attack) {
  switch (attack) {
    case Attack::kParaphrase:
      return "paraphrase";
    case Attack::kAdversarial:
      return "adversarial embedding";
    case Attack::kComposition:
      return "composition";
    case Attack::kEmphasis:
      return "emphasis";
    case Attack::kSimilarWord:
      return "similar word";
    case Attack::kSearched:
      return "searched words";
    case Attack::kLearned:
      break;
  }
  return "learned embedding";
}

}  // namespace lacuna
