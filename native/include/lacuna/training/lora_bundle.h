// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "lacuna/closed_form/text_entry.h"
#include "lacuna/files/safetensors_file.h"
#include "lacuna/host.h"
#include "lacuna/training/concept_lora.h"

namespace lacuna {

// Throws Error naming the concept: no LoRA, no statistics, tensors that do not fit each other, NaN,
// infinity, or numbers that no training gives.
void check(const ConceptLora& item);

// Throws Error: no concept, concepts of different width, phrases that break the rules of a
// ConceptSet (listed twice, both erased and preserved), a concept that fails check().
void check(const LoraBundle& bundle);

// What the LoRAs were trained on.
WeightIdentity model_of(const LoraBundle& bundle);
WeightIdentity encoder_of(const LoraBundle& bundle);

// Throws Error naming both: LoRAs of another base model or text encoder than these. The same
// weights in another type (fp16, bf16, fp8, fp32) are the same; an unknown fingerprint fits
// everything.
void check_weights(const LoraBundle& bundle, Denoiser& model, TextEncoder& encoder);

// Adds what a file of an earlier version does not say, where these are to the last bit the weights
// it was trained on.
void add_samples(LoraBundle& bundle, Denoiser& model, TextEncoder& encoder);

// check_weights(), and throws Error for LoRAs of another width, or for layers that the model does
// not have.
void check_fits(const LoraBundle& bundle, Denoiser& model, TextEncoder& encoder,
                const std::vector<TextEntry>& projections);

// The same concept with the same LoRA and statistics, bit for bit.
bool identical(const ConceptLora& a, const ConceptLora& b);

// The concepts and preserved phrases of all bundles, each once; the larger general prior wins.
// A phrase that one bundle erases and another preserves is erased. Throws Error: nothing to merge,
// bundles of different base models or text encoders, different LoRAs for one target.
LoraBundle merge(const std::vector<std::shared_ptr<const LoraBundle>>& bundles);

// The concepts and the preserve list as a value of the graph.
ConceptSet concept_set_of(const LoraBundle& bundle);

// `lacuna.bundle/1`: safetensors with string metadata. Statistics are stored as float32, symmetric
// ones as packed upper triangles; a checksum covers everything, because training takes hours and
// a damaged statistic would not be noticed. Written to a temporary name and renamed.
void save_bundle(const LoraBundle& bundle, const std::string& path);
// What save_bundle() writes; throws the Errors of check().
SafetensorsFile to_safetensors(const LoraBundle& bundle);
// Statistics come back as float32: half the memory for a hundred concepts, and all that was stored.
// Throws Error when the file is damaged or of another format.
LoraBundle load_bundle(const std::string& path);

}  // namespace lacuna
