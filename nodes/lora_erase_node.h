// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <string>

#include "lacuna/training/lora_trainer.h"
#include "nodes/kept_state.h"
#include "nodes/node.h"

namespace lacuna {

// Trains one LoRA for each concept: the second half of MACE, before LoRA Fuse.
class LoraEraseNode final : public Node {
 public:
  const NodeSchema& schema() const override;
  void validate(const NodeInputs& constants) const override;
  NodeResult run(const NodeInputs& inputs, Progress& progress) override;

 private:
  // What the last runs finished, by everything it depends on: a run that was cancelled or failed
  // goes on where it stopped. Of one recipe at a time.
  KeptState<std::map<std::string, TrainedConcept>> finished_;
};

}  // namespace lacuna
