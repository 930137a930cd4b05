// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/closed_form/lora_export.h"
#include "lacuna/closed_form/refinement.h"
#include "lacuna/closed_form/retain_set.h"
#include "lacuna/closed_form/text_gate.h"
#include "nodes/kept_state.h"
#include "nodes/node.h"

namespace lacuna {

// Whatever does not depend on the strength.
struct RefinedEdit {
  std::shared_ptr<const Refinement> refinement;
  double relative_norm = 0.0;  // of the edit to that of the projections
  LoraExport lora;             // at strength 1
  std::vector<TextMap> maps;   // of each stream
  std::optional<LoraExport> pooled_lora;
  RetainSet retained;  // its report; without sums and rows
  FittedGate gate;     // only where it was asked for
};

// What is kept between runs.
struct RefineMemory {
  explicit RefineMemory(int64_t bytes) : statistics(bytes) {}
  StatisticsCache statistics;
  std::string key;  // of the edit
  std::shared_ptr<const RefinedEdit> edit;
};

// Closed-form erasure: MODEL and CLIP in, forgetting MODEL out.
class AttentionRefineNode final : public Node {
 public:
  const NodeSchema& schema() const override;
  void validate(const NodeInputs& constants) const override;
  NodeResult run(const NodeInputs& inputs, Progress& progress) override;

 private:
  KeptState<RefineMemory> memory_;
};

}  // namespace lacuna
