// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace lacuna {

// Declarative description of a node: everything a host needs to show it. Ids, input order, widget
// order and output order never change once released; new inputs are appended, with a default.

// Socket and widget types by the names ComfyUI uses.
namespace socket {
inline constexpr const char* kModel = "MODEL";
inline constexpr const char* kClip = "CLIP";
inline constexpr const char* kVae = "VAE";
inline constexpr const char* kConditioning = "CONDITIONING";
inline constexpr const char* kLatent = "LATENT";
inline constexpr const char* kImage = "IMAGE";
inline constexpr const char* kString = "STRING";
inline constexpr const char* kInt = "INT";
inline constexpr const char* kFloat = "FLOAT";
inline constexpr const char* kBoolean = "BOOLEAN";
inline constexpr const char* kCombo = "COMBO";
inline constexpr const char* kLoraModel = "LORA_MODEL";
inline constexpr const char* kConcepts = "LACUNA_CONCEPTS";
inline constexpr const char* kRefinement = "LACUNA_REFINEMENT";
inline constexpr const char* kLoras = "LACUNA_LORAS";
inline constexpr const char* kClipVision = "CLIP_VISION";
inline constexpr const char* kDetector = "LACUNA_DETECTOR";
inline constexpr const char* kMask = "MASK";
inline constexpr const char* kLossMap = "LOSS_MAP";
inline constexpr const char* kAny = "*";
}  // namespace socket

using WidgetDefault = std::variant<std::monostate, bool, int64_t, double, std::string>;

struct InputSpec {
  std::string id = {};
  std::string display_name = {};
  std::string type = {};
  std::string tooltip = {};
  bool optional = false;
  bool advanced = false;
  bool multiline = false;
  WidgetDefault default_value = {};  // monostate: a socket, filled by a link only
  // Of graphs that were saved before the input was there; monostate: the default.
  WidgetDefault saved_value = {};
  std::optional<double> min = {};
  std::optional<double> max = {};
  std::optional<double> step = {};
  std::vector<std::string> options = {};  // of a COMBO; empty: the host decides (file lists)
  bool names_file = false;  // of a STRING: whoever runs the node fills in %Node.widget%
};

struct OutputSpec {
  std::string id = {};
  std::string display_name = {};
  std::string type = {};
  std::string tooltip = {};
};

struct NodeSchema {
  std::string id = {};
  std::string display_name = {};
  std::string description = {};
  std::string category = {};
  std::vector<std::string> search_aliases = {};
  bool output_node = false;
  std::vector<InputSpec> inputs = {};
  std::vector<OutputSpec> outputs = {};
  bool reads_files = false;  // ask the node for its outside_state before a kept result is used
};

const InputSpec* find_input(const NodeSchema& schema, const std::string& id);

// JSON list of schemas, the form hosts read.
std::string to_json(const std::vector<NodeSchema>& schemas);

}  // namespace lacuna
