// SPDX-License-Identifier: Apache-2.0
#include "lacuna/training/lora_bundle.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "lacuna/error.h"
#include "lacuna/files/checksum.h"
#include "lacuna/files/json_text.h"
#include "lacuna/files/safetensors_file.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

using nlohmann::json;

constexpr std::string_view kBundleFormat = "lacuna.bundle/1";
constexpr int64_t kMaxWidth = 16'384;
// Statistics are sums of squared embeddings, up to some 1e6, and LoRAs are far below that: what is
// larger comes from no training, and products of it leave the range of floating point.
constexpr double kLargestValue = 1e10;

bool is_float_matrix(const at::Tensor& t, int64_t rows, int64_t columns) {
  return t.defined() && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble) &&
         t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
}

bool same(const at::Tensor& a, const at::Tensor& b) {
  if (a.defined() != b.defined()) return false;
  if (!a.defined()) return true;
  return a.scalar_type() == b.scalar_type() && at::equal(a, b);
}

// The statistics by the name they have in a file.
struct Statistic {
  std::string_view name;
  at::Tensor ConceptLora::* member;
  bool symmetric;
};
constexpr std::array<Statistic, 3> kStatistics{{
    {"prompt_gram", &ConceptLora::prompt_gram, true},
    {"refinement_gram", &ConceptLora::refinement_gram, true},
    {"refinement_shift", &ConceptLora::refinement_shift, false},
}};

// Rows of the upper triangle, one after the other.
at::Tensor pack(const at::Tensor& symmetric) {
  const at::Tensor m = symmetric.to(at::kCPU, at::kFloat).contiguous();
  const int64_t d = m.size(0);
  at::Tensor packed = at::empty({d * (d + 1) / 2}, m.options());
  const float* from = m.const_data_ptr<float>();
  float* to = packed.mutable_data_ptr<float>();
  for (int64_t i = 0; i < d; ++i) to = std::copy(from + i * d + i, from + (i + 1) * d, to);
  return packed;
}

at::Tensor unpack(const at::Tensor& packed, int64_t d) {
  at::Tensor m = at::empty({d, d}, packed.options());
  const float* from = packed.const_data_ptr<float>();
  float* to = m.mutable_data_ptr<float>();
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = i; j < d; ++j) to[i * d + j] = to[j * d + i] = *from++;
  }
  return m;
}

std::string prefix_of(size_t index) { return "concept." + std::to_string(index) + "."; }

}  // namespace

void check(const ConceptLora& item) {
  const auto fail = [&](const std::string& what) {
    return Error(in_quotes(item.item.target) + " " + what + "; train it again with LoRA Erase");
  };
  if (item.pairs.empty()) throw fail("has no LoRA");
  if (!item.prompt_gram.defined() || item.prompt_gram.dim() != 2) throw fail("has no statistics");
  const int64_t d = item.prompt_gram.size(0);
  const auto check_values = [&](const at::Tensor& t, const std::string& where) {
    const double largest = t.numel() == 0 ? 0.0 : t.abs().max().item<double>();
    if (!std::isfinite(largest)) throw fail("has NaN or infinity in its " + where);
    if (largest > kLargestValue) {
      throw fail(format_numbers("has values up to %.2g in its ", largest) + where +
                 ", which no training gives");
    }
  };
  for (const Statistic& statistic : kStatistics) {
    const at::Tensor& matrix = item.*statistic.member;
    if (!matrix.defined() && statistic.name != "prompt_gram") continue;
    if (!is_float_matrix(matrix, d, d)) {
      throw fail("has statistics that do not fit each other (" + std::string(statistic.name) + ")");
    }
    check_values(matrix, "statistics (" + std::string(statistic.name) + ")");
  }
  if (item.refinement_gram.defined() != item.refinement_shift.defined()) {
    throw fail("has only half of its refinement statistics");
  }
  for (const auto& [name, pair] : item.pairs) {
    const bool fits = pair.up.defined() && pair.down.defined() && pair.up.dim() == 2 &&
                      is_float_matrix(pair.up, pair.up.size(0), pair.up.size(1)) &&
                      is_float_matrix(pair.down, pair.up.size(1), d);
    if (!fits) throw fail("has a LoRA that does not fit its statistics (" + name + ")");
    check_values(pair.up, "LoRA (" + name + ")");
    check_values(pair.down, "LoRA (" + name + ")");
  }
}

void check(const LoraBundle& bundle) {
  if (bundle.concepts.empty()) throw Error("the LoRAs hold no concept; train some with LoRA Erase");
  validate(concept_set_of(bundle));
  for (const auto& item : bundle.concepts) {
    check(*item);
    if (item->prompt_gram.size(0) != bundle.concepts.front()->prompt_gram.size(0)) {
      throw Error("the LoRAs of " + in_quotes(item->item.target) + " and " +
                  in_quotes(bundle.concepts.front()->item.target) +
                  " belong to text encoders of different width");
    }
  }
}

WeightIdentity model_of(const LoraBundle& bundle) {
  return {bundle.model_fingerprint, bundle.model_samples};
}

WeightIdentity encoder_of(const LoraBundle& bundle) {
  return {bundle.encoder_fingerprint, bundle.encoder_samples};
}

void check_weights(const LoraBundle& bundle, Denoiser& model, TextEncoder& encoder) {
  const auto check_pair = [](const WeightIdentity& trained, const WeightIdentity& connected,
                             const std::string& another, const std::string& to_do) {
    const WeightComparison how = compare(trained, connected);
    if (how.match == WeightMatch::kSame) return;
    const std::string names = " (" + describe(trained, connected, how) + ")";
    if (how.match != WeightMatch::kUnknownType) {
      throw Error("these LoRAs were trained " + another + names + "; " + to_do);
    }
    throw Error("these LoRAs were trained " + another + names +
                ", or on the same in another weight type: they come from a version of Lacuna that "
                "could not tell; load the file they were trained on in the type it had then, and "
                "save them once more behind LoRA Fuse: after that they fit every weight type");
  };
  check_pair(model_of(bundle), identity_of(model), "on another base model than the one connected",
             "load the checkpoint they were trained on, or train them again on this one");
  check_pair(encoder_of(bundle), identity_of(encoder),
             "with another text encoder than the CLIP connected",
             "connect the CLIP of the checkpoint they were trained on, or train them again with "
             "this one");
}

void add_samples(LoraBundle& bundle, Denoiser& model, TextEncoder& encoder) {
  if (bundle.model_samples.empty() && bundle.model_fingerprint == model.fingerprint()) {
    bundle.model_samples = model.weight_samples();
  }
  if (bundle.encoder_samples.empty() && bundle.encoder_fingerprint == encoder.fingerprint()) {
    bundle.encoder_samples = encoder.weight_samples();
  }
}

void check_fits(const LoraBundle& bundle, Denoiser& model, TextEncoder& encoder,
                const std::vector<TextEntry>& projections) {
  check_weights(bundle, model, encoder);
  std::set<std::string> known;
  for (const TextEntry& projection : projections) known.insert(projection.lora_name);
  for (const auto& item : bundle.concepts) {
    if (item->prompt_gram.size(0) != encoder.width()) {
      throw Error("the LoRA of " + in_quotes(item->item.target) +
                  " belongs to a text encoder of width " +
                  std::to_string(item->prompt_gram.size(0)) + ", the CLIP connected has " +
                  std::to_string(encoder.width()) + "; connect the right one");
    }
    for (const auto& [name, pair] : item->pairs) {
      if (!known.contains(name)) {
        throw Error("the LoRA of " + in_quotes(item->item.target) + " has a layer '" + name +
                    "' that this model (" + model.family() +
                    ") does not have; connect the model it was trained on");
      }
    }
  }
}

bool identical(const ConceptLora& a, const ConceptLora& b) {
  if (&a == &b) return true;
  if (!(a.item == b.item) || a.pairs.size() != b.pairs.size()) return false;
  for (const Statistic& statistic : kStatistics) {
    if (!same(a.*statistic.member, b.*statistic.member)) return false;
  }
  return std::equal(a.pairs.begin(), a.pairs.end(), b.pairs.begin(), [](auto& x, auto& y) {
    return x.first == y.first && same(x.second.up, y.second.up) &&
           same(x.second.down, y.second.down);
  });
}

LoraBundle merge(const std::vector<std::shared_ptr<const LoraBundle>>& bundles) {
  LoraBundle merged;
  merged.general_prior = GeneralPriorSize::kNone;
  std::map<std::string, std::shared_ptr<const ConceptLora>> targets;
  std::set<std::string> erased;
  const auto take_identity = [](std::string& fingerprint, WeightSamples& samples,
                                const WeightIdentity& next, const char* what) {
    const WeightIdentity known{fingerprint, samples};
    if (const WeightComparison how = compare(known, next); how.match != WeightMatch::kSame) {
      throw Error(std::string("these LoRAs cannot be fused: they were trained on different ") +
                  what + " (" + describe(known, next, how) +
                  "); fuse only LoRAs made with one checkpoint");
    }
    // Of two files of one model, the one that says more about it.
    if (known.fingerprint.empty() || (known.samples.empty() && !next.samples.empty())) {
      fingerprint = next.fingerprint;
      samples = next.samples;
    }
  };
  for (const auto& bundle : bundles) {
    if (bundle->concepts.empty()) {
      throw Error("one of the LoRAs inputs holds no concept; train some with LoRA Erase");
    }
    take_identity(merged.model_fingerprint, merged.model_samples, model_of(*bundle), "base models");
    take_identity(merged.encoder_fingerprint, merged.encoder_samples, encoder_of(*bundle),
                  "text encoders");
    merged.general_prior = std::max(merged.general_prior, bundle->general_prior);
    for (const auto& item : bundle->concepts) {
      const auto [it, added] = targets.emplace(fold_case(item->item.target), item);
      if (added) {
        merged.concepts.push_back(item);
        for (const std::string& phrase : phrases(item->item)) erased.insert(fold_case(phrase));
      } else if (!identical(*it->second, *item)) {
        throw Error(in_quotes(item->item.target) +
                    " comes with two different LoRAs; remove it from one of the inputs");
      }
    }
  }
  if (merged.concepts.empty()) throw Error("there is no LoRA to fuse");
  std::set<std::string> preserved;
  for (const auto& bundle : bundles) {
    for (const PreservedPhrase& item : bundle->preserve) {
      const std::string key = fold_case(item.phrase);
      if (!erased.contains(key) && preserved.insert(key).second) merged.preserve.push_back(item);
    }
  }
  return merged;
}

ConceptSet concept_set_of(const LoraBundle& bundle) {
  ConceptSet set;
  for (const auto& item : bundle.concepts) set.concepts.push_back(item->item);
  set.preserve = bundle.preserve;
  set.general_prior = bundle.general_prior;
  return set;
}

SafetensorsFile to_safetensors(const LoraBundle& bundle) {
  check(bundle);
  SafetensorsFile file;
  json training = json::array();
  for (size_t i = 0; i < bundle.concepts.size(); ++i) {
    const ConceptLora& item = *bundle.concepts[i];
    const std::string prefix = prefix_of(i);
    for (const Statistic& statistic : kStatistics) {
      const at::Tensor& matrix = item.*statistic.member;
      if (!matrix.defined()) continue;
      file.tensors[prefix + std::string(statistic.name)] =
          statistic.symmetric ? pack(matrix) : matrix.to(at::kCPU, at::kFloat).contiguous();
    }
    for (const auto& [name, pair] : item.pairs) {
      file.tensors[prefix + "lora." + name + ".up"] = pair.up.to(at::kCPU, at::kFloat).contiguous();
      file.tensors[prefix + "lora." + name + ".down"] =
          pair.down.to(at::kCPU, at::kFloat).contiguous();
    }
    training.push_back(item.training);
  }
  file.metadata["format"] = kBundleFormat;
  file.metadata["width"] = std::to_string(bundle.concepts.front()->prompt_gram.size(0));
  file.metadata["concepts"] = to_json(concept_set_of(bundle));
  try {
    file.metadata["training"] = training.dump();
  } catch (const json::exception&) {
    throw Error("the LoRAs cannot be saved: a training record is not valid UTF-8 text");
  }
  file.metadata["model_fingerprint"] = bundle.model_fingerprint;
  file.metadata["encoder_fingerprint"] = bundle.encoder_fingerprint;
  if (!bundle.model_samples.empty()) {
    file.metadata["model_samples"] = to_text(bundle.model_samples);
  }
  if (!bundle.encoder_samples.empty()) {
    file.metadata["encoder_samples"] = to_text(bundle.encoder_samples);
  }
  file.metadata["checksum"] = checksum_of(file);
  return file;
}

void save_bundle(const LoraBundle& bundle, const std::string& path) {
  save_safetensors(to_safetensors(bundle), path);
}

LoraBundle load_bundle(const std::string& path) {
  SafetensorsFile file = load_safetensors(path);
  const auto fail = [&](const std::string& what) {
    return Error("'" + path + "' is not a readable Lacuna bundle: " + what);
  };
  const auto meta = [&](const char* key) -> const std::string& {
    const auto it = file.metadata.find(key);
    if (it == file.metadata.end()) throw fail("its '" + std::string(key) + "' is missing");
    return it->second;
  };
  if (const auto it = file.metadata.find("format");
      it == file.metadata.end() || it->second != kBundleFormat) {
    throw fail("its format is not lacuna.bundle/1; a LoRA file cannot be fused, only a bundle");
  }
  if (meta("checksum") != checksum_of(file)) {
    throw fail("its checksum does not match, so it is damaged; copy or download it again");
  }
  const std::string& width_text = meta("width");
  int64_t d = 0;
  for (const char c : width_text) {
    if (c < '0' || c > '9' || d > kMaxWidth) throw fail("its width is not a number");
    d = 10 * d + (c - '0');
  }
  if (d < 1 || d > kMaxWidth) throw fail("its width is out of range");

  LoraBundle bundle;
  const ConceptSet set = concept_set_from_json(meta("concepts"));
  bundle.preserve = set.preserve;
  bundle.general_prior = set.general_prior;
  bundle.model_fingerprint = meta("model_fingerprint");
  bundle.encoder_fingerprint = meta("encoder_fingerprint");
  for (const auto& [key, samples] : {std::pair{"model_samples", &bundle.model_samples},
                                     std::pair{"encoder_samples", &bundle.encoder_samples}}) {
    const auto it = file.metadata.find(key);
    if (it == file.metadata.end()) continue;  // an earlier version's
    try {
      *samples = weight_samples_from_text(it->second);
    } catch (const Error& e) {
      throw fail(e.what());
    }
  }
  const json training =
      parse_json(meta("training"), "'" + path + "' is not a readable Lacuna bundle: its training",
                 {.depth = 2, .values = 20'000});
  if (!training.is_array() || training.size() != set.concepts.size()) {
    throw fail("its training records do not fit its concepts");
  }

  size_t used = 0;
  // Moved out of `file`, so that a large bundle is not held twice.
  const auto take = [&](const std::string& name, int64_t rows, int64_t columns) {
    const auto it = file.tensors.find(name);
    if (it == file.tensors.end()) return at::Tensor();
    at::Tensor tensor = std::move(it->second);
    ++used;
    const bool fits =
        tensor.scalar_type() == at::kFloat &&
        (columns < 0 ? tensor.dim() == 1 && tensor.size(0) == rows
                     : tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns);
    if (!fits) throw fail("tensor '" + name + "' has a wrong type or shape");
    return tensor;
  };
  for (size_t i = 0; i < set.concepts.size(); ++i) {
    auto item = std::make_shared<ConceptLora>();
    item->item = set.concepts[i];
    if (!training[i].is_string()) throw fail("a training record is not text");
    item->training = training[i].get<std::string>();
    const std::string prefix = prefix_of(i);
    for (const Statistic& statistic : kStatistics) {
      at::Tensor tensor = statistic.symmetric
                              ? take(prefix + std::string(statistic.name), d * (d + 1) / 2, -1)
                              : take(prefix + std::string(statistic.name), d, d);
      if (!tensor.defined()) continue;
      (*item).*statistic.member = statistic.symmetric ? unpack(tensor, d) : tensor;
    }
    const std::string lora = prefix + "lora.";
    for (auto it = file.tensors.lower_bound(lora);
         it != file.tensors.end() && it->first.starts_with(lora); ++it) {
      if (!it->first.ends_with(".up") || !it->second.defined()) continue;
      const std::string name =
          it->first.substr(lora.size(), it->first.size() - lora.size() - std::strlen(".up"));
      if (it->second.dim() != 2) throw fail("tensor '" + it->first + "' has a wrong shape");
      LoraPair pair;
      pair.up = take(it->first, it->second.size(0), it->second.size(1));
      pair.down = take(lora + name + ".down", pair.up.size(1), d);
      if (!pair.down.defined()) throw fail("'" + lora + name + ".down' is missing");
      item->pairs[name] = std::move(pair);
    }
    bundle.concepts.push_back(std::move(item));
  }
  if (used != file.tensors.size()) throw fail("it holds tensors that belong to no concept");
  try {
    check(bundle);
  } catch (const Error& e) {
    throw fail(e.what());
  }
  return bundle;
}

}  // namespace lacuna
