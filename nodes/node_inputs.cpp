// SPDX-License-Identifier: Apache-2.0
#include "nodes/node_inputs.h"

#include <algorithm>
#include <cmath>

namespace lacuna {
namespace {

// Whole numbers are accepted where a decimal is expected, and decimals without fraction where a
// whole number is: JSON and Python do not always keep them apart.
void convert(const InputSpec& input, Value& value, const std::string& where) {
  const auto wrong = [&](const std::string& expected) {
    return Error(where + " must be " + expected);
  };
  if (input.type == socket::kFloat) {
    if (const auto* whole = std::get_if<int64_t>(&value)) value = static_cast<double>(*whole);
    if (!std::holds_alternative<double>(value)) throw wrong("a number");
  } else if (input.type == socket::kInt) {
    if (const auto* number = std::get_if<double>(&value)) {
      if (*number != std::floor(*number) || std::abs(*number) > 9e15) throw wrong("a whole number");
      value = static_cast<int64_t>(*number);
    }
    if (!std::holds_alternative<int64_t>(value)) throw wrong("a whole number");
  } else if (input.type == socket::kBoolean) {
    if (!std::holds_alternative<bool>(value)) throw wrong("true or false");
  } else if (input.type == socket::kString || input.type == socket::kCombo) {
    if (!std::holds_alternative<std::string>(value)) throw wrong("text");
  }
}

void check_range(const InputSpec& input, const Value& value, const std::string& where) {
  double number = 0.0;
  if (const auto* decimal = std::get_if<double>(&value)) {
    number = *decimal;
  } else if (const auto* whole = std::get_if<int64_t>(&value)) {
    number = static_cast<double>(*whole);
  } else {
    return;
  }
  if (!std::isfinite(number) || (input.min && number < *input.min) ||
      (input.max && number > *input.max)) {
    const auto text = [](double x) {
      std::string s = std::to_string(x);
      s.erase(s.find_last_not_of('0') + 1);
      if (s.ends_with('.')) s.pop_back();
      return s;
    };
    throw Error(
        where + " is out of range" +
        (input.min && input.max ? " (" + text(*input.min) + " to " + text(*input.max) + ")" : ""));
  }
}

}  // namespace

void fill_in_widgets(const NodeSchema& schema, std::map<std::string, Value>& values,
                     const WidgetTexts& widgets) {
  for (const InputSpec& input : schema.inputs) {
    const auto it = input.names_file ? values.find(input.id) : values.end();
    if (it == values.end()) continue;
    if (auto* name = std::get_if<std::string>(&it->second)) *name = with_widgets(*name, widgets);
  }
}

NodeInputs::NodeInputs(const NodeSchema& schema, std::map<std::string, Value> values,
                       const std::set<std::string>& linked)
    : schema_(&schema), values_(std::move(values)) {
  for (const InputSpec& input : schema.inputs) {
    const std::string where = schema.display_name + ": '" + input.id + "'";
    auto it = values_.find(input.id);
    if (it != values_.end()) {
      convert(input, it->second, where);
      check_range(input, it->second, where);
      if (!input.options.empty()) {
        const auto& chosen = std::get<std::string>(it->second);
        if (std::find(input.options.begin(), input.options.end(), chosen) == input.options.end()) {
          std::string known;
          for (const std::string& option : input.options) {
            known += (known.empty() ? "" : ", ") + option;
          }
          throw Error(where + " cannot be '" + chosen + "'; use one of: " + known);
        }
      }
      continue;
    }
    if (linked.contains(input.id)) continue;
    std::visit(
        [&](const auto& value) {
          if constexpr (!std::is_same_v<std::decay_t<decltype(value)>, std::monostate>) {
            values_[input.id] = value;
          }
        },
        std::holds_alternative<std::monostate>(input.saved_value) ? input.default_value
                                                                  : input.saved_value);
  }
}

bool NodeInputs::has_all(std::initializer_list<const char*> ids) const {
  return std::all_of(ids.begin(), ids.end(), [&](const char* id) { return has(id); });
}

const Value& NodeInputs::any(const std::string& id) const {
  auto it = values_.find(id);
  if (it == values_.end()) throw Error(schema_->display_name + ": input '" + id + "' is missing");
  return it->second;
}

}  // namespace lacuna
