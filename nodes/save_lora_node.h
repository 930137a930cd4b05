// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "nodes/node.h"

namespace lacuna {

// Writes a LORA_MODEL as a kohya file. ComfyUI's own node does the same but has had two ids, so
// that a workflow shared with it opens in one age of ComfyUI only.
class SaveLoraNode final : public Node {
 public:
  explicit SaveLoraNode(std::string output_folder);
  const NodeSchema& schema() const override;
  void validate(const NodeInputs& constants) const override;
  NodeResult run(const NodeInputs& inputs, Progress& progress) override;

 private:
  std::string output_folder_;
};

}  // namespace lacuna
