// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "nodes/node_schema.h"
#include "nodes/value.h"

namespace lacuna {

// What a node hands to Python for LACUNA_* links: an opaque reference.
struct ConceptSetRef {
  std::shared_ptr<const ConceptSet> value;
};
struct RefinementRef {
  std::shared_ptr<const Refinement> value;
};
struct LoraBundleRef {
  std::shared_ptr<const LoraBundle> value;
};

// Both need the GIL. to_value throws Error naming the input when the object does not fit its type.
Value to_value(const InputSpec& input, pybind11::handle object);
pybind11::object to_python(const Value& value);

}  // namespace lacuna
