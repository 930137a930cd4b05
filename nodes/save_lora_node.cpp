// SPDX-License-Identifier: Apache-2.0
#include "nodes/save_lora_node.h"

#include <utility>

#include "lacuna/safetensors_file.h"
#include "nodes/numbered_path.h"

namespace lacuna {

SaveLoraNode::SaveLoraNode(std::string output_folder) : output_folder_(std::move(output_folder)) {}

const NodeSchema& SaveLoraNode::schema() const {
  static const NodeSchema schema{
      .id = "LacunaSaveLoRA",
      .display_name = "Save Erasure LoRA",
      .description =
          "Saves the edit as a LoRA file that ComfyUI, A1111/Forge and diffusers load like any "
          "other. Move it to the folder with your LoRAs to use it.",
      .category = "lacuna",
      .search_aliases = {"save lora", "export lora", "forget lora"},
      .output_node = true,
      .inputs =
          {
              {.id = "lora",
               .display_name = "lora",
               .type = socket::kLoraModel,
               .tooltip = "The LORA_MODEL of Attention Refine."},
              {.id = "filename_prefix",
               .display_name = "filename prefix",
               .type = socket::kString,
               .tooltip = "File name within ComfyUI's output folder; a number is added.",
               .default_value = std::string("loras/forget")},
          },
      .outputs = {{"report", "report", socket::kString, "Where the file is."}},
  };
  return schema;
}

void SaveLoraNode::validate(const NodeInputs& constants) const {
  if (constants.has("filename_prefix")) {
    numbered_path(output_folder_, constants.string("filename_prefix"), ".safetensors");
  }
}

NodeResult SaveLoraNode::run(const NodeInputs& inputs, Progress& progress) {
  progress.check();
  const std::string path =
      numbered_path(output_folder_, inputs.string("filename_prefix"), ".safetensors");
  save_safetensors({*inputs.get<std::shared_ptr<const LoraTensors>>("lora"), {}}, path);
  const std::string report = "Saved " + path;
  return {.outputs = {report}, .files = {path}, .text = {report}};
}

}  // namespace lacuna
