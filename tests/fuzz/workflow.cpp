// SPDX-License-Identifier: Apache-2.0
#include "fuzz/targets.h"
#include "nodes/graph_runner.h"
#include "nodes/host_nodes.h"
#include "support/fake_host.h"

namespace lacuna::fuzz {

void workflow(std::string_view input) {
  static const NodeRegistry registry = [] {
    NodeRegistry all = NodeRegistry::with_lacuna_nodes("output", "input");
    add_host_nodes(all, std::make_shared<testing::FakeApplication>("output"), "{}");
    return all;
  }();
  ends_well([&] { plan_workflow(parse_workflow(input), registry); });
}

}  // namespace lacuna::fuzz
