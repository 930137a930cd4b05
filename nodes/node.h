// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "lacuna/host.h"
#include "nodes/node_inputs.h"
#include "nodes/node_schema.h"
#include "nodes/value.h"

namespace lacuna {

struct NodeResult {
  std::vector<Value> outputs = {};       // in schema order
  std::vector<std::string> images = {};  // picture files written
  std::vector<std::string> files = {};   // other files written
  std::vector<std::string> text = {};    // shown in the node
};

// One node type. An instance lives as long as its registry and may keep caches (KeptState), but a
// result depends on the inputs only. All calls may come from several threads at once.
class Node {
 public:
  virtual ~Node() = default;
  virtual const NodeSchema& schema() const = 0;
  // Checks what can be known before anything runs; linked inputs are absent. Throws Error.
  virtual void validate(const NodeInputs& constants) const { (void)constants; }
  // What a result depends on besides its inputs: for nodes that read files (schema: reads_files),
  // the state of the file, cheap to tell. A host that keeps results compares it. Linked inputs are
  // absent.
  virtual std::string outside_state(const NodeInputs& constants) const {
    (void)constants;
    return "";
  }
  virtual NodeResult run(const NodeInputs& inputs, Progress& progress) = 0;
};

}  // namespace lacuna
