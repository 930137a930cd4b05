// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/closed_form/statistics_cache.h"
#include "lacuna/concepts/concept_set.h"
#include "lacuna/host.h"

namespace lacuna {

// The retain set: what nobody listed must live, too. Words of the text encoder's own vocabulary,
// put into what the targets share ("{}", "flag of {}"), are kept like preserved phrases, so that
// the directions that the targets have in common with them stay pinned. Words that the encoder
// takes for a target (synonyms, plurals, spellings: ConceptRecognizer) are left out, or they would
// keep alive what is to go.

enum class RetainSetSize { kNone, kSmall, kFull };  // 0, 200 and 2,000 words
std::string_view to_string(RetainSetSize size);
RetainSetSize retain_set_from_string(std::string_view text);

// What to keep of what was asked for: nothing where a style is erased. A style stands behind any
// word, and what pins those words pins it, too: of 20 pictures in two styles of the demo model the
// set left 12 in theirs, a tenth of its weight 8, a hundredth 4, none of it 1 (styles2,
// regularization 1, preserve weight 10, seed 1).
RetainSetSize retained_size(RetainSetSize asked, const std::vector<Concept>& concepts);

inline constexpr int64_t kRetainPrompts = 3;

// What text encoder and templates make of phrases, for telling concepts from them.
struct PhraseRows {
  std::vector<std::string> phrases;
  std::vector<std::string> prompts;  // kRetainPrompts of each phrase
  std::vector<std::string> before;   // what stands before the phrase in each of them
  at::Tensor last;  // [n, d] float64: last row of the window, mean over the plain templates
  // [n, kRetainPrompts, sampled_positions().size(), d] float16: alone, in a photo, and beside
  // others
  at::Tensor rows;
};
// Rows of a window that are kept of every prompt: its beginning, and some of the padding, each with
// the row before.
std::vector<int64_t> sampled_positions(int64_t window);

struct RetainSet {
  // Sum over words and frames of the mean over prompts of sum_positions e e^T, [d, d] float64 CPU,
  // the padding by samples of it, frames but "{}" with a small weight; of more than 250 phrases, as
  // much as 250. Undefined for kNone. Without prompts in which a target stands beside the phrase.
  at::Tensor gram;
  PhraseRows kept;
  int64_t words = 0;                    // phrases that are kept
  std::vector<std::string> vocabulary;  // the words themselves
  std::vector<std::string> frames;      // with a slot "{}"
  std::vector<std::string> left_out;    // phrases that the encoder takes for a target
};

// "{}", and what targets of several words are made of with a slot in it: "flag of {}" for "flag of
// norway", "{} style" for a style; of many targets what a fifth of them share.
std::vector<std::string> shared_frames(const std::vector<Concept>& concepts);

// Phrases in the retain set's prompts; companions: words to stand beside them; cache: may be null.
PhraseRows read_phrase_rows(TextEncoder& encoder, const std::vector<std::string>& phrases,
                            const std::vector<std::string>& companions, Progress& progress,
                            StatisticsCache* cache = nullptr);

// Every prompt is encoded once per encoder, frame and size: kept in encoder.cache_directory() under
// the encoder's fingerprint, with a checksum. Throws Error when the encoder tells no vocabulary.
// cache: may be null.
RetainSet collect_retain_set(TextEncoder& encoder, const std::vector<Concept>& concepts,
                             RetainSetSize size, Progress& progress,
                             StatisticsCache* cache = nullptr);

}  // namespace lacuna
