// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "fuzz/targets.h"
#include "nodes/node_registry.h"

namespace lacuna::fuzz {
namespace {

// As a host would give it; a number is written as the bytes it has in memory, or as text.
Value value_of(const InputSpec& input, const std::string& text) {
  const auto bytes_as = [&](auto number) {
    std::memcpy(&number, text.data(), std::min(text.size(), sizeof number));
    return number;
  };
  if (input.type == socket::kInt) return bytes_as(int64_t{0});
  if (input.type == socket::kFloat) return bytes_as(0.0);
  if (input.type == socket::kBoolean) return text == "1";
  return text;
}

}  // namespace

void widgets(std::string_view input) {
  static const NodeRegistry registry = NodeRegistry::with_lacuna_nodes("output", "input");
  static const std::vector<NodeSchema> schemas = registry.schemas();
  if (input.empty()) return;
  const NodeSchema& schema = schemas[static_cast<unsigned char>(input[0]) % schemas.size()];
  input.remove_prefix(1);
  std::map<std::string, Value> values;
  for (const InputSpec& spec : schema.inputs) {
    const bool widget = spec.type == socket::kInt || spec.type == socket::kFloat ||
                        spec.type == socket::kBoolean || spec.type == socket::kString ||
                        spec.type == socket::kCombo;
    if (!widget || input.empty()) continue;
    const size_t end = std::min(input.find('\0'), input.size());
    if (end > 0) values[spec.id] = value_of(spec, std::string(input.substr(0, end)));
    input.remove_prefix(std::min(end + 1, input.size()));
  }
  ends_well([&] { registry.at(schema.id).validate(NodeInputs(schema, std::move(values))); });
}

}  // namespace lacuna::fuzz
