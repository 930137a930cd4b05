// SPDX-License-Identifier: Apache-2.0
#include "nodes/attention_refine_node.h"

#include <ATen/ops/matmul.h>

#include <cmath>

#include "lacuna/closed_form/erasure_patch.h"
#include "lacuna/closed_form/lora_export.h"
#include "lacuna/closed_form/low_rank.h"
#include "lacuna/closed_form/pooled_text.h"
#include "lacuna/closed_form/text_entry.h"
#include "lacuna/files/text.h"
#include "nodes/common_inputs.h"
#include "nodes/edit_report.h"

namespace lacuna {
namespace {

// Embeddings of 35 SD1.x or 13 SDXL concepts.
constexpr int64_t kRefineCacheBytes = 256ll << 20;

RefinementOptions read_refinement_options(const NodeInputs& inputs) {
  RefinementOptions options;
  options.method = inputs.string("method");
  options.read_at = read_at_from_string(inputs.string("read_at"));
  options.matrices = edited_matrices_from_string(inputs.string("matrices"));
  options.regularization = inputs.number("regularization");
  options.preserve_weight = inputs.number("preserve_weight");
  options.prior_weight = inputs.number("prior_weight");
  options.adversarial_rounds = static_cast<int>(inputs.integer("adversarial_rounds"));
  return options;
}

enum class AppliedTo { kNothing, kWeights, kConditioning, kConditioningOfPacked };

std::string applied(AppliedTo to) {
  // No saver and no merge of the host sees an edit of the conditioning.
  const std::string unsaved =
      ": it acts in pictures drawn with this MODEL and is no part of its weights, so that Save "
      "Checkpoint writes the model with the concepts still in it. To pass the edit on, save the "
      "LoRA, which holds it";
  switch (to) {
    case AppliedTo::kNothing:
      return "\nStrength 0: the model is unchanged.";
    case AppliedTo::kWeights:
      return "\nApplied to the weights.";
    case AppliedTo::kConditioning:
      return "\nApplied to the conditioning, as 'apply as' says" + unsaved +
             ", or set 'apply as' to weights.";
    case AppliedTo::kConditioningOfPacked:
      break;
  }
  return "\nApplied to the conditioning, because this model's weights are packed" + unsaved + ".";
}

std::string report(const Refinement& refinement, const LoraExport& lora, double relative_edit,
                   double strength, AppliedTo to) {
  const size_t n = refinement.concepts.concepts.size();
  std::string text = "Erased " + std::to_string(n) + (n == 1 ? " concept" : " concepts") +
                     " with '" + refinement.options.method + "':";
  for (size_t i = 0; i < n && i < 10; ++i) {
    const Concept& item = refinement.concepts.concepts[i];
    text += (i == 0 ? " " : "; ") + item.target + " -> " + item.anchor;
  }
  if (n > 10) text += "; and " + std::to_string(n - 10) + " more";
  text += ".\nPreserved: " + std::to_string(refinement.concepts.preserve.size()) +
          " phrases, general prior " + std::string(to_string(refinement.concepts.general_prior)) +
          ".";
  text += format_numbers("\nEdit: %.1f %% of the projections' norm, condition number %.2g",
                         100 * relative_edit, refinement.condition);
  text += refinement.floor_added > 0.0
              ? format_numbers(", floor %.2g added.", refinement.floor_added)
              : ".";
  text += violence_warning({.relative = relative_edit,
                            .strength = strength,
                            .concepts = n,
                            .preserved = refinement.concepts.preserve.size(),
                            .general_prior = refinement.concepts.general_prior,
                            .regularization = refinement.options.regularization});
  text += applied(to);
  text += "\nLoRA: rank " + std::to_string(lora.rank) +
          format_numbers(", leaves out %.3g %% of the edit.", 100 * lora.residual);
  return text;
}

std::string pooled_report(const LoraExport& lora) {
  return "\nPooled text: edited, in the LoRA with rank " + std::to_string(lora.rank) +
         format_numbers(", which leaves out %.3g %%.", 100 * lora.residual);
}

}  // namespace

const NodeSchema& AttentionRefineNode::schema() const {
  static const NodeSchema schema{
      .id = "LacunaAttentionRefine",
      .display_name = "Attention Refine",
      .description =
          "Makes the model forget the concepts in seconds, without training: a closed-form edit of "
          "the cross-attention keys and values. Use the MODEL as usual, or save the LoRA.",
      .category = "lacuna",
      .search_aliases = {"forget", "unlearn", "erase concept", "remove concept", "UCE", "MACE",
                         "concept erasure"},
      .inputs =
          {
              {.id = "model",
               .display_name = "model",
               .type = socket::kModel,
               .tooltip =
                   "The model to edit; LoRAs loaded before are taken into account. It is not "
                   "changed itself."},
              {.id = "clip",
               .display_name = "clip",
               .type = socket::kClip,
               .tooltip = "The text encoder of the same checkpoint."},
              {.id = "concepts",
               .display_name = "concepts",
               .type = socket::kConcepts,
               .tooltip = "From Concept Set."},
              {.id = "method",
               .display_name = "method",
               .type = socket::kCombo,
               .tooltip =
                   "uce: the phrase itself and everything after it in the prompt read as the "
                   "anchor; erases on its own. mace: only the words around the phrase, the "
                   "end of text and the padding; the first half of MACE, to be followed by "
                   "LoRA training.",
               .default_value = std::string("uce"),
               .options = edit_method_names()},
              {.id = "strength",
               .display_name = "strength",
               .type = socket::kFloat,
               .tooltip = "0: the model as it was, 1: the computed edit. Linear in between.",
               .default_value = 1.0,
               .min = 0.0,
               .max = 2.0,
               .step = 0.05},
              {.id = "matrices",
               .display_name = "matrices",
               .type = socket::kCombo,
               .tooltip = "key+value erases more; value alone keeps the layout of the picture.",
               .advanced = true,
               .default_value = std::string("key+value"),
               .options = {"key+value", "value"}},
              {.id = "read_at",
               .display_name = "read at",
               .type = socket::kCombo,
               .tooltip =
                   "Which token positions are edited: all, the phrase's own (subject), or the "
                   "end of text and padding only.",
               .advanced = true,
               .default_value = std::string("all"),
               .options = {"all", "subject", "end_of_text"}},
              {.id = "regularization",
               .display_name = "regularization",
               .type = socket::kFloat,
               .tooltip =
                   "Resistance to any change. Raise it when pictures break, lower it when the "
                   "concept comes through.",
               .advanced = true,
               .default_value = RefinementOptions{}.regularization,
               .min = 0.0,
               .max = 10000.0,
               .step = 0.01},
              {.id = "preserve_weight",
               .display_name = "preserve weight",
               .type = socket::kFloat,
               .tooltip = "Weight of a preserved phrase; an erased one counts 1.",
               .default_value = RefinementOptions{}.preserve_weight,
               .min = 0.0,
               .max = 1000.0,
               .step = 0.1},
              {.id = "prior_weight",
               .display_name = "prior weight",
               .type = socket::kFloat,
               .tooltip = "Weight of the general prior of the Concept Set.",
               .advanced = true,
               .default_value = RefinementOptions{}.prior_weight,
               .min = 0.0,
               .max = 1000.0,
               .step = 0.1},
              {.id = "adversarial_rounds",
               .display_name = "adversarial rounds",
               .type = socket::kInt,
               .tooltip =
                   "Each round finds the embeddings that would still bring the concepts back "
                   "and erases them too. More robust, less is kept.",
               .advanced = true,
               .default_value = int64_t{0},
               .min = 0,
               .max = 3,
               .step = 1},
              {.id = "apply_as",
               .display_name = "apply as",
               .type = socket::kCombo,
               .tooltip = "weights: a weight patch, as a LoRA. conditioning: the same edit made on "
                          "the text embedding inside cross-attention, for packed weights (GGUF, "
                          "4-bit); Save Checkpoint then writes the model with the concepts still "
                          "in it, so save the LoRA. auto: weights where possible, conditioning for "
                          "packed ones; the report says which.",
               .advanced = true,
               .default_value = std::string("auto"),
               .options = {"auto", "weights", "conditioning"}},
              lora_rank_input(),
              lora_rank_limit_input(),
              {.id = "pooled_text",
               .display_name = "pooled text",
               .type = socket::kBoolean,
               .tooltip =
                   "SDXL also reads one vector of the whole prompt, beside cross-attention: edit "
                   "that, too. Takes as long again to read the text. LoRA Fuse does not pass it "
                   "on; other models have none, and nothing changes.",
               .advanced = true,
               .default_value = false},
          },
      .outputs =
          {{"model", "model", socket::kModel, "The model without the concepts."},
           {"refinement", "refinement", socket::kRefinement,
            "The edit itself, for LoRA training on top of it."},
           {"lora", "lora", socket::kLoraModel,
            "The edit as a LoRA for Save LoRA; loads in ComfyUI, A1111/Forge and diffusers."},
           {"report", "report", socket::kString, "What was done, in numbers."}},
  };
  return schema;
}

void AttentionRefineNode::validate(const NodeInputs& constants) const {
  if (constants.has_all({"method", "matrices", "read_at", "regularization", "preserve_weight",
                         "prior_weight", "adversarial_rounds"})) {
    lacuna::check(read_refinement_options(constants));
  }
}

NodeResult AttentionRefineNode::run(const NodeInputs& inputs, Progress& progress) {
  const auto& model = inputs.get<std::shared_ptr<Denoiser>>("model");
  const auto& clip = inputs.get<std::shared_ptr<TextEncoder>>("clip");
  const ConceptSet& concepts = *inputs.get<std::shared_ptr<const ConceptSet>>("concepts");
  const RefinementOptions options = read_refinement_options(inputs);
  const double strength = inputs.number("strength");
  const std::string& apply_as = inputs.string("apply_as");

  // Everything that can be refused is refused before the first prompt is encoded.
  lacuna::check(options);
  lacuna::validate(concepts);
  const std::vector<TextEntry> projections =
      edited_entries(*model, options.matrices, clip->width());
  if (apply_as == "weights" && !model->patchable()) {
    throw Error(
        "this model's weights are packed and cannot be patched exactly; set 'apply as' to "
        "conditioning");
  }
  check_phrases(*clip, concepts);
  const std::vector<TextEntry> pooled =
      inputs.boolean("pooled_text") ? pooled_entries(*model) : std::vector<TextEntry>();
  const at::Tensor rows = entry_rows(*model, projections, progress);
  const at::Tensor gram =
      options.adversarial_rounds > 0 ? entry_gram(*model, projections, progress) : at::Tensor();

  auto cache = cache_.borrow(kRefineCacheBytes);
  const RefinementProblem problem = collect_problem(*clip, concepts, options, &*cache, progress);
  Refinement refinement = solve_refinement(problem, options, gram);
  refinement.concepts = concepts;
  refinement.encoder_fingerprint = clip->fingerprint();
  refinement.encoder_samples = clip->weight_samples();

  const LoraLimits limits = lora_limits(inputs);
  const SharedFactorization factors(refinement.delta, rows, limits.rank, progress, limits.left_out);
  const LoraExport lora =
      export_lora(*model, projections, refinement.delta, factors, limits, strength, progress);

  std::vector<TextMap> maps{text_map(refinement.delta, projections)};
  std::string pooled_line;
  LoraTensors tensors = lora.tensors;
  if (!pooled.empty()) {
    const RowFit fit = fit_pooled(*clip, concepts, options, progress);
    const at::Tensor delta = fit.in.defined() ? at::matmul(fit.out, fit.in) : fit.out;
    const SharedFactorization pooled_factors(delta, entry_rows(*model, pooled, progress),
                                             limits.rank, progress, limits.left_out);
    const LoraExport pooled_lora =
        export_lora(*model, pooled, delta, pooled_factors, limits, strength, progress);
    tensors.insert(pooled_lora.tensors.begin(), pooled_lora.tensors.end());
    maps.push_back(text_map(delta, pooled));
    pooled_line = pooled_report(pooled_lora);
  } else if (inputs.boolean("pooled_text")) {
    pooled_line = "\nPooled text: this model (" + model->family() + ") reads none.";
  }

  const bool packed = !model->patchable();
  const bool as_weights = apply_as == "weights" || (apply_as == "auto" && !packed);
  std::shared_ptr<Denoiser> erased =
      as_weights ? model->with_weight_maps(maps, strength) : model->with_input_maps(maps, strength);

  const double original_norm = rows.norm().item<double>();
  NodeResult result;
  const AppliedTo to = strength == 0.0 ? AppliedTo::kNothing
                       : as_weights    ? AppliedTo::kWeights
                       : packed        ? AppliedTo::kConditioningOfPacked
                                       : AppliedTo::kConditioning;
  std::string text =
      report(refinement, lora, strength * factors.edit_norm() / original_norm, strength, to);
  text += pooled_line;
  result.text = {text};
  result.outputs = {std::move(erased), std::make_shared<const Refinement>(std::move(refinement)),
                    std::make_shared<const LoraTensors>(std::move(tensors)), std::move(text)};
  return result;
}

}  // namespace lacuna
