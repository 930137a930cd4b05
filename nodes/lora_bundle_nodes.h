// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "nodes/node.h"

namespace lacuna {

// Trained concepts to a `lacuna.bundle/1` file, to be fused later or elsewhere, and back.

class SaveBundleNode final : public Node {
 public:
  explicit SaveBundleNode(std::string output_folder);
  const NodeSchema& schema() const override;
  void validate(const NodeInputs& constants) const override;
  NodeResult run(const NodeInputs& inputs, Progress& progress) override;

 private:
  std::string output_folder_;
};

class LoadBundleNode final : public Node {
 public:
  explicit LoadBundleNode(std::string output_folder);
  const NodeSchema& schema() const override;
  void validate(const NodeInputs& constants) const override;
  std::string outside_state(const NodeInputs& constants) const override;
  NodeResult run(const NodeInputs& inputs, Progress& progress) override;

 private:
  std::string output_folder_;
};

}  // namespace lacuna
