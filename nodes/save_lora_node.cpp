// SPDX-License-Identifier: Apache-2.0
#include "nodes/save_lora_node.h"

#include <utility>

#include "lacuna/files/safetensors_file.h"
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
               .tooltip =
                   "File name within ComfyUI's output folder; a number is added. As in ComfyUI, "
                   "%date:yyyy-MM-dd% and %Node.widget% are filled in.",
               .default_value = std::string("loras/forget"),
               .names_file = true},
          },
      .outputs = {{"report", "report", socket::kString, "Where the file is."}},
  };
  return schema;
}

void SaveLoraNode::validate(const NodeInputs& constants) const {
  if (constants.has("filename_prefix")) {
    check_prefix(output_folder_, constants.string("filename_prefix"), ".safetensors");
  }
}

NodeResult SaveLoraNode::run(const NodeInputs& inputs, Progress& progress) {
  progress.check();
  OutputFile out = numbered_file(output_folder_, inputs.string("filename_prefix"), ".safetensors");
  write_safetensors({*inputs.get<std::shared_ptr<const LoraTensors>>("lora"), {}}, out);
  const std::string path = out.commit();
  const std::string report = "Saved " + path;
  return {.outputs = {report}, .files = {path}, .text = {report}};
}

}  // namespace lacuna
