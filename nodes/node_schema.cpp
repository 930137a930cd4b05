// SPDX-License-Identifier: Apache-2.0
#include "nodes/node_schema.h"

#include <nlohmann/json.hpp>

namespace lacuna {

const InputSpec* find_input(const NodeSchema& schema, const std::string& id) {
  for (const InputSpec& input : schema.inputs) {
    if (input.id == id) return &input;
  }
  return nullptr;
}

std::string to_json(const std::vector<NodeSchema>& schemas) {
  using nlohmann::ordered_json;
  ordered_json list = ordered_json::array();
  for (const NodeSchema& schema : schemas) {
    ordered_json node;
    node["id"] = schema.id;
    node["display_name"] = schema.display_name;
    node["description"] = schema.description;
    node["category"] = schema.category;
    node["search_aliases"] = schema.search_aliases;
    node["output_node"] = schema.output_node;
    node["reads_files"] = schema.reads_files;
    node["inputs"] = ordered_json::array();
    for (const InputSpec& input : schema.inputs) {
      ordered_json entry;
      entry["id"] = input.id;
      entry["display_name"] = input.display_name;
      entry["type"] = input.type;
      entry["tooltip"] = input.tooltip;
      entry["optional"] = input.optional;
      entry["advanced"] = input.advanced;
      if (input.type == socket::kString) entry["multiline"] = input.multiline;
      const auto put_value = [&](const char* key, const WidgetDefault& widget) {
        std::visit(
            [&](const auto& value) {
              if constexpr (!std::is_same_v<std::decay_t<decltype(value)>, std::monostate>) {
                entry[key] = value;
              }
            },
            widget);
      };
      put_value("default", input.default_value);
      put_value("saved", input.saved_value);
      const bool whole = input.type == socket::kInt;
      const auto put = [&](const char* key, const std::optional<double>& value) {
        if (!value) return;
        if (whole) {
          entry[key] = static_cast<int64_t>(*value);
        } else {
          entry[key] = *value;
        }
      };
      put("min", input.min);
      put("max", input.max);
      put("step", input.step);
      if (input.type == socket::kCombo) entry["options"] = input.options;
      node["inputs"].push_back(std::move(entry));
    }
    node["outputs"] = ordered_json::array();
    for (const OutputSpec& output : schema.outputs) {
      node["outputs"].push_back({{"id", output.id},
                                 {"display_name", output.display_name},
                                 {"type", output.type},
                                 {"tooltip", output.tooltip}});
    }
    list.push_back(std::move(node));
  }
  return list.dump(2) + "\n";
}

}  // namespace lacuna
