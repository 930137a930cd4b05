// SPDX-License-Identifier: Apache-2.0
#include "lacuna/training/fusion.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "lacuna/closed_form/spd_solver.h"
#include "lacuna/error.h"
#include "lacuna/files/option_range.h"
#include "lacuna/files/text.h"
#include "lacuna/training/lora_bundle.h"

namespace lacuna {
namespace {

// Right-hand sides solved at once: bounds memory, and the time between cancellation checks.
constexpr int64_t kColumnsPerSolve = 1024;
// The largest float16, the type of most weights and of exported LoRAs.
constexpr double kLargestChange = 65504.0;

std::string known_targets(const std::vector<std::string>& targets) {
  constexpr size_t kShown = 20;
  std::string text;
  for (size_t i = 0; i < targets.size() && i < kShown; ++i) {
    text += (i == 0 ? "" : ", ") + targets[i];
  }
  if (targets.size() > kShown) text += " and " + std::to_string(targets.size() - kShown) + " more";
  return text;
}

Error unknown_target(const std::string& name, const std::vector<std::string>& targets) {
  return Error("'" + name + "' is not among the LoRAs; they hold: " + known_targets(targets));
}

at::Tensor as_double(const at::Tensor& t) { return t.to(at::kCPU, at::kDouble); }

// sum += scale * term, for a float32 or float64 term.
void add_scaled(at::Tensor& sum, const at::Tensor& term, double scale) {
  sum.add_(as_double(term), scale);
}

double largest_of(const at::Tensor& t) {
  return t.numel() == 0 ? 0.0 : t.abs().max().item<double>();
}

Error beyond_all_weights(const std::string& target, const std::string& what) {
  return Error("the LoRA of '" + target + "' would change " + what +
               " beyond what a model's number type can hold; leave the concept out, or train it "
               "again with LoRA Erase");
}

at::Tensor images_of(const ConceptLora& item) {
  std::vector<at::Tensor> downs;
  for (const auto& [name, pair] : item.pairs) downs.push_back(as_double(pair.down));
  return at::matmul(as_double(item.prompt_gram), at::cat(downs).transpose(0, 1));
}

}  // namespace

std::string_view to_string(FusionMode mode) {
  return mode == FusionMode::kJoint ? "joint" : "independent";
}

FusionMode fusion_mode_from_string(std::string_view text) {
  if (text == "independent") return FusionMode::kIndependent;
  if (text == "joint") return FusionMode::kJoint;
  throw Error("unknown mode '" + std::string(text) + "'; use one of: independent, joint");
}

void check(const FusionOptions& options) {
  check_range(options.regularization, 0, 1e9, "regularization");
  check_range(options.preserve_weight, 0, 1e9, "preserve_weight");
  check_range(options.prior_weight, 0, 1e9, "prior_weight");
}

void FusionSums::add(std::shared_ptr<const ConceptLora> item) {
  const std::string key = fold_case(item->item.target);
  if (const auto it = entries_.find(key); it != entries_.end()) {
    if (identical(*it->second.item, *item)) return;
    throw Error("'" + item->item.target +
                "' comes with two different LoRAs; remove it from one of the inputs");
  }
  lacuna::check(*item);
  if (!entries_.empty()) {
    const ConceptLora& first = *entries_.begin()->second.item;
    if (first.prompt_gram.size(0) != item->prompt_gram.size(0)) {
      throw Error("the LoRAs of '" + item->item.target + "' and '" + first.item.target +
                  "' belong to text encoders of different width");
    }
  }
  entries_.emplace(key, Entry{std::move(item), {}});
  prompt_gram_.reset();
}

void FusionSums::remove(const std::string& target) {
  if (entries_.erase(fold_case(target)) == 0) throw unknown_target(target, targets());
  prompt_gram_.reset();
}

void FusionSums::assign(const std::vector<std::shared_ptr<const ConceptLora>>& items) {
  std::set<const ConceptLora*> wanted;
  for (const auto& item : items) wanted.insert(item.get());
  const size_t dropped = std::erase_if(
      entries_, [&](const auto& entry) { return !wanted.contains(entry.second.item.get()); });
  if (dropped > 0) prompt_gram_.reset();
  for (const auto& item : items) add(item);
}

std::vector<std::string> FusionSums::targets() const {
  std::vector<std::string> list;
  for (const auto& [key, entry] : entries_) list.push_back(entry.item->item.target);
  return list;
}

Fusion FusionSums::solve(const KeptText& kept, const FusionOptions& options,
                         const ConceptStrengths& strengths, Progress& progress) {
  lacuna::check(options);
  if (entries_.empty()) throw Error("there is no LoRA to fuse");
  std::map<std::string, double> strength_of;  // by folded target
  for (const auto& [name, strength] : strengths) {
    const std::string key = fold_case(name);
    if (!entries_.contains(key)) throw unknown_target(name, targets());
    strength_of[key] = strength;
  }
  const auto strength = [&](const std::string& key) {
    const auto it = strength_of.find(key);
    return it == strength_of.end() ? 1.0 : it->second;
  };
  const bool joint = options.mode == FusionMode::kJoint;
  if (joint) {
    std::string with;
    std::string without;
    for (const auto& [key, entry] : entries_) {
      (entry.item->refinement_shift.defined() ? with : without) = entry.item->item.target;
    }
    if (!with.empty() && !without.empty()) {
      throw Error(
          "mode 'joint' needs LoRAs that were all trained with a refinement or all without: '" +
          with + "' was, '" + without + "' was not; use mode 'independent'");
    }
  }

  const int64_t d = entries_.begin()->second.item->prompt_gram.size(0);
  const auto zeros = [&] { return at::zeros({d, d}, at::kDouble); };
  if (!prompt_gram_.defined()) {
    at::Tensor sum = zeros();
    for (const auto& [key, entry] : entries_) {
      progress.check();
      add_scaled(sum, entry.item->prompt_gram, 1.0);
    }
    prompt_gram_ = sum;
  }
  at::Tensor kept_sum = zeros();
  if (kept.preserve.defined()) add_scaled(kept_sum, kept.preserve, options.preserve_weight);
  if (kept.prior.defined()) add_scaled(kept_sum, kept.prior, options.prior_weight);
  if (kept.retain.defined()) add_scaled(kept_sum, kept.retain, 1.0);
  kept_sum.diagonal().add_(options.regularization);

  at::Tensor shift = zeros();  // (N - I) H
  at::Tensor refined = zeros();
  bool any_shift = false;
  for (const auto& [key, entry] : entries_) {
    progress.check();
    const ConceptLora& item = *entry.item;
    if (!item.refinement_shift.defined()) continue;
    any_shift = true;
    add_scaled(shift, item.refinement_shift, strength(key));
    if (joint) add_scaled(refined, item.refinement_gram, 1.0);
  }
  if (joint && any_shift) {
    const at::Tensor map_delta = SpdSolver(refined + kept_sum, kNoiseFloor).solve_right(shift);
    at::Tensor anchored = prompt_gram_.clone();
    anchored.diagonal().add_(options.regularization);
    shift = at::matmul(map_delta, anchored);
  }
  progress.check();
  const SpdSolver solver(prompt_gram_ + kept_sum, kNoiseFloor);

  Fusion result;
  result.condition = solver.condition();
  result.floor_added = solver.floor_added();
  result.patch.delta = any_shift ? solver.solve_right(shift) : shift;
  if (!(largest_of(result.patch.delta) <= kLargestChange)) {
    const auto most =
        std::max_element(entries_.begin(), entries_.end(), [&](const auto& a, const auto& b) {
          const auto size = [&](const auto& entry) {
            const at::Tensor& moved = entry.second.item->refinement_shift;
            return moved.defined() ? strength(entry.first) * largest_of(moved) : 0.0;
          };
          return size(a) < size(b);
        });
    throw beyond_all_weights(most->second.item->item.target, "the text embedding");
  }

  // Columns of all concepts are solved together, block by block, and dealt out to the projections.
  int64_t columns = 0;
  std::map<std::string, int64_t> ranks;   // of each projection
  std::map<std::string, at::Tensor> ups;  // any one of each projection
  for (auto& [key, entry] : entries_) {
    if (!entry.images.defined()) {
      progress.check();
      entry.images = images_of(*entry.item);
    }
    columns += entry.images.size(1);
    for (const auto& [name, pair] : entry.item->pairs) {
      ranks[name] += pair.up.size(1);
      if (ups.emplace(name, pair.up).first->second.size(0) != pair.up.size(0)) {
        throw Error("the LoRA of '" + entry.item->item.target + "' does not fit the others (" +
                    name + "); fuse only LoRAs of one base model");
      }
    }
  }
  at::Tensor solved = at::empty({d, columns}, at::kDouble);
  {
    std::vector<at::Tensor> block;
    int64_t begin = 0;
    int64_t size = 0;
    const auto flush = [&] {
      if (block.empty()) return;
      progress.check();
      solved.narrow(1, begin, size).copy_(solver.solve(at::cat(block, 1)));
      begin += size;
      size = 0;
      block.clear();
    };
    for (const auto& [key, entry] : entries_) {
      block.push_back(entry.images);
      size += entry.images.size(1);
      if (size >= kColumnsPerSolve) flush();
    }
    flush();
  }
  progress.check();
  for (const auto& [name, rank] : ranks) {
    const at::Tensor& up = ups.at(name);
    result.patch.pairs[name] = {at::empty({up.size(0), rank}, up.options()),
                                at::empty({d, rank}, at::kDouble)};
  }
  std::map<std::string, int64_t> filled;
  int64_t column = 0;
  for (const auto& [key, entry] : entries_) {
    for (const auto& [name, pair] : entry.item->pairs) {
      const int64_t rank = pair.up.size(1);
      LowRankPair& target = result.patch.pairs.at(name);
      int64_t& at = filled[name];
      target.b.narrow(1, at, rank).copy_(pair.up);
      const at::Tensor r = target.r.narrow(1, at, rank);
      r.copy_(solved.narrow(1, column, rank)).mul_(strength(key));
      if (!(largest_of(pair.up) * largest_of(r) <= kLargestChange)) {  // also where it is NaN
        throw beyond_all_weights(entry.item->item.target, "'" + name + "'");
      }
      at += rank;
      column += rank;
    }
  }

  ConceptSet set;
  nlohmann::ordered_json stated;
  for (const auto& [key, entry] : entries_) {
    set.concepts.push_back(entry.item->item);
    stated.push_back(strength(key));
  }
  set.general_prior = GeneralPriorSize::kNone;
  result.patch.metadata["concepts"] = to_json(set);
  result.patch.metadata["strengths"] = stated.dump();
  result.patch.metadata["method"] = "fusion";
  result.patch.metadata["mode"] = to_string(options.mode);
  const nlohmann::ordered_json weights{{"regularization", options.regularization},
                                       {"preserve_weight", options.preserve_weight},
                                       {"prior_weight", options.prior_weight}};
  result.patch.metadata["weights"] = weights.dump();
  return result;
}

}  // namespace lacuna
