// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "lacuna/host.h"

namespace lacuna {

// The entries with key and value roles.
std::vector<TextEntry> cross_attention(Denoiser& model);

// The columns of the entry's effective weight that read its stream, [out, d].
at::Tensor entry_weight(Denoiser& model, const TextEntry& entry);

// "...attn2" for "...attn2.to_k.weight" and "...attn2.to_v.weight".
std::string layer_of(const TextEntry& projection);

// Which of the two projections of a cross-attention layer an edit touches.
enum class EditedMatrices { kKeyAndValue, kValueOnly };

std::string_view to_string(EditedMatrices matrices);
EditedMatrices edited_matrices_from_string(std::string_view text);

// The cross-attention entries of `model` that an edit touches, after these checks, each an Error:
// no text cross-attention (names the family and what works), a text encoder of another width.
std::vector<TextEntry> edited_entries(Denoiser& model, EditedMatrices matrices, int64_t text_width);

// The entries of `model` that read its pooled text vector; none where it has none.
std::vector<TextEntry> pooled_entries(Denoiser& model);

// A, [p, d] float32 CPU, with A^T A = K, or for models with many rows a random projection of them
// (each row added to one of p, with a random sign; fixed seed) for which A^T A is K on average:
// norms of edits come out within about 2 %. Reads every weight once. Throws like entry_gram.
at::Tensor entry_rows(Denoiser& model, const std::vector<TextEntry>& projections,
                      Progress& progress);

// K = sum over projections of W^T W, [d, d] float64 CPU: the metric that tells how much a direction
// of the text embedding matters to the model. Throws Error naming the layer when a weight has NaN
// or infinity.
at::Tensor entry_gram(Denoiser& model, const std::vector<TextEntry>& projections,
                      Progress& progress);

}  // namespace lacuna
