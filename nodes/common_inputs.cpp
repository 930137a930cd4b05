// SPDX-License-Identifier: Apache-2.0
#include "nodes/common_inputs.h"

namespace lacuna {
namespace {
constexpr double kMayLeaveOut = 0.01;
}  // namespace

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
