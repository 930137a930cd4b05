// SPDX-License-Identifier: Apache-2.0
#include "nodes/node_registry.h"

#include <utility>

#include "lacuna/error.h"
#include "nodes/attention_refine_node.h"
#include "nodes/concept_set_node.h"
#include "nodes/evaluate_erasure_node.h"
#include "nodes/lora_bundle_nodes.h"
#include "nodes/lora_erase_node.h"
#include "nodes/lora_fuse_node.h"
#include "nodes/save_lora_node.h"

namespace lacuna {

NodeRegistry NodeRegistry::with_lacuna_nodes(const std::string& output_folder,
                                             const std::string& input_folder) {
  NodeRegistry registry;
  registry.add(std::make_unique<ConceptSetNode>());
  registry.add(std::make_unique<AttentionRefineNode>());
  registry.add(std::make_unique<LoraEraseNode>());
  registry.add(std::make_unique<LoraFuseNode>());
  registry.add(std::make_unique<EvaluateErasureNode>(input_folder));
  registry.add(std::make_unique<SaveLoraNode>(output_folder));
  registry.add(std::make_unique<SaveBundleNode>(output_folder));
  registry.add(std::make_unique<LoadBundleNode>(output_folder));
  return registry;
}

void NodeRegistry::add(std::unique_ptr<Node> node) { nodes_.push_back(std::move(node)); }

std::vector<NodeSchema> NodeRegistry::schemas() const {
  std::vector<NodeSchema> schemas;
  for (const auto& node : nodes_) schemas.push_back(node->schema());
  return schemas;
}

Node* NodeRegistry::find(const std::string& id) const {
  for (const auto& node : nodes_) {
    if (node->schema().id == id) return node.get();
  }
  return nullptr;
}

Node& NodeRegistry::at(const std::string& id) const {
  if (Node* node = find(id)) return *node;
  std::string known;
  for (const auto& node : nodes_) known += (known.empty() ? "" : ", ") + node->schema().id;
  throw Error("unknown node type '" + id + "'; known here: " + known);
}

}  // namespace lacuna
