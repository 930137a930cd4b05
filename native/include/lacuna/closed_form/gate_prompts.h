// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <string>
#include <vector>

#include "lacuna/closed_form/statistics_cache.h"
#include "lacuna/concepts/concept_set.h"
#include "lacuna/host.h"

namespace lacuna {

// Prompts that name a concept, from which a gate learns to tell them from all others: in the
// concept's own templates, beside other words, and behind many of them.

// What the text encoder makes of one phrase in them.
struct NamedPhrase {
  std::string phrase;
  size_t item;        // number of its concept
  at::Tensor tokens;  // [prompts, 2 d] float32: the phrase's last token, with the one before
  at::Tensor ends;    // [min(templates, kPromptEnds), d] float32: last row of the window, alone
};

// Every phrase of every concept. words: of the encoder's vocabulary, two at least, to stand beside
// the phrase; which ones depends on the phrase alone. cache: may be null.
std::vector<NamedPhrase> read_named_phrases(TextEncoder& encoder,
                                            const std::vector<Concept>& concepts,
                                            const std::vector<std::string>& words,
                                            StatisticsCache* cache, Progress& progress);

}  // namespace lacuna
