// SPDX-License-Identifier: Apache-2.0
#include "nodes/graph_runner.h"

#include <functional>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "lacuna/error.h"
#include "lacuna/files/json_text.h"
#include "lacuna/files/text.h"
#include "nodes/file_name.h"

namespace lacuna {
namespace {

using nlohmann::json;

constexpr size_t kMaxTextBytes = 8u << 20;
constexpr size_t kMaxNodes = 2'000;
// Two thousand nodes of a hundred widgets, or of thirty links.
constexpr JsonLimits kJsonLimits{.depth = 32, .values = 200'000};

std::string label(const WorkflowNode& node) {
  return "node " + node.id + " (" + node.class_type + ")";
}

bool is_link(const json& value) {
  return value.is_array() && value.size() == 2 && value[0].is_string() &&
         value[1].is_number_integer();
}

Value constant(const WorkflowNode& node, const std::string& input, const json& value) {
  if (value.is_boolean()) return value.get<bool>();
  if (value.is_number_unsigned()) {
    // Seeds use the full unsigned range; the bits are what counts.
    return static_cast<int64_t>(value.get<uint64_t>());
  }
  if (value.is_number_integer()) return value.get<int64_t>();
  if (value.is_number_float()) return value.get<double>();
  if (value.is_string()) return value.get<std::string>();
  throw Error(label(node) + ": input '" + input + "' has a value this runner cannot read");
}

std::string title_of(const json& entry) {
  const json::json_pointer path("/_meta/title");
  return entry.contains(path) && entry[path].is_string() ? entry[path].get<std::string>() : "";
}

// A value as the page writes it in the name of a file.
std::string text_of(const json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number_float()) return format_numbers("%.15g", value.get<double>());
  return value.dump();
}

// What %Node.widget% stands for; of several nodes of one name the first one counts.
WidgetTexts widget_texts(const Workflow& workflow) {
  WidgetTexts texts;
  for (const auto name : {&WorkflowNode::class_type, &WorkflowNode::title}) {
    for (const auto& [id, node] : workflow) {
      for (const auto& [widget, text] : node.texts) texts.emplace(node.*name + "." + widget, text);
    }
  }
  return texts;
}

// With the names of files written out, so that they are judged before anything runs.
Workflow with_file_names(Workflow workflow, const NodeRegistry& registry) {
  const WidgetTexts widgets = widget_texts(workflow);
  for (auto& [id, node] : workflow) {
    if (const Node* type = registry.find(node.class_type)) {
      fill_in_widgets(type->schema(), node.constants, widgets);
    }
  }
  return workflow;
}

bool types_match(const std::string& from, const std::string& to) {
  return from == to || from == socket::kAny || to == socket::kAny ||
         (from == socket::kInt && to == socket::kFloat) ||
         (from == socket::kString && to == socket::kCombo);
}

void check_node(const Workflow& workflow, const WorkflowNode& node, const NodeRegistry& registry) {
  const NodeSchema& schema = registry.at(node.class_type).schema();
  for (const InputSpec& input : schema.inputs) {
    if (auto link = node.links.find(input.id); link != node.links.end()) {
      const auto source = workflow.find(link->second.node);
      if (source == workflow.end()) {
        throw Error(label(node) + ": input '" + input.id + "' is linked to node " +
                    link->second.node + ", which does not exist");
      }
      const NodeSchema& from = registry.at(source->second.class_type).schema();
      if (link->second.output >= from.outputs.size()) {
        throw Error(label(node) + ": input '" + input.id + "' is linked to output " +
                    std::to_string(link->second.output) + " of " + label(source->second) +
                    ", which has " + std::to_string(from.outputs.size()));
      }
      const std::string& type = from.outputs[link->second.output].type;
      if (!types_match(type, input.type)) {
        throw Error(label(node) + ": input '" + input.id + "' needs " + input.type + ", but " +
                    label(source->second) + " gives " + type);
      }
    } else if (node.constants.contains(input.id)) {
      if (std::holds_alternative<std::monostate>(input.default_value) && input.options.empty() &&
          input.type != socket::kCombo && input.type != socket::kAny) {
        throw Error(label(node) + ": input '" + input.id + "' needs a link of type " + input.type);
      }
    } else if (!input.optional && std::holds_alternative<std::monostate>(input.default_value)) {
      throw Error(label(node) + ": input '" + input.id + "' is missing; connect or set it");
    }
  }
  std::set<std::string> linked;
  for (const auto& [id, link] : node.links) linked.insert(id);
  try {
    registry.at(node.class_type).validate(NodeInputs(schema, node.constants, linked));
  } catch (const Error& e) {
    throw Error(label(node) + ": " + e.what());
  }
}

}  // namespace

Workflow parse_workflow(std::string_view text) {
  if (text.size() > kMaxTextBytes) throw Error("the workflow is larger than 8 MiB");
  const json root = parse_json(text, "the workflow", kJsonLimits);
  if (!root.is_object()) throw Error("the workflow must be a JSON object");
  if (root.contains("nodes") && root.contains("links")) {
    throw Error(
        "this is a workflow in save format; export it with 'Export (API)' in ComfyUI's "
        "workflow menu");
  }
  if (root.empty()) throw Error("the workflow has no nodes");
  if (root.size() > kMaxNodes) throw Error("the workflow has more than 2000 nodes");

  Workflow workflow;
  for (const auto& [id, entry] : root.items()) {
    if (!entry.is_object() || !entry.contains("class_type") || !entry["class_type"].is_string()) {
      throw Error("node " + id + " has no 'class_type'; is this an API-format workflow?");
    }
    WorkflowNode node{id, entry["class_type"].get<std::string>(), title_of(entry)};
    if (entry.contains("inputs")) {
      if (!entry["inputs"].is_object()) throw Error(label(node) + ": 'inputs' must be an object");
      for (const auto& [input, value] : entry["inputs"].items()) {
        if (is_link(value)) {
          const int64_t output = value[1].get<int64_t>();
          if (output < 0)
            throw Error(label(node) + ": input '" + input + "' has a negative output");
          node.links[input] = {value[0].get<std::string>(), static_cast<size_t>(output)};
        } else if (!value.is_null()) {
          node.constants[input] = constant(node, input, value);
          node.texts[input] = text_of(value);
        }
      }
    }
    workflow.emplace(id, std::move(node));
  }
  return workflow;
}

std::vector<std::string> plan_workflow(const Workflow& workflow, const NodeRegistry& registry) {
  for (const auto& [id, node] : workflow) {
    if (registry.find(node.class_type) == nullptr) {
      throw Error(label(node) +
                  ": unknown node type; the headless runner knows the Lacuna nodes "
                  "and the common loading, sampling and saving nodes of ComfyUI");
    }
  }
  for (const auto& [id, node] : workflow) check_node(workflow, node, registry);

  enum class State { kNew, kActive, kDone };
  std::map<std::string, State> states;
  std::vector<std::string> order;
  const std::function<void(const std::string&)> visit = [&](const std::string& id) {
    State& state = states[id];
    if (state == State::kDone) return;
    const WorkflowNode& node = workflow.at(id);
    if (state == State::kActive)
      throw Error(label(node) + " depends on itself: the links form a cycle");
    state = State::kActive;
    const NodeSchema& schema = registry.at(node.class_type).schema();
    for (const auto& [input, link] : node.links) {
      if (find_input(schema, input) != nullptr) visit(link.node);
    }
    states[id] = State::kDone;
    order.push_back(id);
  };
  for (const auto& [id, node] : workflow) {
    if (registry.at(node.class_type).schema().output_node) visit(id);
  }
  if (order.empty()) {
    // A cycle without an output node is still a cycle.
    for (const auto& [id, node] : workflow) visit(id);
    throw Error("the workflow has no output node; add Save Image, Save LoRA or Preview Any");
  }
  return order;
}

std::vector<WorkflowOutput> run_workflow(const Workflow& as_written, const NodeRegistry& registry,
                                         Progress& progress) {
  const Workflow workflow = with_file_names(as_written, registry);
  const std::vector<std::string> order = plan_workflow(workflow, registry);
  std::map<std::string, size_t> uses;  // how many links still read a node's outputs
  for (const std::string& id : order) {
    for (const auto& [input, link] : workflow.at(id).links) ++uses[link.node];
  }
  std::map<std::string, std::vector<Value>> values;
  std::vector<WorkflowOutput> outputs;
  for (const std::string& id : order) {
    const WorkflowNode& node = workflow.at(id);
    Node& type = registry.at(node.class_type);
    progress.check();
    std::map<std::string, Value> inputs = node.constants;
    for (const auto& [input, link] : node.links) {
      if (find_input(type.schema(), input) != nullptr)
        inputs[input] = values.at(link.node).at(link.output);
    }
    NodeResult result;
    try {
      result = type.run(NodeInputs(type.schema(), std::move(inputs)), progress);
    } catch (const Error& e) {
      throw Error(label(node) + ": " + e.what());
    }
    for (const auto& [input, link] : node.links) {
      if (--uses[link.node] == 0) values.erase(link.node);
    }
    values[id] = std::move(result.outputs);
    result.outputs.clear();
    if (!result.images.empty() || !result.files.empty() || !result.text.empty()) {
      outputs.push_back({id, std::move(result)});
    }
  }
  return outputs;
}

}  // namespace lacuna
