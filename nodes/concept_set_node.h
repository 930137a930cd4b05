// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nodes/node.h"

namespace lacuna {

// Words in: the list of concepts to forget and of what must stay.
class ConceptSetNode final : public Node {
 public:
  const NodeSchema& schema() const override;
  void validate(const NodeInputs& constants) const override;
  NodeResult run(const NodeInputs& inputs, Progress& progress) override;
};

}  // namespace lacuna
