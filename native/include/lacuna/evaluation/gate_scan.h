// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lacuna/concepts/concept_set.h"
#include "lacuna/evaluation/confidence.h"
#include "lacuna/host.h"

namespace lacuna {

// Where an edit acts that acts on prompts that name a concept (TextGate), told from the text alone,
// before any picture is drawn: which prompts it misses, and which others it touches. The prompts
// are none of those that a gate is fitted on.

struct GateCount {
  std::string form;                // which prompts
  Count acted;                     // on so many of them
  std::vector<std::string> wrong;  // prompts that it missed, or should have left alone
};

struct ConceptGate {
  std::string target;
  std::vector<GateCount> named;  // "alone", "synonyms", "beside other things", "in long prompts"
  GateCount disguised;           // typos, parted words, descriptions: attacks on the gate
};

struct GateScan {
  bool gated = false;  // false: no such edit is on the model, and the rest is empty
  std::vector<ConceptGate> concepts;
  // "preserved", "similar words that nobody listed", "other words in what the concepts share"
  // ("flag of ..."), "unrelated captions"
  std::vector<GateCount> others;

  // Over all concepts: prompts that say the phrase, however many other words stand around it.
  Count named() const;
  Count disguised() const;
};

// neighbours: words that nobody listed. Encodes about 40 prompts for each concept (four for each of
// more than 16) and a hundred others.
GateScan scan_gate(Denoiser& edited, TextEncoder& encoder, const ConceptSet& set,
                   const std::vector<std::string>& neighbours, Progress& progress);

}  // namespace lacuna
