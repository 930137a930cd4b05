// SPDX-License-Identifier: Apache-2.0
#include "nodes/host_nodes.h"

#include <ATen/ops/zeros.h>

#include <functional>
#include <utility>

#include "lacuna/error.h"
#include "lacuna/files/image_file.h"
#include "lacuna/files/safetensors_file.h"
#include "nodes/numbered_path.h"

namespace lacuna {
namespace {

using Run = std::function<NodeResult(const NodeInputs&, Progress&)>;

// These node types have no state and no rules beyond their schema and the names of files.
class HostNode final : public Node {
 public:
  HostNode(NodeSchema schema, Run run, std::string output_folder)
      : schema_(std::move(schema)),
        run_(std::move(run)),
        output_folder_(std::move(output_folder)) {}
  const NodeSchema& schema() const override { return schema_; }
  void validate(const NodeInputs& constants) const override {
    for (const InputSpec& input : schema_.inputs) {
      if (!input.names_file || !constants.has(input.id)) continue;
      check_prefix(output_folder_, constants.string(input.id), ".safetensors");
    }
  }
  NodeResult run(const NodeInputs& inputs, Progress& progress) override {
    return run_(inputs, progress);
  }

 private:
  NodeSchema schema_;
  Run run_;
  std::string output_folder_;
};

InputSpec link(const char* id, const char* type) { return {.id = id, .type = type}; }

InputSpec text(const char* id, const char* default_value) {
  return {.id = id, .type = socket::kString, .default_value = std::string(default_value)};
}

InputSpec prefix(const char* id, const char* default_value) {
  InputSpec spec = text(id, default_value);
  spec.names_file = true;
  return spec;
}

InputSpec file(const char* id) { return {.id = id, .type = socket::kCombo}; }

InputSpec number(const char* id, double value, double min, double max) {
  return {.id = id, .type = socket::kFloat, .default_value = value, .min = min, .max = max};
}

InputSpec whole(const char* id, int64_t value, double min, double max) {
  return {.id = id, .type = socket::kInt, .default_value = value, .min = min, .max = max};
}

OutputSpec output(const char* id, const char* type) { return {id, id, type, ""}; }

NodeResult save_images(const NodeInputs& inputs, const std::string& folder,
                       const std::string& prefix, const std::string& workflow_json) {
  NodeResult result;
  const at::Tensor& images = inputs.get<at::Tensor>("images");
  for (int64_t i = 0; i < images.size(0); ++i) {
    OutputFile out = numbered_file(folder, prefix, ".png", images.size(2), images.size(1));
    write_png(images[i], out, {{"prompt", workflow_json}});
    result.images.push_back(out.commit());
  }
  return result;
}

std::string any_to_text(const Value& value) {
  return std::visit(
      [](const auto& item) -> std::string {
        using T = std::decay_t<decltype(item)>;
        if constexpr (std::is_same_v<T, std::string>) {
          return item;
        } else if constexpr (std::is_same_v<T, bool>) {
          return item ? "true" : "false";
        } else if constexpr (std::is_same_v<T, int64_t> || std::is_same_v<T, double>) {
          return std::to_string(item);
        } else {
          throw Error("only text, numbers and true/false can be previewed here");
        }
      },
      value);
}

}  // namespace

void add_host_nodes(NodeRegistry& registry, std::shared_ptr<Application> application,
                    const std::string& workflow_json) {
  using namespace socket;
  const std::string folder = application->output_directory();
  const auto add = [&](NodeSchema schema, Run run) {
    if (schema.display_name.empty()) schema.display_name = schema.id;
    registry.add(std::make_unique<HostNode>(std::move(schema), std::move(run), folder));
  };

  add({.id = "CheckpointLoaderSimple",
       .inputs = {file("ckpt_name")},
       .outputs = {output("MODEL", kModel), output("CLIP", kClip), output("VAE", kVae)}},
      [application](const NodeInputs& inputs, Progress&) {
        Checkpoint checkpoint = application->load_checkpoint(inputs.string("ckpt_name"));
        return NodeResult{
            .outputs = {checkpoint.denoiser, checkpoint.text_encoder, checkpoint.image_decoder}};
      });

  const auto load_lora = [application](const NodeInputs& inputs) {
    return application->load_lora(inputs.get<std::shared_ptr<Denoiser>>("model"),
                                  inputs.string("lora_name"), inputs.number("strength_model"));
  };
  add({.id = "LoraLoaderModelOnly",
       .inputs = {link("model", kModel), file("lora_name"),
                  number("strength_model", 1.0, -100, 100)},
       .outputs = {output("MODEL", kModel)}},
      [load_lora](const NodeInputs& inputs, Progress&) {
        return NodeResult{.outputs = {load_lora(inputs)}};
      });
  add({.id = "LoraLoader",
       .inputs = {link("model", kModel), link("clip", kClip), file("lora_name"),
                  number("strength_model", 1.0, -100, 100),
                  number("strength_clip", 1.0, -100, 100)},
       .outputs = {output("MODEL", kModel), output("CLIP", kClip)}},
      [load_lora](const NodeInputs& inputs, Progress&) {
        return NodeResult{.outputs = {load_lora(inputs), inputs.any("clip")}};
      });

  add({.id = "CLIPTextEncode",
       .inputs = {text("text", ""), link("clip", kClip)},
       .outputs = {output("CONDITIONING", kConditioning)}},
      [](const NodeInputs& inputs, Progress&) {
        const std::string& prompt = inputs.string("text");
        if (prompt.find_first_of("()") != std::string::npos) {
          throw Error(
              "emphasis such as (word:1.2) is not supported headless; write the prompt "
              "without brackets");
        }
        const auto& clip = inputs.get<std::shared_ptr<TextEncoder>>("clip");
        const auto tokens = static_cast<int64_t>(clip->tokenize(prompt).size());
        if (tokens > clip->window()) {
          throw Error("the prompt has " + std::to_string(tokens) +
                      " tokens, the text encoder reads " + std::to_string(clip->window()) +
                      "; shorten it");
        }
        return NodeResult{.outputs = {clip->conditioning({prompt})}};
      });

  add({.id = "EmptyLatentImage",
       .inputs = {whole("width", 512, 16, 16384), whole("height", 512, 16, 16384),
                  whole("batch_size", 1, 1, 4096)},
       .outputs = {output("LATENT", kLatent)}},
      [](const NodeInputs& inputs, Progress&) {
        return NodeResult{
            .outputs = {at::zeros({inputs.integer("batch_size"), 4, inputs.integer("height") / 8,
                                   inputs.integer("width") / 8})}};
      });

  add({.id = "KSampler",
       .inputs = {link("model", kModel),
                  {.id = "seed", .type = kInt, .default_value = int64_t{0}},
                  whole("steps", 20, 1, 10000),
                  number("cfg", 8.0, 0, 100),
                  file("sampler_name"),
                  file("scheduler"),
                  link("positive", kConditioning),
                  link("negative", kConditioning),
                  link("latent_image", kLatent),
                  number("denoise", 1.0, 0, 1)},
       .outputs = {output("LATENT", kLatent)}},
      [](const NodeInputs& inputs, Progress& progress) {
        SamplingRequest request;
        request.seed = inputs.integer("seed");
        request.steps = inputs.integer("steps");
        request.cfg = inputs.number("cfg");
        request.sampler = inputs.string("sampler_name");
        request.scheduler = inputs.string("scheduler");
        request.positive = inputs.get<at::Tensor>("positive");
        request.negative = inputs.get<at::Tensor>("negative");
        request.latent = inputs.get<at::Tensor>("latent_image");
        request.denoise = inputs.number("denoise");
        at::Tensor latent = inputs.get<std::shared_ptr<Denoiser>>("model")->sample(
            request, [&](int64_t done, int64_t total) {
              progress.check();
              progress.report(done, total);
            });
        return NodeResult{.outputs = {std::move(latent)}};
      });

  add({.id = "VAEDecode",
       .inputs = {link("samples", kLatent), link("vae", kVae)},
       .outputs = {output("IMAGE", kImage)}},
      [](const NodeInputs& inputs, Progress&) {
        return NodeResult{.outputs = {inputs.get<std::shared_ptr<ImageDecoder>>("vae")->decode(
                              inputs.get<at::Tensor>("samples"))}};
      });

  add({.id = "SaveImage",
       .output_node = true,
       .inputs = {link("images", kImage), prefix("filename_prefix", "ComfyUI")}},
      [folder, workflow_json](const NodeInputs& inputs, Progress&) {
        return save_images(inputs, folder, inputs.string("filename_prefix"), workflow_json);
      });
  add({.id = "PreviewImage", .output_node = true, .inputs = {link("images", kImage)}},
      [folder, workflow_json](const NodeInputs& inputs, Progress&) {
        return save_images(inputs, folder, "preview/preview", workflow_json);
      });
  // ComfyUI renamed this node; workflows of both ages are around.
  for (const char* id : {"SaveLoRA", "SaveLoRANode"}) {
    add({.id = id,
         .output_node = true,
         .inputs = {link("lora", kLoraModel),
                    prefix("prefix", "loras/ComfyUI_trained_lora"),
                    {.id = "steps", .type = kInt, .optional = true}}},
        [folder](const NodeInputs& inputs, Progress&) {
          OutputFile out = numbered_file(folder, inputs.string("prefix"), ".safetensors");
          write_safetensors({*inputs.get<std::shared_ptr<const LoraTensors>>("lora"), {}}, out);
          return NodeResult{.files = {out.commit()}};
        });
  }
  add({.id = "PreviewAny", .output_node = true, .inputs = {link("source", kAny)}},
      [](const NodeInputs& inputs, Progress&) {
        return NodeResult{.text = {any_to_text(inputs.any("source"))}};
      });
}

}  // namespace lacuna
