// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <initializer_list>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "lacuna/error.h"
#include "nodes/file_name.h"
#include "nodes/node_schema.h"
#include "nodes/value.h"

namespace lacuna {

// In the inputs that name a file, %Node.widget% as file_name.h says.
void fill_in_widgets(const NodeSchema& schema, std::map<std::string, Value>& values,
                     const WidgetTexts& widgets);

// The inputs of one run, checked against the schema: types, ranges, options. Absent widgets read as
// their default, unless they are linked: then their value is not known before the run.
class NodeInputs {
 public:
  // Throws Error that names the node and the input. Missing sockets are allowed here: validation
  // happens before links are filled.
  NodeInputs(const NodeSchema& schema, std::map<std::string, Value> values,
             const std::set<std::string>& linked = {});

  bool has(const std::string& id) const { return values_.contains(id); }
  bool has_all(std::initializer_list<const char*> ids) const;

  bool boolean(const std::string& id) const { return get<bool>(id); }
  int64_t integer(const std::string& id) const { return get<int64_t>(id); }
  double number(const std::string& id) const { return get<double>(id); }
  const std::string& string(const std::string& id) const { return get<std::string>(id); }

  // A required value of a given type, e.g. std::shared_ptr<Denoiser>. Throws Error when missing.
  template <typename T>
  const T& get(const std::string& id) const {
    auto it = values_.find(id);
    const T* value = it == values_.end() ? nullptr : std::get_if<T>(&it->second);
    if (value == nullptr) throw Error(schema_->display_name + ": input '" + id + "' is missing");
    return *value;
  }
  const Value& any(const std::string& id) const;

 private:
  const NodeSchema* schema_;
  std::map<std::string, Value> values_;
};

}  // namespace lacuna
