// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "nodes/node.h"

namespace lacuna {

// Owns one instance of every node type it knows.
class NodeRegistry {
 public:
  // The node types of this pack; those that save write below output_folder, prompt files are read
  // from input_folder.
  static NodeRegistry with_lacuna_nodes(const std::string& output_folder,
                                        const std::string& input_folder = "input");

  void add(std::unique_ptr<Node> node);
  std::vector<NodeSchema> schemas() const;  // in order of registration
  Node* find(const std::string& id) const;  // nullptr when unknown
  Node& at(const std::string& id) const;    // throws Error naming the known types

 private:
  std::vector<std::unique_ptr<Node>> nodes_;
};

}  // namespace lacuna
