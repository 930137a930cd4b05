// SPDX-License-Identifier: Apache-2.0
#include "nodes/lora_erase_node.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdio>

#include "lacuna/closed_form/text_entry.h"
#include "lacuna/error.h"
#include "lacuna/files/random_stream.h"
#include "lacuna/files/text.h"
#include "lacuna/training/lora_bundle.h"
#include "nodes/common_inputs.h"

namespace lacuna {
namespace {

constexpr int64_t kMostPictures = 64;  // of all concepts together, on the preview output

LoraOptions read_lora_options(const NodeInputs& inputs) {
  LoraOptions options;
  options.gradient = lora_gradient_from_string(inputs.string("gradient"));
  options.rank = inputs.integer("rank");
  options.steps = inputs.integer("steps");
  options.learning_rate = inputs.number("learning_rate");
  options.images = inputs.integer("images");
  options.sampling_steps = inputs.integer("sampling_steps");
  options.cfg = inputs.number("cfg");
  options.width = inputs.integer("width");
  options.height = inputs.integer("height");
  options.focal = {inputs.boolean("focal"), inputs.number("focal_t1"), inputs.number("focal_t2"),
                   inputs.number("focal_sharpness")};
  options.mask = mask_source_from_string(inputs.string("mask_from"));
  options.tokens = token_set_from_string(inputs.string("tokens"));
  options.batch = inputs.integer("batch");
  options.seed = inputs.integer("training_seed");
  options.refresh = inputs.integer("refresh");
  options.suppress_value = inputs.number("suppress_value");
  return options;
}

// The rules that widgets alone decide.
void check_widgets(const LoraOptions& options) {
  lacuna::check(options.focal);
  if (options.width % 8 != 0 || options.height % 8 != 0) {
    throw Error("width and height must be multiples of 8, not " + std::to_string(options.width) +
                " x " + std::to_string(options.height));
  }
  if (options.gradient == LoraGradient::kFull && options.suppress_value != 0.0) {
    throw Error("'suppress_value' works with gradient 'cached' only; set it to 0");
  }
}

// The user's own pictures, before they are encoded.
struct Pictures {
  at::Tensor images;  // [n, H, W, 3]
  at::Tensor masks;   // [n, H, W]; undefined: none given
};

Pictures read_pictures(const NodeInputs& inputs, size_t concepts) {
  Pictures out;
  if (!inputs.has("image")) {
    if (inputs.has("mask")) throw Error("LoRA Erase: 'mask' needs the 'image' it belongs to");
    return out;
  }
  out.images = inputs.get<at::Tensor>("image").detach().to(at::kCPU, at::kFloat);
  const at::Tensor& images = out.images;
  if (images.dim() != 4 || images.size(0) == 0 || images.size(3) < 3) {
    throw Error("LoRA Erase: 'image' holds no picture");
  }
  if (images.size(1) % 8 != 0 || images.size(2) % 8 != 0) {
    throw Error("LoRA Erase: the size of 'image' must be a multiple of 8 pixels, not " +
                std::to_string(images.size(2)) + " x " + std::to_string(images.size(1)));
  }
  if (!at::isfinite(images).all().item<bool>()) {
    throw Error("LoRA Erase: 'image' holds NaN or infinity");
  }
  if (!inputs.has("vae")) {
    throw Error("LoRA Erase: 'image' needs a 'vae'; connect the VAE of the checkpoint");
  }
  if (concepts != 1) {
    throw Error("LoRA Erase: pictures of your own are of one concept, but there are " +
                std::to_string(concepts) + "; use one LoRA Erase for each and chain them by LORAS");
  }
  out.images = images.narrow(3, 0, 3);
  if (!inputs.has("mask")) return out;
  at::Tensor masks = inputs.get<at::Tensor>("mask").detach().to(at::kCPU, at::kFloat);
  if (masks.dim() == 2) masks = masks.unsqueeze(0);
  if (masks.dim() != 3 || masks.size(1) != images.size(1) || masks.size(2) != images.size(2)) {
    throw Error("LoRA Erase: 'mask' must have the size of 'image', " +
                std::to_string(images.size(2)) + " x " + std::to_string(images.size(1)));
  }
  if (masks.size(0) == 1) masks = masks.expand({images.size(0), -1, -1});
  if (masks.size(0) != images.size(0)) {
    throw Error("LoRA Erase: there are " + std::to_string(images.size(0)) + " pictures but " +
                std::to_string(masks.size(0)) + " masks; give one mask, or one for each picture");
  }
  out.masks = masks.clamp(0, 1);
  for (int64_t i = 0; i < out.masks.size(0); ++i) {
    // Also false for NaN.
    if (!out.masks[i].gt(0).any().item<bool>()) {
      throw Error("LoRA Erase: mask " + std::to_string(i + 1) + " is empty; paint the subject");
    }
  }
  return out;
}

void check_bundle(const LoraBundle& bundle, Denoiser& model, TextEncoder& encoder) {
  try {
    check_weights(bundle, model, encoder);
  } catch (const Error& e) {
    throw Error("LoRA Erase: 'loras': " + std::string(e.what()) + ", or leave it unconnected");
  }
}

// The model as training sees it: base weights and what LoRAs before the node made of them.
std::string fingerprint_of(Denoiser& model, TextEncoder& encoder, Progress& progress) {
  uint64_t hash = 0;
  for (const TextEntry& projection : cross_attention(model)) {
    progress.check();
    const at::Tensor weight =
        model.effective_weight(projection.name).detach().to(at::kCPU, at::kFloat).contiguous();
    const std::string text =
        std::to_string(hash) + projection.name +
        std::to_string(stable_hash({static_cast<const char*>(weight.data_ptr()), weight.nbytes()}));
    hash = stable_hash(text);
  }
  return model.fingerprint() + '\n' + encoder.fingerprint() + '\n' + std::to_string(hash);
}

std::string key_of(const std::string& model, const Concept& item, const std::string& recipe) {
  std::string key = model + '\n' + recipe + '\n' + std::string(to_string(item.kind)) + '\n' +
                    std::to_string(item.templates) + '\n' + item.anchor;
  for (const std::string& phrase : phrases(item)) key += '\n' + phrase;
  return key;
}

std::string percent(const TrainedConcept& done) {
  char text[120];
  const double change =
      done.mass_before > 0.0 ? 100 * (done.mass_after / done.mass_before - 1) : 0.0;
  std::snprintf(text, sizeof text, "attention %.4g -> %.4g (%+.0f %%)", done.mass_before,
                done.mass_after, change);
  return text;
}

}  // namespace

const NodeSchema& LoraEraseNode::schema() const {
  static const LoraOptions defaults;
  static const NodeSchema schema{
      .id = "LacunaLoRAErase",
      .display_name = "LoRA Erase",
      .description =
          "Trains a small LoRA for each concept that takes the model's attention away from it. "
          "Combine the results with LoRA Fuse. Cancel at any time: finished concepts are kept.",
      .category = "lacuna",
      .search_aliases = {"forget", "unlearn", "erase concept", "train lora", "MACE",
                         "concept erasure"},
      .inputs =
          {
              model_input("The model that went into Attention Refine, not the one that came out: "
                          "the edit arrives through 'refinement'. It is not changed itself."),
              clip_input(),
              concepts_input(),
              {.id = "refinement",
               .display_name = "refinement",
               .type = socket::kRefinement,
               .tooltip =
                   "From Attention Refine: each LoRA is trained on top of that edit, made for "
                   "its concept alone. Method uce erases more: what attention is left reads "
                   "the anchor. mace is the paper's.",
               .optional = true},
              {.id = "loras",
               .display_name = "loras",
               .type = socket::kLoras,
               .tooltip = "Concepts trained before: they are passed on, and not trained again "
                          "unless an option changed.",
               .optional = true},
              {.id = "vae",
               .display_name = "vae",
               .type = socket::kVae,
               .tooltip = "For pictures in the preview, and to read 'image'.",
               .optional = true},
              {.id = "image",
               .display_name = "image",
               .type = socket::kImage,
               .tooltip = "Your own pictures of the concept instead of pictures that the model "
                          "draws. For one concept; needs 'vae'.",
               .optional = true},
              {.id = "mask",
               .display_name = "mask",
               .type = socket::kMask,
               .tooltip = "Where the concept is in 'image': one mask, or one for each picture.",
               .optional = true},
              {.id = "gradient",
               .display_name = "gradient",
               .type = socket::kCombo,
               .tooltip = "full: trains through the whole model, as in the paper. cached: looks "
                          "at a few pictures and trains every layer on its own; much faster, with "
                          "no more memory than drawing a picture.",
               .default_value = std::string(to_string(defaults.gradient)),
               .options = {"full", "cached"}},
              {.id = "rank",
               .display_name = "rank",
               .type = socket::kInt,
               .tooltip = "Rank of each LoRA.",
               .advanced = true,
               .default_value = defaults.rank,
               .min = 1,
               .max = 64,
               .step = 1},
              {.id = "steps",
               .display_name = "steps",
               .type = socket::kInt,
               .tooltip = "Training steps of each concept.",
               .default_value = defaults.steps,
               .min = 1,
               .max = 10000,
               .step = 1},
              {.id = "learning_rate",
               .display_name = "learning rate",
               .type = socket::kFloat,
               .tooltip = "Raise it when the concept comes through, lower it when pictures break.",
               .default_value = defaults.learning_rate,
               .min = 0.000001,
               .max = 1.0,
               .step = 0.000001},
              {.id = "images",
               .display_name = "images",
               .type = socket::kInt,
               .tooltip = "Pictures that the model draws of each concept to train on.",
               .default_value = defaults.images,
               .min = 1,
               .max = 64,
               .step = 1},
              {.id = "sampling_steps",
               .display_name = "sampling steps",
               .type = socket::kInt,
               .tooltip = "Steps of drawing those pictures.",
               .advanced = true,
               .default_value = defaults.sampling_steps,
               .min = 1,
               .max = 200,
               .step = 1},
              cfg_input(defaults.cfg, "Guidance of drawing those pictures.", true),
              side_input("width", defaults.width,
                         "Width of those pictures: what the model was made for."),
              side_input("height", defaults.height, "Height of those pictures."),
              {.id = "focal",
               .display_name = "focal timesteps",
               .type = socket::kBoolean,
               .tooltip = "Train mostly at the noise levels at which a picture gets its subject. "
                          "Off: all levels alike.",
               .advanced = true,
               .default_value = defaults.focal.enabled},
              {.id = "focal_t1",
               .display_name = "focal from",
               .type = socket::kFloat,
               .tooltip = "First of those timesteps (0 to 1000).",
               .advanced = true,
               .default_value = defaults.focal.t1,
               .min = 0.0,
               .max = 1000.0,
               .step = 10.0},
              {.id = "focal_t2",
               .display_name = "focal to",
               .type = socket::kFloat,
               .tooltip = "Last of those timesteps.",
               .advanced = true,
               .default_value = defaults.focal.t2,
               .min = 0.0,
               .max = 1000.0,
               .step = 10.0},
              {.id = "focal_sharpness",
               .display_name = "focal sharpness",
               .type = socket::kFloat,
               .tooltip = "How sharply that range begins and ends.",
               .advanced = true,
               .default_value = defaults.focal.sharpness,
               .min = 0.001,
               .max = 10.0,
               .step = 0.001},
              {.id = "mask_from",
               .display_name = "mask from",
               .type = socket::kCombo,
               .tooltip = "attention: the concept is where the model itself looks at its words "
                          "while drawing; styles are everywhere. none: the whole picture.",
               .advanced = true,
               .default_value = std::string(to_string(defaults.mask)),
               .options = {"attention", "none"}},
              {.id = "tokens",
               .display_name = "tokens",
               .type = socket::kCombo,
               .tooltip = "Attention to which tokens is taken away: the phrase's own, or also to "
                          "the end of text and padding, which repeat it.",
               .advanced = true,
               .default_value = std::string(to_string(defaults.tokens)),
               .options = {"phrase", "phrase+padding"}},
              {.id = "batch",
               .display_name = "batch",
               .type = socket::kInt,
               .tooltip = "Concepts trained together. Lower it when memory runs out.",
               .default_value = defaults.batch,
               .min = 1,
               .max = 64,
               .step = 1},
              // Not "seed": the page would add a control that changes it after every run.
              {.id = "training_seed",
               .display_name = "seed",
               .type = socket::kInt,
               .tooltip = "The same seed gives a concept the same LoRA, whatever else is in the "
                          "list.",
               .default_value = defaults.seed,
               .min = 0,
               .max = 9007199254740991.0,
               .step = 1},
              {.id = "refresh",
               .display_name = "refresh",
               .type = socket::kInt,
               .tooltip = "cached: how often the pictures are looked at again on the way.",
               .advanced = true,
               .default_value = defaults.refresh,
               .min = 0,
               .max = 10,
               .step = 1},
              {.id = "suppress_value",
               .display_name = "suppress value",
               .type = socket::kFloat,
               .tooltip = "cached: also train what the tokens contribute when they are looked at "
                          "nevertheless. 0: keys only.",
               .advanced = true,
               .default_value = defaults.suppress_value,
               .min = 0.0,
               .max = 100.0,
               .step = 0.01},
          },
      .outputs = {{"loras", "loras", socket::kLoras, "The trained concepts, for LoRA Fuse."},
                  {"preview", "preview", socket::kImage,
                   "What was trained on, darkened outside the masks."},
                  {"loss", "loss", socket::kLossMap,
                   "Loss by step, mean over concepts, for the loss graph."},
                  {"report", "report", socket::kString, "What was done, in numbers."}},
  };
  return schema;
}

void LoraEraseNode::validate(const NodeInputs& constants) const {
  if (constants.has_all({"gradient", "rank", "steps", "learning_rate", "images", "sampling_steps",
                         "cfg", "width", "height", "focal", "focal_t1", "focal_t2",
                         "focal_sharpness", "mask_from", "tokens", "batch", "training_seed",
                         "refresh", "suppress_value"})) {
    check_widgets(read_lora_options(constants));
  }
}

NodeResult LoraEraseNode::run(const NodeInputs& inputs, Progress& progress) {
  const auto& model = inputs.get<std::shared_ptr<Denoiser>>("model");
  const auto& clip = inputs.get<std::shared_ptr<TextEncoder>>("clip");
  const ConceptSet& set = *inputs.get<std::shared_ptr<const ConceptSet>>("concepts");
  const LoraOptions options = read_lora_options(inputs);

  // Everything that can be refused is refused before the first prompt is encoded.
  check_widgets(options);
  lacuna::validate(set);
  LoraTraining training{.model = *model, .encoder = *clip};
  if (inputs.has("vae")) {
    training.decoder = inputs.get<std::shared_ptr<ImageDecoder>>("vae").get();
  }
  if (inputs.has("refinement")) {
    training.refinement = inputs.get<std::shared_ptr<const Refinement>>("refinement").get();
  }
  const Pictures pictures = read_pictures(inputs, set.concepts.size());
  lacuna::check(training, options);
  check_phrases(*clip, set);
  LoraBundle bundle;
  if (inputs.has("loras")) {
    bundle = *inputs.get<std::shared_ptr<const LoraBundle>>("loras");
    check_bundle(bundle, *model, *clip);
    add_samples(bundle, *model, *clip);
  }
  if (pictures.images.defined()) {
    training.images.latents = model->from_host_latent(training.decoder->encode(pictures.images))
                                  .detach()
                                  .to(at::kCPU, at::kFloat);
    training.images.masks = pictures.masks;
    lacuna::check(training, options);
  }

  // What is there already, from LORAS or from an earlier run of this node.
  const std::string how = recipe(options, training.refinement, training.images);
  const std::string model_key = fingerprint_of(*model, *clip, progress);
  auto loan = finished_.borrow();
  std::map<std::string, TrainedConcept>& finished = *loan;
  std::erase_if(finished, [&](const auto& entry) {
    return !entry.first.starts_with(model_key + '\n' + how);  // of no use any more
  });
  std::vector<Concept> missing;
  std::map<std::string, std::shared_ptr<const ConceptLora>> ready;  // by target
  size_t from_loras = 0;
  size_t from_memory = 0;
  for (const Concept& item : set.concepts) {
    const auto same = std::find_if(
        bundle.concepts.begin(), bundle.concepts.end(),
        [&](const auto& lora) { return lora->item == item && recipe_of(*lora) == how; });
    if (same != bundle.concepts.end()) {
      ready[item.target] = *same;
      ++from_loras;
    } else if (finished.contains(key_of(model_key, item, how))) {
      ++from_memory;
    } else {
      missing.push_back(item);
    }
  }
  const auto shown = static_cast<int64_t>(set.concepts.size() - from_loras);
  training.pictures = std::max<int64_t>(1, kMostPictures / std::max<int64_t>(1, shown));
  try {
    train_loras(training, missing, options, progress, [&](TrainedConcept done) {
      const std::string key = key_of(model_key, done.lora->item, how);
      finished.insert_or_assign(key, std::move(done));
    });
  } catch (const std::exception& e) {
    // The host must see its own exception, but only we know what would help.
    if (fold_case(e.what()).find("out of memory") != std::string::npos) {
      progress.status(
          "Out of memory. Lower 'batch', choose gradient 'cached', or use smaller pictures; "
          "finished concepts are kept.");
    }
    throw;
  }

  // The list's order; concepts that only LORAS know come first, as they did before.
  std::map<std::string, TrainedConcept> used;
  std::vector<at::Tensor> previews;
  auto losses = std::make_shared<LossMap>();
  std::string lines;
  int64_t preview_count = 0;
  for (const Concept& item : set.concepts) {
    const auto it = finished.find(key_of(model_key, item, how));
    if (ready.contains(item.target) || it == finished.end()) continue;
    const TrainedConcept& done = it->second;
    ready[item.target] = done.lora;
    used.insert(*it);
    // Those of an earlier run without VAE can have another size.
    if (preview_count < kMostPictures &&
        (previews.empty() || previews[0].sizes().slice(1) == done.pictures.sizes().slice(1))) {
      previews.push_back(done.pictures);
      preview_count += done.pictures.size(0);
    }
    losses->losses.resize(done.losses.size(), 0.0);
    for (size_t i = 0; i < done.losses.size(); ++i) {
      losses->losses[i] += done.losses[i] / static_cast<double>(shown);
    }
    if (used.size() <= 20) lines += "\n" + item.target + ": " + percent(done);
  }
  if (used.size() > 20) lines += "\nand " + std::to_string(used.size() - 20) + " more";
  finished = std::move(used);

  std::erase_if(bundle.concepts,
                [&](const auto& lora) { return ready.contains(lora->item.target); });
  const size_t passed_on = bundle.concepts.size();
  for (const Concept& item : set.concepts) bundle.concepts.push_back(ready.at(item.target));
  bundle.preserve = set.preserve;
  bundle.general_prior = set.general_prior;
  // What LORAS say stays: those are the same weights, maybe in a finer type.
  const bool all_new = passed_on + from_loras == 0;
  if (all_new || bundle.model_fingerprint.empty()) {
    bundle.model_fingerprint = model->fingerprint();
    bundle.model_samples = model->weight_samples();
  }
  if (all_new || bundle.encoder_fingerprint.empty()) {
    bundle.encoder_fingerprint = clip->fingerprint();
    bundle.encoder_samples = clip->weight_samples();
  }

  std::string text = "Trained " + std::to_string(missing.size()) +
                     (missing.size() == 1 ? " concept" : " concepts") + " (" +
                     std::string(to_string(options.gradient)) + ", rank " +
                     std::to_string(options.rank) + ", " + std::to_string(options.steps) +
                     " steps)";
  if (from_memory > 0) text += ", " + std::to_string(from_memory) + " were ready";
  if (from_loras > 0) text += ", " + std::to_string(from_loras) + " came from LORAS";
  if (passed_on > 0) text += ", " + std::to_string(passed_on) + " others passed on";
  text += "." + lines;

  // Both must be something to show even when nothing was trained.
  at::Tensor preview =
      previews.empty() ? at::zeros({1, options.height, options.width, 3}) : at::cat(previews);
  if (preview.size(0) > kMostPictures) preview = preview.narrow(0, 0, kMostPictures);
  if (losses->losses.empty()) losses->losses.push_back(0.0);
  NodeResult result;
  result.text = {text};
  result.outputs = {std::make_shared<const LoraBundle>(std::move(bundle)), std::move(preview),
                    std::shared_ptr<const LossMap>(std::move(losses)), std::move(text)};
  return result;
}

}  // namespace lacuna
