// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lacuna/closed_form/text_entry.h"
#include "lacuna/host.h"

namespace lacuna {

// Low-rank addition to one projection: W + b r^T.
struct LowRankPair {
  at::Tensor b;  // [out, k]
  at::Tensor r;  // [d, k]
};

// A whole edit in a form that does not depend on the number of layers: W* = W N + b r^T, with one
// N for all edited projections and at most one low-rank pair for each. Linear in strength:
// W + strength (W* - W).
struct ErasurePatch {
  at::Tensor delta;  // N - I, [d, d] float64 CPU
  EditedMatrices matrices = EditedMatrices::kKeyAndValue;
  std::map<std::string, LowRankPair> pairs;     // by lora_name, the same in every host
  std::map<std::string, std::string> metadata;  // strings: concepts, method, hashes

  bool edits(const TextEntry& projection) const;
};

// The pair of a projection that has one, else null. Throws Error when it does not fit the weight,
// [out, d].
const LowRankPair* pair_of(const ErasurePatch& patch, const TextEntry& projection,
                           const at::Tensor& weight);

// strength (W* - W) for one projection, [out, d], float32 or float64 as `weight`, on its device.
at::Tensor weight_change(const ErasurePatch& patch, const TextEntry& projection,
                         const at::Tensor& weight, double strength = 1.0);

// delta as the map that all of `projections` share.
TextMap text_map(const at::Tensor& delta, const std::vector<TextEntry>& projections);

// `model` with the patch on the weights of `projections`. Throws Error naming the weight that a
// low-rank pair does not fit.
std::shared_ptr<Denoiser> with_patch(Denoiser& model, const std::vector<TextEntry>& projections,
                                     const ErasurePatch& patch, double strength);
// The same edit where the gate opens, made while the model runs. Throws Error as with_patch.
std::shared_ptr<Denoiser> with_gated_patch(Denoiser& model,
                                           const std::vector<TextEntry>& projections,
                                           const ErasurePatch& patch, double strength,
                                           const std::shared_ptr<const TextGate>& gate);

// `*.safetensors` with metadata "format": "lacuna.patch/1". Written to a temporary name and
// renamed.
void save_patch(const ErasurePatch& patch, const std::string& path);
// Throws Error when the file is damaged or of another format.
ErasurePatch load_patch(const std::string& path);

}  // namespace lacuna
