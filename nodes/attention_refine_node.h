// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "lacuna/closed_form/refinement.h"
#include "nodes/kept_state.h"
#include "nodes/node.h"

namespace lacuna {

// Closed-form erasure: MODEL and CLIP in, forgetting MODEL out.
class AttentionRefineNode final : public Node {
 public:
  const NodeSchema& schema() const override;
  void validate(const NodeInputs& constants) const override;
  NodeResult run(const NodeInputs& inputs, Progress& progress) override;

 private:
  KeptState<StatisticsCache> cache_;
};

}  // namespace lacuna
