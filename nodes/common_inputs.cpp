// SPDX-License-Identifier: Apache-2.0
#include "nodes/common_inputs.h"

#include <utility>

namespace lacuna {
namespace {
constexpr double kMayLeaveOut = 0.01;
}  // namespace

InputSpec model_input(std::string tooltip) {
  return {.id = "model",
          .display_name = "model",
          .type = socket::kModel,
          .tooltip = std::move(tooltip)};
}

InputSpec clip_input() {
  return {.id = "clip",
          .display_name = "clip",
          .type = socket::kClip,
          .tooltip = "The text encoder of the same checkpoint."};
}

InputSpec concepts_input(std::string tooltip) {
  return {.id = "concepts",
          .display_name = "concepts",
          .type = socket::kConcepts,
          .tooltip = std::move(tooltip)};
}

InputSpec strength_input(double most) {
  return {.id = "strength",
          .display_name = "strength",
          .type = socket::kFloat,
          .tooltip = "0: the model as it was, 1: the computed edit. Linear in between.",
          .default_value = 1.0,
          .min = 0.0,
          .max = most,
          .step = 0.05};
}

InputSpec regularization_input(double standard) {
  return {.id = "regularization",
          .display_name = "regularization",
          .type = socket::kFloat,
          .tooltip =
              "Resistance to any change. Raise it when pictures break, lower it when the concept "
              "comes through.",
          .advanced = true,
          .default_value = standard,
          .min = 0.0,
          .max = 10000.0,
          .step = 0.01};
}

InputSpec preserve_weight_input(double standard) {
  return {.id = "preserve_weight",
          .display_name = "preserve weight",
          .type = socket::kFloat,
          .tooltip = "Weight of a preserved phrase; an erased concept counts 1.",
          .default_value = standard,
          .min = 0.0,
          .max = 1000.0,
          .step = 0.1};
}

InputSpec prior_weight_input(double standard) {
  return {.id = "prior_weight",
          .display_name = "prior weight",
          .type = socket::kFloat,
          .tooltip = "Weight of the general prior of the Concept Set.",
          .advanced = true,
          .default_value = standard,
          .min = 0.0,
          .max = 1000.0,
          .step = 0.1};
}

InputSpec cfg_input(double standard, std::string tooltip, bool advanced) {
  return {.id = "cfg",
          .display_name = "cfg",
          .type = socket::kFloat,
          .tooltip = std::move(tooltip),
          .advanced = advanced,
          .default_value = standard,
          .min = 0.0,
          .max = 30.0,
          .step = 0.1};
}

InputSpec side_input(std::string id, int64_t standard, std::string tooltip) {
  return {.id = id,
          .display_name = id,
          .type = socket::kInt,
          .tooltip = std::move(tooltip),
          .default_value = standard,
          .min = 64,
          .max = 2048,
          .step = 8};
}

InputSpec retain_set_input() {
  return {.id = "retain_set",
          .display_name = "retain set",
          .type = socket::kCombo,
          .tooltip =
              "Keeps what nobody listed: words of the text encoder's own vocabulary, but for those "
              "that it takes for a concept. small: 200 words, full: 2000; each is read twice, for "
              "each form that the concepts share (\"flag of ...\"), once for a text encoder. none: "
              "only what is listed.",
          .optional = true,  // saved API workflows do not have it
          .default_value = std::string("small"),
          .saved_value = std::string("none"),
          .options = {"none", "small", "full"}};
}

InputSpec where_input(const char* standard) {
  return {
      .id = "where",
      .display_name = "where",
      .type = socket::kCombo,
      .tooltip =
          "prompts that name it: only where a prompt names a concept, in these words or others; "
          "every other prompt is drawn by the model as it was, bit for bit. It acts while the "
          "model runs, and no checkpoint can hold it. every prompt: a weight edit, which Save "
          "Checkpoint and the LoRA hold, and which also moves what is like the concepts.",
      .optional = true,  // saved API workflows do not have it
      .default_value = std::string(standard),
      .saved_value = std::string(kEveryPrompt),
      .options = {kNamingPrompts, kEveryPrompt}};
}

InputSpec lora_rank_input() {
  return {.id = "lora_rank",
          .display_name = "LoRA rank",
          .type = socket::kInt,
          .tooltip =
              "Rank of the LoRA output. 0: the smallest that leaves out at most 1 % of the "
              "edit, up to 'LoRA rank limit'. The report says what is left out.",
          .advanced = true,
          .default_value = int64_t{0},
          .min = 0,
          .max = 768,
          .step = 1};
}

InputSpec lora_rank_limit_input() {
  return {.id = "lora_rank_limit",
          .display_name = "LoRA rank limit",
          .type = socket::kInt,
          .tooltip =
              "Largest rank that 'LoRA rank' 0 may choose; a smaller one makes a smaller file "
              "that leaves out more.",
          .optional = true,  // saved API workflows do not have it
          .advanced = true,
          .default_value = int64_t{256},
          .min = 1,
          .max = 768,
          .step = 1};
}

LoraLimits lora_limits(const NodeInputs& inputs) {
  const int64_t rank = inputs.integer("lora_rank");
  if (rank > 0) return {rank, 0.0};
  return {inputs.integer("lora_rank_limit"), kMayLeaveOut};
}

}  // namespace lacuna
