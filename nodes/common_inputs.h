// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "lacuna/closed_form/lora_export.h"
#include "nodes/node_inputs.h"
#include "nodes/node_schema.h"

namespace lacuna {

// Inputs that several nodes share, each said once. Defaults are those of the node's own options.
InputSpec model_input(std::string tooltip);
InputSpec clip_input();
InputSpec concepts_input(std::string tooltip = "From Concept Set.");
InputSpec strength_input(double most);
InputSpec regularization_input(double standard);
InputSpec preserve_weight_input(double standard);
InputSpec prior_weight_input(double standard);
InputSpec cfg_input(double standard, std::string tooltip, bool advanced = false);
// "width" or "height" of pictures.
InputSpec side_input(std::string id, int64_t standard, std::string tooltip);
// How much of the vocabulary is kept beside what is listed.
InputSpec retain_set_input();
inline constexpr const char* kEveryPrompt = "every prompt";
inline constexpr const char* kNamingPrompts = "prompts that name it";
// On which prompts the edit acts; of graphs saved without it on every one.
InputSpec where_input(const char* standard);
InputSpec lora_rank_input();
InputSpec lora_rank_limit_input();

// What these two say together.
LoraLimits lora_limits(const NodeInputs& inputs);

}  // namespace lacuna
