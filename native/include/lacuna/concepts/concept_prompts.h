// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/concepts/concept_set.h"
#include "lacuna/host.h"

namespace lacuna {

// The prompts that LoRA training shows of a concept: every template of its kind with every phrase.

// Which positions of a prompt carry the concept.
enum class TokenSet {
  kPhrase,            // the phrase's own tokens
  kPhraseAndPadding,  // those, end of text and padding (MACE)
};

std::string_view to_string(TokenSet tokens);
TokenSet token_set_from_string(std::string_view text);

struct ConceptPrompts {
  std::vector<std::string> texts;
  TextEmbedding embedding;  // of n prompts, on the CPU
  at::Tensor phrase;        // [n, window], 1 on the phrase's own positions, each time it occurs
  at::Tensor padding;       // [n, window], 1 on end of text and padding

  at::Tensor tokens(TokenSet set) const;  // [n, window]
};

ConceptPrompts encode_prompts(TextEncoder& encoder, const Concept& item, Progress& progress);

// Small enough that one call stays well under the two seconds between cancellation checks on a
// desktop CPU, large enough to fill a GPU.
inline constexpr size_t kPromptsPerCall = 4;

// Prompts in small batches, on the CPU, never as inference tensors.
TextEmbedding embed_in_batches(TextEncoder& encoder, const std::vector<std::string>& prompts,
                               Progress& progress);

// Every prompt up to its end of text, [tokens, width] float64 on the CPU. Padding, most of a
// window, is not computed where the host can do without.
std::vector<at::Tensor> encode_starts(TextEncoder& encoder, const std::vector<std::string>& prompts,
                                      Progress& progress);

// The prompts with these numbers, [n] int64.
TextEmbedding select(const TextEmbedding& text, const at::Tensor& rows);

}  // namespace lacuna
