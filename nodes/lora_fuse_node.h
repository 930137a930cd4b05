// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "lacuna/closed_form/refinement.h"
#include "lacuna/training/fusion.h"
#include "nodes/kept_state.h"
#include "nodes/node.h"

namespace lacuna {

// Fuses the LoRAs of many concepts into one edit, without training: MODEL and LORAS in, forgetting
// MODEL out. What a change of strength does not touch is kept between runs.
class LoraFuseNode final : public Node {
 public:
  const NodeSchema& schema() const override;
  void validate(const NodeInputs& constants) const override;
  NodeResult run(const NodeInputs& inputs, Progress& progress) override;

 private:
  KeptState<StatisticsCache> cache_;
  KeptState<FusionSums> sums_;
};

}  // namespace lacuna
