// SPDX-License-Identifier: Apache-2.0
#include "nodes/lora_bundle_nodes.h"

#include <filesystem>
#include <system_error>
#include <utility>

#include "lacuna/error.h"
#include "lacuna/training/lora_bundle.h"
#include "nodes/numbered_path.h"

namespace lacuna {

namespace fs = std::filesystem;

SaveBundleNode::SaveBundleNode(std::string output_folder)
    : output_folder_(std::move(output_folder)) {}

const NodeSchema& SaveBundleNode::schema() const {
  static const NodeSchema schema{
      .id = "LacunaSaveBundle",
      .display_name = "Save Erasure Bundle",
      .description =
          "Saves trained concepts with all that LoRA Fuse needs, so that they can be fused again "
          "later, with others, without training. For a LoRA that other programs load, use Save "
          "Erasure LoRA.",
      .category = "lacuna",
      .search_aliases = {"save bundle", "save loras", "forget"},
      .output_node = true,
      .inputs =
          {
              {.id = "loras",
               .display_name = "loras",
               .type = socket::kLoras,
               .tooltip = "The LORAS of LoRA Erase or LoRA Fuse."},
              {.id = "filename_prefix",
               .display_name = "filename prefix",
               .type = socket::kString,
               .tooltip =
                   "File name within ComfyUI's output folder; a number is added. As in ComfyUI, "
                   "%date:yyyy-MM-dd% and %Node.widget% are filled in.",
               .default_value = std::string("lacuna/bundle"),
               .names_file = true},
          },
      .outputs = {{"report", "report", socket::kString, "Where the file is."}},
  };
  return schema;
}

void SaveBundleNode::validate(const NodeInputs& constants) const {
  if (constants.has("filename_prefix")) {
    check_prefix(output_folder_, constants.string("filename_prefix"), ".safetensors");
  }
}

NodeResult SaveBundleNode::run(const NodeInputs& inputs, Progress& progress) {
  progress.check();
  const LoraBundle& bundle = *inputs.get<std::shared_ptr<const LoraBundle>>("loras");
  const SafetensorsFile file = to_safetensors(bundle);
  OutputFile out = numbered_file(output_folder_, inputs.string("filename_prefix"), ".safetensors");
  write_safetensors(file, out);
  const std::string path = out.commit();
  const size_t n = bundle.concepts.size();
  const std::string report =
      "Saved " + std::to_string(n) + (n == 1 ? " concept: " : " concepts: ") + path;
  return {.outputs = {report}, .files = {path}, .text = {report}};
}

LoadBundleNode::LoadBundleNode(std::string output_folder)
    : output_folder_(std::move(output_folder)) {}

const NodeSchema& LoadBundleNode::schema() const {
  static const NodeSchema schema{
      .id = "LacunaLoadBundle",
      .display_name = "Load Erasure Bundle",
      .description =
          "Loads trained concepts from a file of Save Erasure Bundle, for LoRA Fuse, or for LoRA "
          "Erase to go on from.",
      .category = "lacuna",
      .search_aliases = {"load bundle", "load loras", "forget"},
      .inputs = {{.id = "file",
                  .display_name = "file",
                  .type = socket::kString,
                  .tooltip = "File within ComfyUI's output folder.",
                  .default_value = std::string("lacuna/bundle_00001_.safetensors")}},
      .outputs = {{"loras", "loras", socket::kLoras, "The trained concepts, for LoRA Fuse."},
                  {"concepts", "concepts", socket::kConcepts,
                   "Its concepts and preserve list, for nodes that take a Concept Set."},
                  {"report", "report", socket::kString, "What the file holds."}},
      .reads_files = true,
  };
  return schema;
}

void LoadBundleNode::validate(const NodeInputs& constants) const {
  if (constants.has("file")) path_within(output_folder_, constants.string("file"));
}

std::string LoadBundleNode::outside_state(const NodeInputs& constants) const {
  if (!constants.has("file")) return "";
  const fs::path path = path_within(output_folder_, constants.string("file"));
  std::error_code error;
  const auto size = fs::file_size(path, error);
  if (error) return "absent";
  const auto time = fs::last_write_time(path, error);
  return std::to_string(size) + "@" + std::to_string(time.time_since_epoch().count());
}

NodeResult LoadBundleNode::run(const NodeInputs& inputs, Progress& progress) {
  progress.check();
  const std::string& file = inputs.string("file");
  const std::string path = path_within(output_folder_, file);
  std::error_code ignored;
  if (!fs::is_regular_file(path, ignored)) {
    throw Error("there is no file '" + file + "' in the output folder (" + output_folder_ +
                "); give the name that Save Erasure Bundle reported, or copy the file there");
  }
  auto bundle = std::make_shared<const LoraBundle>(load_bundle(path));
  auto concepts = std::make_shared<const ConceptSet>(concept_set_of(*bundle));
  const size_t n = bundle->concepts.size();
  std::string report = "Loaded " + std::to_string(n) + (n == 1 ? " concept: " : " concepts: ");
  for (size_t i = 0; i < n && i < 10; ++i) {
    report += (i == 0 ? "" : ", ") + bundle->concepts[i]->item.target;
  }
  if (n > 10) report += " and " + std::to_string(n - 10) + " more";
  if (const std::string name = short_name(model_of(*bundle)); !name.empty()) {
    report += "\nTrained on base model " + name + ".";
  }
  return {.outputs = {std::move(bundle), std::move(concepts), report}, .text = {report}};
}

}  // namespace lacuna
