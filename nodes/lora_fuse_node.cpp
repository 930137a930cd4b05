// SPDX-License-Identifier: Apache-2.0
#include "nodes/lora_fuse_node.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <locale>
#include <set>
#include <sstream>
#include <utility>

#include "lacuna/closed_form/lora_export.h"
#include "lacuna/closed_form/low_rank.h"
#include "lacuna/closed_form/text_entry.h"
#include "lacuna/closed_form/text_gate.h"
#include "lacuna/concepts/typed_list.h"
#include "lacuna/error.h"
#include "lacuna/files/text.h"
#include "lacuna/training/lora_bundle.h"
#include "nodes/common_inputs.h"
#include "nodes/edit_report.h"

namespace lacuna {
namespace {

constexpr int64_t kFuseCacheBytes = 256ll << 20;  // preserved phrases, general prior and the gate
constexpr std::array<const char*, 4> kLorasInputs{"loras", "loras_2", "loras_3", "loras_4"};
constexpr double kMaxStrength = 2.0;

FusionOptions read_fusion_options(const NodeInputs& inputs) {
  FusionOptions options;
  options.mode = fusion_mode_from_string(inputs.string("mode"));
  options.regularization = inputs.number("regularization");
  options.preserve_weight = inputs.number("preserve_weight");
  options.prior_weight = inputs.number("prior_weight");
  return options;
}

// "name = 0.5", one a line; comments as in Concept Set. Throws Error with the line.
ConceptStrengths parse_strengths(const std::string& text) {
  ConceptStrengths strengths;
  std::set<std::string> seen;
  ReadingNotes unused;
  const std::string list = "'concept strengths'";
  for (const TypedLine& line : typed_lines(list_body(text, list, unused), list, unused)) {
    const std::string& body = line.text;
    const size_t equals = body.rfind('=');
    const std::string name =
        equals == std::string::npos ? "" : normalize_phrase(body.substr(0, equals));
    std::istringstream number(equals == std::string::npos ? "" : body.substr(equals + 1));
    number.imbue(std::locale::classic());
    double strength = -1.0;
    std::string rest;
    if (name.empty() || !(number >> strength) || (number >> rest) || !(strength >= 0.0) ||
        strength > kMaxStrength) {
      throw Error("concept strengths: cannot read " + in_quotes(body) +
                  "; write a concept and a number from 0 to 2, as in: church = 0.5");
    }
    if (!seen.insert(fold_case(name)).second) {
      throw Error("concept strengths: '" + name + "' is listed twice; remove one of them");
    }
    strengths[name] = strength;
  }
  return strengths;
}

std::vector<std::string> parse_names(const std::string& text) {
  std::vector<std::string> names;
  ReadingNotes unused;
  const std::string list = "'leave out'";
  for (TypedLine& line : typed_lines(list_body(text, list, unused), list, unused)) {
    names.push_back(std::move(line.text));
  }
  return names;
}

// What the inputs come down to, before anything is computed.
struct Selection {
  LoraBundle bundle;
  ConceptStrengths strengths;
  std::vector<std::string> left_out;
  std::vector<std::string> outdated;  // concepts whose line says something else than their LoRA
};

Selection select(const std::vector<std::shared_ptr<const LoraBundle>>& bundles,
                 const ConceptSet* wanted, const std::vector<std::string>& leave_out,
                 const ConceptStrengths& strengths) {
  std::vector<std::string> targets;
  std::map<std::string, const Concept*> known;  // by folded target
  for (const auto& bundle : bundles) {
    for (const auto& item : bundle->concepts) {
      if (known.emplace(fold_case(item->item.target), &item->item).second) {
        targets.push_back(item->item.target);
      }
    }
  }
  const auto require = [&](const std::string& name, const char* where) {
    if (known.contains(fold_case(name))) return;
    throw Error(std::string(where) + ": '" + name +
                "' is not among the LoRAs; they hold: " + joined(targets, 20));
  };
  Selection selection;
  std::set<std::string> dropped;
  for (const std::string& name : leave_out) {
    require(name, "leave out");
    dropped.insert(fold_case(name));
  }
  if (wanted != nullptr) {
    std::set<std::string> listed;
    for (const Concept& item : wanted->concepts) {
      const auto it = known.find(fold_case(item.target));
      if (it == known.end()) {
        throw Error("'" + item.target +
                    "' is in the concepts, but has no LoRA; train it with LoRA Erase, or remove "
                    "its line");
      }
      listed.insert(it->first);
      if (fold_case(it->second->anchor) != fold_case(item.anchor) ||
          it->second->synonyms != item.synonyms) {
        selection.outdated.push_back(item.target);
      }
    }
    for (const auto& [key, item] : known) {
      if (!listed.contains(key)) dropped.insert(key);
    }
  }
  for (const auto& [name, strength] : strengths) {
    require(name, "concept strengths");
    if (!dropped.contains(fold_case(name))) selection.strengths[name] = strength;
  }
  for (const std::string& target : targets) {
    if (dropped.contains(fold_case(target))) selection.left_out.push_back(target);
  }

  std::vector<std::shared_ptr<const LoraBundle>> remaining;
  for (const auto& bundle : bundles) {
    auto part = std::make_shared<LoraBundle>(*bundle);
    std::erase_if(part->concepts,
                  [&](const auto& item) { return dropped.contains(fold_case(item->item.target)); });
    if (!part->concepts.empty()) remaining.push_back(std::move(part));
  }
  if (remaining.empty()) throw Error("every concept is left out; there is nothing to fuse");
  selection.bundle = merge(remaining);
  if (wanted != nullptr) {
    LoraBundle& bundle = selection.bundle;
    std::set<std::string> present;
    for (const PreservedPhrase& item : bundle.preserve) present.insert(fold_case(item.phrase));
    for (const PreservedPhrase& item : wanted->preserve) {
      if (present.insert(fold_case(item.phrase)).second) bundle.preserve.push_back(item);
    }
    bundle.general_prior = wanted->general_prior;
  }
  return selection;
}

// Concepts that the edit acts on, and what must stay: what is preserved, and concepts of strength
// 0.
std::pair<std::vector<Concept>, std::vector<PreservedPhrase>> part_by_strength(
    const std::vector<Concept>& fused, const Selection& selection) {
  std::set<std::string> silent;
  for (const auto& [name, strength] : selection.strengths) {
    if (strength == 0.0) silent.insert(fold_case(name));
  }
  std::vector<Concept> acted_on;
  std::vector<PreservedPhrase> stay = selection.bundle.preserve;
  for (const Concept& item : fused) {
    if (!silent.contains(fold_case(item.target))) {
      acted_on.push_back(item);
      continue;
    }
    for (std::string& phrase : phrases(item)) {
      stay.push_back({std::move(phrase), item.kind, item.templates});
    }
  }
  return {std::move(acted_on), std::move(stay)};
}

std::string report(const Selection& selection, const FusionOptions& options, const Fusion& fusion,
                   const LoraExport& lora, const RetainSet& retained, RetainSetSize asked,
                   double original_norm, double strength, AppliedTo to, const FittedGate& gate) {
  const LoraBundle& bundle = selection.bundle;
  const size_t n = bundle.concepts.size();
  std::map<std::string, double> strength_of;
  for (const auto& [name, value] : selection.strengths) strength_of[fold_case(name)] = value;
  std::vector<std::string> lines;
  for (const auto& item : bundle.concepts) {
    std::string line = item->item.target + " -> " + item->item.anchor;
    const auto it = strength_of.find(fold_case(item->item.target));
    if (it != strength_of.end()) line += format_numbers(" (%.3g)", it->second);
    lines.push_back(std::move(line));
  }
  std::string text = "Fused " + std::to_string(n) + (n == 1 ? " concept" : " concepts") + " (" +
                     std::string(to_string(options.mode)) + "): " + joined(lines, 10) + ".";
  if (!selection.left_out.empty()) text += "\nLeft out: " + joined(selection.left_out, 10) + ".";
  if (!selection.outdated.empty()) {
    text += "\nTrained with another anchor or other synonyms than the concepts now say: " +
            joined(selection.outdated, 10) + ".";
  }
  text += "\nPreserved: " + std::to_string(bundle.preserve.size()) + " phrases, general prior " +
          std::string(to_string(bundle.general_prior)) + ".";
  text += retain_set_line(retained, asked);
  text += size_line(lora.edit_norm / original_norm, fusion.condition, fusion.floor_added);
  // Of prompts that name nothing a gated edit changes nothing.
  if (to != AppliedTo::kNamingPrompts) {
    text += violence_warning({.relative = lora.edit_norm / original_norm,
                              .strength = strength,
                              .concepts = n,
                              .preserved = bundle.preserve.size(),
                              .retain_asked = asked,
                              .retained = retained.words,
                              .general_prior = bundle.general_prior,
                              .regularization = options.regularization});
  }
  text += applied_line(to) + confusion_line(gate.confused);
  text += "\nLoRA: rank " + std::to_string(lora.rank) +
          format_numbers(", leaves out %.3g %% of the edit.", 100 * lora.residual);
  return text;
}

InputSpec more_loras(const char* id, const char* name) {
  return {.id = id,
          .display_name = name,
          .type = socket::kLoras,
          .tooltip = "More trained concepts of the same checkpoint; each concept counts once.",
          .optional = true};
}

}  // namespace

const NodeSchema& LoraFuseNode::schema() const {
  static const NodeSchema schema{
      .id = "LacunaLoRAFuse",
      .display_name = "LoRA Fuse",
      .description =
          "Fuses trained concepts, one or a hundred, into one edit without interference and "
          "without "
          "training. Concepts can be added, removed and weighted in seconds.",
      .category = "lacuna",
      .search_aliases = {"fuse lora", "merge lora", "forget", "unlearn", "MACE", "concept erasure"},
      .inputs =
          {
              model_input("The checkpoint the LoRAs were trained on, not the output of Attention "
                          "Refine: the refinement is part of the LoRAs. It is not changed itself."),
              clip_input(),
              {.id = "loras",
               .display_name = "loras",
               .type = socket::kLoras,
               .tooltip = "From LoRA Erase or Load Erasure Bundle."},
              more_loras("loras_2", "loras 2"),
              more_loras("loras_3", "loras 3"),
              more_loras("loras_4", "loras 4"),
              {.id = "concepts",
               .display_name = "concepts",
               .type = socket::kConcepts,
               .tooltip =
                   "Optional. When connected, exactly these concepts are fused (each needs a LoRA; "
                   "LoRAs of others are left out), its preserve list is added to that of the "
                   "LoRAs, "
                   "and its general prior is used.",
               .optional = true},
              strength_input(kMaxStrength),
              {.id = "mode",
               .display_name = "mode",
               .type = socket::kCombo,
               .tooltip =
                   "independent: every LoRA keeps the target it was trained on, so that concepts "
                   "can be added and removed freely. joint: one refinement of all concepts, as in "
                   "the paper; LoRAs trained one by one then stand on a slightly other ground.",
               .advanced = true,
               .default_value = std::string("independent"),
               .options = {"independent", "joint"}},
              preserve_weight_input(FusionOptions{}.preserve_weight),
              prior_weight_input(FusionOptions{}.prior_weight),
              regularization_input(FusionOptions{}.regularization),
              {.id = "concept_strengths",
               .display_name = "concept strengths",
               .type = socket::kString,
               .tooltip =
                   "Strength of single concepts, one a line: church = 0.5. Others have 1. A "
                   "concept of strength 0 is protected: what the others do must not touch it.",
               .multiline = true,
               .default_value = std::string()},
              {.id = "leave_out",
               .display_name = "leave out",
               .type = socket::kString,
               .tooltip = "Concepts that are not fused, one a line. Nothing is trained again.",
               .multiline = true,
               .default_value = std::string()},
              lora_rank_input(),
              lora_rank_limit_input(),
              retain_set_input(),
              where_input(kEveryPrompt),
          },
      .outputs =
          {{"model", "model", socket::kModel, "The model without the concepts."},
           {"lora", "lora", socket::kLoraModel,
            "The edit as a LoRA for Save Erasure LoRA; loads in ComfyUI, A1111/Forge and "
            "diffusers."},
           {"loras", "loras", socket::kLoras,
            "All fused concepts in one, for Save Erasure Bundle. Strengths are not part of it."},
           {"report", "report", socket::kString, "What was done, in numbers."}},
  };
  return schema;
}

void LoraFuseNode::validate(const NodeInputs& constants) const {
  if (constants.has("concept_strengths")) parse_strengths(constants.string("concept_strengths"));
}

NodeResult LoraFuseNode::run(const NodeInputs& inputs, Progress& progress) {
  const auto& model = inputs.get<std::shared_ptr<Denoiser>>("model");
  const auto& clip = inputs.get<std::shared_ptr<TextEncoder>>("clip");
  const FusionOptions options = read_fusion_options(inputs);
  const double strength = inputs.number("strength");
  const LoraLimits limits = lora_limits(inputs);

  // Everything that can be refused is refused before the first prompt is encoded.
  const std::vector<TextEntry> projections =
      edited_entries(*model, EditedMatrices::kKeyAndValue, clip->width());
  if (!model->patchable()) {
    throw Error(
        "this model's weights are packed (GGUF, 4-bit) and cannot carry LoRAs exactly; load "
        "unpacked weights, or use Attention Refine alone, which can work on the conditioning (Save "
        "Checkpoint then writes the model unerased; its LoRA output holds the edit)");
  }
  std::vector<std::shared_ptr<const LoraBundle>> bundles;
  for (const char* id : kLorasInputs) {
    if (!inputs.has(id)) continue;
    auto bundle = std::make_shared<LoraBundle>(*inputs.get<std::shared_ptr<const LoraBundle>>(id));
    try {
      if (bundle->concepts.empty()) {
        throw Error("these LoRAs hold no concept; train some with LoRA Erase");
      }
      for (const auto& item : bundle->concepts) lacuna::check(*item);
      check_fits(*bundle, *model, *clip, projections);
      add_samples(*bundle, *model, *clip);
    } catch (const Error& e) {
      throw Error("'" + std::string(id) + "': " + e.what());
    }
    bundles.push_back(std::move(bundle));
  }
  const ConceptSet* wanted = inputs.has("concepts")
                                 ? inputs.get<std::shared_ptr<const ConceptSet>>("concepts").get()
                                 : nullptr;
  Selection selection = select(bundles, wanted, parse_names(inputs.string("leave_out")),
                               parse_strengths(inputs.string("concept_strengths")));
  LoraBundle& bundle = selection.bundle;
  lacuna::validate(concept_set_of(bundle));
  ConceptSet preserved;
  preserved.preserve = bundle.preserve;
  check_phrases(*clip, preserved);
  const at::Tensor rows = entry_rows(*model, projections, progress);

  std::vector<std::string> erased;
  for (const auto& item : bundle.concepts) {
    for (std::string& phrase : phrases(item->item)) erased.push_back(std::move(phrase));
  }
  auto cache = cache_.borrow(kFuseCacheBytes);
  KeptText kept =
      collect_kept_text(*clip, bundle.preserve, bundle.general_prior, erased, &*cache, progress);
  const std::vector<Concept> fused = concept_set_of(bundle).concepts;
  const RetainSetSize asked = retain_set_from_string(inputs.string("retain_set"));
  RetainSet retained =
      collect_retain_set(*clip, fused, retained_size(asked, fused), progress, &*cache);
  kept.retain = std::exchange(retained.gram, at::Tensor());
  FittedGate gate;
  if (inputs.string("where") == kNamingPrompts && strength != 0.0) {
    const auto [acted_on, protected_too] = part_by_strength(fused, selection);
    if (!acted_on.empty()) {
      gate = fit_gate(*clip, acted_on, protected_too, retained, asked, progress, &*cache);
    }
  }
  const bool gated = gate.gate != nullptr;
  retained.kept = {};
  auto sums = sums_.borrow();
  sums->assign(bundle.concepts);
  const Fusion fusion = sums->solve(kept, options, selection.strengths, progress);
  const SharedFactorization factors(fusion.patch.delta, rows, 2 * limits.rank, progress);
  const LoraExport lora =
      export_lora(*model, projections, fusion.patch, factors, limits, strength, progress);
  // At strength 0 the model itself, so that not even rounding differs.
  std::shared_ptr<Denoiser> erased_model = model;
  if (gated) {
    erased_model = with_gated_patch(*model, projections, fusion.patch, strength, gate.gate);
  } else if (strength != 0.0) {
    erased_model = with_patch(*model, projections, fusion.patch, strength);
  }
  const AppliedTo to = strength == 0.0 ? AppliedTo::kNothing
                       : gated         ? AppliedTo::kNamingPrompts
                                       : AppliedTo::kWeights;

  const double original_norm = rows.norm().item<double>();
  std::string text =
      report(selection, options, fusion, lora, retained, asked, original_norm, strength, to, gate);
  NodeResult result;
  result.text = {text};
  result.outputs = {std::move(erased_model), std::make_shared<const LoraTensors>(lora.tensors),
                    std::make_shared<const LoraBundle>(std::move(bundle)), std::move(text)};
  return result;
}

}  // namespace lacuna
