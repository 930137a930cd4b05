// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/host.h"
#include "nodes/node_registry.h"

namespace lacuna {

// Runs a workflow in ComfyUI's API format without ComfyUI. A graph is checked as a whole first:
// unknown node types, cycles, missing inputs, links of a wrong type and bad widget values are
// errors that name the node, before anything is loaded.

struct WorkflowLink {
  std::string node;
  size_t output = 0;
};

struct WorkflowNode {
  std::string id;
  std::string class_type;
  std::string title = {};  // of the page; may be empty
  std::map<std::string, Value> constants = {};
  std::map<std::string, std::string> texts = {};  // the constants, as the page writes them
  std::map<std::string, WorkflowLink> links = {};
};

using Workflow = std::map<std::string, WorkflowNode>;

// Throws Error for text that is not API-format JSON.
Workflow parse_workflow(std::string_view json);

// Node ids in execution order: ancestors of output nodes only. Throws Error as described above.
std::vector<std::string> plan_workflow(const Workflow& workflow, const NodeRegistry& registry);

struct WorkflowOutput {
  std::string node;
  NodeResult result;  // outputs left out
};

// Results of the output nodes and of nodes that show text, in execution order.
std::vector<WorkflowOutput> run_workflow(const Workflow& workflow, const NodeRegistry& registry,
                                         Progress& progress);

}  // namespace lacuna
