// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "nodes/node.h"

namespace lacuna {

// What an edit erased and what survived it: the model before and after, on the same seeds.
class EvaluateErasureNode final : public Node {
 public:
  explicit EvaluateErasureNode(std::string input_folder = "input");
  const NodeSchema& schema() const override;
  void validate(const NodeInputs& constants) const override;
  std::string outside_state(const NodeInputs& constants) const override;
  NodeResult run(const NodeInputs& inputs, Progress& progress) override;

 private:
  std::string input_folder_;  // where prompt files are
};

}  // namespace lacuna
