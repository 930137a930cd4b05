// SPDX-License-Identifier: Apache-2.0
#include "nodes/attention_refine_node.h"

#include <ATen/ops/matmul.h>

#include <cmath>
#include <utility>

#include "lacuna/closed_form/erasure_patch.h"
#include "lacuna/closed_form/lora_export.h"
#include "lacuna/closed_form/low_rank.h"
#include "lacuna/closed_form/pooled_text.h"
#include "lacuna/closed_form/text_entry.h"
#include "lacuna/concepts/written_forms.h"
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

constexpr double kNoChange = 1e-9;  // of the projections' norm

// Whatever the edit depends on beside model, text encoder and concepts.
struct RefineSettings {
  RefinementOptions options;
  RetainSetSize retain = RetainSetSize::kNone;
  bool gated = false;  // acts on prompts that name a concept only
  LoraLimits limits;
  bool with_pooled = false;
};

std::string report(const RefinedEdit& edit, RetainSetSize asked, double strength, AppliedTo to) {
  const Refinement& refinement = *edit.refinement;
  const LoraExport& lora = edit.lora;
  const double relative_edit = strength * edit.relative_norm;
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
  text += retain_set_line(edit.retained, asked);
  text += size_line(relative_edit, refinement.condition, refinement.floor_added);
  if (strength != 0.0 && edit.relative_norm < kNoChange) {
    text +=
        "\nWarning: nothing was changed, because the text encoder reads the concepts as it reads "
        "their anchors; it may not know these words. Use other words, or another anchor.";
  }
  // Of prompts that name nothing a gated edit changes nothing.
  if (to != AppliedTo::kNamingPrompts) {
    text += violence_warning({.relative = relative_edit,
                              .strength = strength,
                              .concepts = n,
                              .preserved = refinement.concepts.preserve.size(),
                              .retain_asked = asked,
                              .retained = edit.retained.words,
                              .general_prior = refinement.concepts.general_prior,
                              .regularization = refinement.options.regularization});
  }
  text += applied_line(to);
  if (to == AppliedTo::kNamingPrompts) text += confusion_line(edit.gate.confused);
  text += "\nLoRA: rank " + std::to_string(lora.rank) +
          format_numbers(", leaves out %.3g %% of the edit.", 100 * lora.residual);
  return text;
}

std::string pooled_report(const LoraExport& lora) {
  return "\nPooled text: edited, in the LoRA with rank " + std::to_string(lora.rank) +
         format_numbers(", which leaves out %.3g %%.", 100 * lora.residual);
}

// Of two runs with the same key only the strength and how it is applied may differ; empty: nobody
// can say.
std::string key_of(Denoiser& model, TextEncoder& clip, const ConceptSet& concepts,
                   const RefineSettings& settings) {
  const RefinementOptions& options = settings.options;
  const std::string revision = model.revision();
  const std::string fingerprint = clip.fingerprint();
  if (revision.empty() || fingerprint.empty()) return {};
  std::string key = revision + '\n' + fingerprint + '\n' + options.method + '\n' +
                    std::string(to_string(options.read_at)) + '\n' +
                    std::string(to_string(options.matrices)) + '\n';
  for (const double number : {options.regularization, options.preserve_weight, options.prior_weight,
                              settings.limits.left_out}) {
    key += format_numbers("%.17g\n", number);
  }
  return key + std::to_string(options.adversarial_rounds) + '\n' +
         std::to_string(settings.limits.rank) + '\n' + (settings.with_pooled ? "pooled\n" : "\n") +
         std::string(to_string(settings.retain)) + (settings.gated ? "\ngated\n" : "\n") +
         to_json(concepts);
}

std::shared_ptr<const RefinedEdit> refine(Denoiser& model, TextEncoder& clip,
                                          const ConceptSet& concepts,
                                          const RefineSettings& settings,
                                          StatisticsCache& statistics, Progress& progress) {
  const RefinementOptions& options = settings.options;
  const LoraLimits& limits = settings.limits;
  const std::vector<TextEntry> entries = edited_entries(model, options.matrices, clip.width());
  const at::Tensor rows = entry_rows(model, entries, progress);
  const at::Tensor gram =
      options.adversarial_rounds > 0 ? entry_gram(model, entries, progress) : at::Tensor();
  RetainSet retained =
      collect_retain_set(clip, concepts.concepts, retained_size(settings.retain, concepts.concepts),
                         progress, &statistics);
  RefinementProblem problem = collect_problem(clip, concepts, options, &statistics, progress);
  problem.retain = std::exchange(retained.gram, at::Tensor());
  FittedGate gate;
  if (settings.gated) {
    gate = fit_gate(clip, concepts.concepts, concepts.preserve, retained, settings.retain, progress,
                    &statistics);
  }
  retained.kept = {};
  Refinement refinement = solve_refinement(problem, options, gram);
  refinement.concepts = concepts;
  refinement.encoder_fingerprint = clip.fingerprint();
  refinement.encoder_samples = clip.weight_samples();

  auto edit = std::make_shared<RefinedEdit>();
  edit->retained = std::move(retained);
  edit->gate = std::move(gate);
  const SharedFactorization factors(refinement.delta, rows, limits.rank, progress, limits.left_out);
  edit->relative_norm = factors.edit_norm() / rows.norm().item<double>();
  edit->lora = export_lora(model, entries, refinement.delta, factors, limits, 1.0, progress);
  edit->maps.push_back(text_map(refinement.delta, entries));
  const std::vector<TextEntry> pooled =
      settings.with_pooled ? pooled_entries(model) : std::vector<TextEntry>();
  if (!pooled.empty()) {
    const RowFit fit = fit_pooled(clip, concepts, options, progress);
    const at::Tensor delta = fit.in.defined() ? at::matmul(fit.out, fit.in) : fit.out;
    const SharedFactorization pooled_factors(delta, entry_rows(model, pooled, progress),
                                             limits.rank, progress, limits.left_out);
    edit->pooled_lora = export_lora(model, pooled, delta, pooled_factors, limits, 1.0, progress);
    edit->maps.push_back(text_map(delta, pooled));
  }
  edit->refinement = std::make_shared<const Refinement>(std::move(refinement));
  return edit;
}

// The LoRA at another strength.
LoraTensors scaled(const LoraTensors& tensors, double strength) {
  LoraTensors out = tensors;
  for (auto& [name, tensor] : out) {
    if (strength != 1.0 && name.ends_with(".lora_up.weight")) {
      tensor = tensor.to(at::kFloat).mul_(strength).to(at::kHalf);
    }
  }
  return out;
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
              model_input(
                  "The model to edit; LoRAs loaded before are taken into account. It is not "
                  "changed itself."),
              clip_input(),
              concepts_input(),
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
              strength_input(2.0),
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
              regularization_input(RefinementOptions{}.regularization),
              preserve_weight_input(RefinementOptions{}.preserve_weight),
              prior_weight_input(RefinementOptions{}.prior_weight),
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
               .optional = true,
               .advanced = true,
               .default_value = false},
              retain_set_input(),
              where_input(kNamingPrompts),
          },
      .outputs =
          {{"model", "model", socket::kModel, "The model without the concepts."},
           {"refinement", "refinement", socket::kRefinement,
            "The edit itself, for LoRA training on top of it."},
           {"lora", "lora", socket::kLoraModel,
            "The edit as a LoRA for Save LoRA; loads in ComfyUI, A1111/Forge and diffusers."},
           {"report", "report", socket::kString, "What was done, in numbers."},
           {"edited_clip", "clip", socket::kClip,
            "For the prompts, where the edit acts on prompts that name a concept: no prompt that "
            "says a concept word for word is missed then, whatever else it says."}},
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
  const double strength = inputs.number("strength");
  const std::string& apply_as = inputs.string("apply_as");
  const RefineSettings settings{
      .options = read_refinement_options(inputs),
      .retain = retain_set_from_string(inputs.string("retain_set")),
      .gated = inputs.string("where") == kNamingPrompts,
      .limits = lora_limits(inputs),
      .with_pooled = inputs.boolean("pooled_text"),
  };

  // Everything that can be refused is refused before the first prompt is encoded.
  lacuna::check(settings.options);
  lacuna::validate(concepts);
  edited_entries(*model, settings.options.matrices, clip->width());
  const bool packed = !model->patchable();
  if (apply_as == "weights" && packed) {
    throw Error(
        "this model's weights are packed and cannot be patched exactly; set 'apply as' to "
        "conditioning");
  }
  if (settings.gated && apply_as == "weights") {
    throw Error(
        "weights act on every prompt: set 'where' to every prompt, or 'apply as' to auto or "
        "conditioning");
  }
  if (settings.gated && settings.with_pooled) {
    throw Error(
        "the edit of the pooled text acts on every prompt: set 'where' to every prompt, or turn "
        "'pooled text' off");
  }
  check_phrases(*clip, concepts);

  auto memory = memory_.borrow(kRefineCacheBytes);
  const std::string key = key_of(*model, *clip, concepts, settings);
  std::shared_ptr<const RefinedEdit> edit = memory->edit;
  if (edit == nullptr || key.empty() || key != memory->key) {
    memory->edit.reset();
    edit = refine(*model, *clip, concepts, settings, memory->statistics, progress);
    memory->key = key;
    memory->edit = edit;
  }

  const bool as_weights =
      !settings.gated && (apply_as == "weights" || (apply_as == "auto" && !packed));
  std::shared_ptr<Denoiser> erased =
      as_weights ? model->with_weight_maps(edit->maps, strength)
                 : model->with_input_maps(edit->maps, {}, strength, edit->gate.gate);
  LoraTensors tensors = scaled(edit->lora.tensors, strength);
  if (edit->pooled_lora) tensors.merge(scaled(edit->pooled_lora->tensors, strength));
  const AppliedTo to = strength == 0.0  ? AppliedTo::kNothing
                       : as_weights     ? AppliedTo::kWeights
                       : settings.gated ? AppliedTo::kNamingPrompts
                       : packed         ? AppliedTo::kConditioningOfPacked
                                        : AppliedTo::kConditioning;
  std::string text = report(*edit, settings.retain, strength, to);
  if (edit->pooled_lora) {
    text += pooled_report(*edit->pooled_lora);
  } else if (settings.with_pooled) {
    text += "\nPooled text: this model (" + model->family() + ") reads none.";
  }
  std::shared_ptr<TextEncoder> edited_clip;
  // A prompt's own embedding is what keys and values read alike. What it has edited in full the
  // MODEL leaves alone, which would edit half an edit once more.
  if (settings.gated && strength == 1.0 &&
      settings.options.matrices == EditedMatrices::kKeyAndValue) {
    edited_clip = clip->with_map(edit->maps.front(), strength, written_forms(concepts.concepts));
  }
  if (edited_clip == nullptr) {
    edited_clip = clip;
    if (settings.gated && strength != 0.0) {
      text +=
          "\nThis node's clip is the one that was given: only an edit of keys and values at "
          "strength 1 can be made on prompts that say a concept word for word.";
    }
  } else {
    text +=
        "\nWith this node's clip connected to the prompts none is missed that says a concept word "
        "for word, whatever else it says.";
  }
  NodeResult result;
  result.text = {text};
  result.outputs = {std::move(erased), edit->refinement,
                    std::make_shared<const LoraTensors>(std::move(tensors)), std::move(text),
                    std::move(edited_clip)};
  return result;
}

}  // namespace lacuna
