// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/erasure_patch.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/matmul.h>

#include "lacuna/error.h"
#include "lacuna/files/safetensors_file.h"

namespace lacuna {
namespace {
constexpr std::string_view kPatchFormat = "lacuna.patch/1";
constexpr std::string_view kB = ".b";
constexpr std::string_view kR = ".r";

// The patch as a host takes it.
struct PatchParts {
  TextMap map;
  std::vector<WeightDelta> deltas;
};

PatchParts parts_of(Denoiser& model, const std::vector<TextEntry>& projections,
                    const ErasurePatch& patch) {
  PatchParts parts;
  std::vector<TextEntry> mapped;
  for (const TextEntry& projection : projections) {
    if (patch.edits(projection)) mapped.push_back(projection);
    if (!patch.pairs.contains(projection.lora_name)) continue;
    const LowRankPair& pair = *pair_of(patch, projection, model.effective_weight(projection.name));
    parts.deltas.push_back({projection.name, pair.b.to(at::kFloat),
                            pair.r.to(at::kFloat).transpose(0, 1).contiguous()});
  }
  parts.map = text_map(patch.delta, mapped);
  return parts;
}
}  // namespace

bool ErasurePatch::edits(const TextEntry& projection) const {
  return matrices == EditedMatrices::kKeyAndValue || projection.role == EntryRole::kValue;
}

at::Tensor weight_change(const ErasurePatch& patch, const TextEntry& projection,
                         const at::Tensor& weight, double strength) {
  const auto type = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor w = weight.detach().to(type);
  const auto like = [&](const at::Tensor& t) { return t.to(w.device(), type); };
  at::Tensor change = patch.edits(projection) ? at::matmul(w, like(patch.delta)) : w.mul(0.0);
  if (auto it = patch.pairs.find(projection.lora_name); it != patch.pairs.end()) {
    change.addmm_(like(it->second.b), like(it->second.r).transpose(0, 1));
  }
  return change.mul_(strength);
}

const LowRankPair* pair_of(const ErasurePatch& patch, const TextEntry& projection,
                           const at::Tensor& weight) {
  const auto it = patch.pairs.find(projection.lora_name);
  if (it == patch.pairs.end()) return nullptr;
  const LowRankPair& pair = it->second;
  if (pair.b.size(0) != weight.size(0) || pair.r.size(0) != weight.size(1)) {
    throw Error("the LoRAs do not fit the model's weight '" + projection.name +
                "'; connect the model they were trained on");
  }
  return &pair;
}

TextMap text_map(const at::Tensor& delta, const std::vector<TextEntry>& projections) {
  TextMap map;
  map.out = delta.to(at::kFloat);
  map.entries = projections;
  return map;
}

std::shared_ptr<Denoiser> with_patch(Denoiser& model, const std::vector<TextEntry>& projections,
                                     const ErasurePatch& patch, double strength) {
  const PatchParts parts = parts_of(model, projections, patch);
  const auto edited = model.with_weight_maps({parts.map}, strength);
  return parts.deltas.empty() ? edited : edited->with_weight_deltas(parts.deltas, strength);
}

std::shared_ptr<Denoiser> with_gated_patch(Denoiser& model,
                                           const std::vector<TextEntry>& projections,
                                           const ErasurePatch& patch, double strength,
                                           const std::shared_ptr<const TextGate>& gate) {
  const PatchParts parts = parts_of(model, projections, patch);
  return model.with_input_maps({parts.map}, parts.deltas, strength, gate);
}

void save_patch(const ErasurePatch& patch, const std::string& path) {
  SafetensorsFile file;
  file.tensors["delta"] = patch.delta;
  for (const auto& [name, pair] : patch.pairs) {
    file.tensors[name + std::string(kB)] = pair.b;
    file.tensors[name + std::string(kR)] = pair.r;
  }
  file.metadata = patch.metadata;
  file.metadata["format"] = kPatchFormat;
  file.metadata["matrices"] = to_string(patch.matrices);
  save_safetensors(file, path);
}

ErasurePatch load_patch(const std::string& path) {
  SafetensorsFile file = load_safetensors(path);
  const auto fail = [&](const std::string& what) {
    return Error("'" + path + "' is not a Lacuna patch: " + what);
  };
  if (file.metadata["format"] != kPatchFormat) throw fail("its format is not lacuna.patch/1");
  ErasurePatch patch;
  patch.matrices = edited_matrices_from_string(file.metadata["matrices"]);
  file.metadata.erase("format");
  file.metadata.erase("matrices");
  patch.metadata = file.metadata;
  for (auto& [name, tensor] : file.tensors) {
    if (name == "delta") {
      if (tensor.dim() != 2 || tensor.size(0) != tensor.size(1)) throw fail("delta is not square");
      patch.delta = tensor.to(at::kDouble);
    } else if (tensor.dim() == 2 && name.ends_with(kB)) {
      patch.pairs[name.substr(0, name.size() - kB.size())].b = tensor;
    } else if (tensor.dim() == 2 && name.ends_with(kR)) {
      patch.pairs[name.substr(0, name.size() - kR.size())].r = tensor;
    } else {
      throw fail("unexpected tensor '" + name + "'");
    }
  }
  if (!patch.delta.defined()) throw fail("delta is missing");
  for (const auto& [name, pair] : patch.pairs) {
    if (!pair.b.defined() || !pair.r.defined() || pair.b.size(1) != pair.r.size(1) ||
        pair.r.size(0) != patch.delta.size(0)) {
      throw fail("the low-rank pair of '" + name + "' does not fit");
    }
  }
  return patch;
}

}  // namespace lacuna
