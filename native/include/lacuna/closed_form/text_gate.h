// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "lacuna/closed_form/retain_set.h"
#include "lacuna/closed_form/statistics_cache.h"
#include "lacuna/concepts/concept_set.h"
#include "lacuna/host.h"

namespace lacuna {

// An edit that acts only where a prompt names a concept. No linear map of the text can erase five
// flags and leave the others alone; a test of each prompt can, and every other prompt is then read
// by the unedited model. Told from the embedding alone, in two ways:
//   - the last row of a window, which has read the whole prompt (ConceptRecognizer): what a prompt
//     is about, in whatever words;
//   - every row with the one before it: the last token of the phrase itself, whatever else the
//     prompt says. With u = [row, row before], w = (S_in + S_out / 2 + e I)^-1 (mean of the
//     phrase's tokens - mean of other tokens): S_in of the phrase's tokens in different prompts,
//     S_out of the tokens of retained words.
// Thresholds lie midway between a concept's own prompts and what must stay.

struct FittedGate {
  std::shared_ptr<const TextGate> gate;
  // "'a' from 'b'": what the gate cannot tell apart, so that prompts that name b are edited, too.
  std::vector<std::string> confused;
};

// retained: of collect_retain_set for the same concepts; preserve: phrases that must stay, too;
// cache: may be null; after collect_problem with the same cache half of the prompts are known.
// Words to tell the concepts from are needed in any case: where nothing is retained (a style, or
// none asked for) a set of that size is read, the small one at least.
FittedGate fit_gate(TextEncoder& encoder, const std::vector<Concept>& concepts,
                    const std::vector<PreservedPhrase>& preserve, const RetainSet& retained,
                    RetainSetSize asked, Progress& progress, StatisticsCache* cache);
FittedGate fit_gate(TextEncoder& encoder, const std::vector<Concept>& concepts,
                    const std::vector<PreservedPhrase>& preserve, const RetainSet& retained,
                    Progress& progress, StatisticsCache* cache = nullptr);

// [n]: whether the gate opens for each of n prompts; context: [n, windows * window, d]. What hosts
// do while the model runs.
at::Tensor opens(const TextGate& gate, const at::Tensor& context);

}  // namespace lacuna
