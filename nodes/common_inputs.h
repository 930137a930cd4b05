// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "lacuna/closed_form/lora_export.h"
#include "nodes/node_inputs.h"
#include "nodes/node_schema.h"

namespace lacuna {

// Inputs that several nodes share, each said once.
InputSpec lora_rank_input();
InputSpec lora_rank_limit_input();

// What these two say together.
LoraLimits lora_limits(const NodeInputs& inputs);

}  // namespace lacuna
