// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace lacuna {

// Pairs the positions of a target prompt with those of the same prompt in which the phrase is
// replaced by the anchor (MACE, section 4.1 of the paper; the exact rule is the longest common
// prefix plus the longest common suffix of the token ids, then end-of-text and padding).
//
// Text encoders of the CLIP family are causal, so prefix positions carry identical embeddings in
// both prompts; every later position differs, padding included: the UNet reads it too.
struct TokenAlignment {
  // Equal length; target[k] is paired with anchor[k]. Replaced phrase positions are left out.
  std::vector<int64_t> target;
  std::vector<int64_t> anchor;
  int64_t prefix = 0;             // the first `prefix` pairs are identical by causality
  int64_t first_end_of_text = 0;  // index k of the pair of the two end-of-text tokens
};

// ids: start token, words, end token, no padding. `window` is the encoder's length (77).
// Both lists must fit the window.
TokenAlignment align_tokens(std::span<const int64_t> target_ids,
                            std::span<const int64_t> anchor_ids, int64_t window);

// Where a phrase of `phrase_tokens` tokens stands in a prompt whose text before it has
// `tokens_before` tokens (start token not counted): positions [begin, end).
struct TokenSpan {
  int64_t begin = 0;
  int64_t end = 0;
};

// Pairs phrase with phrase, last token with last token (where a causal encoder gathers the
// meaning); surplus leading target tokens go with the anchor's first token.
TokenAlignment align_phrases(TokenSpan target, TokenSpan anchor);

}  // namespace lacuna
