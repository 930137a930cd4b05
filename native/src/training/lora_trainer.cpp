// SPDX-License-Identifier: Apache-2.0
#include "lacuna/training/lora_trainer.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <utility>

#include "lacuna/error.h"
#include "lacuna/files/json_text.h"
#include "lacuna/files/random_stream.h"
#include "lacuna/files/weight_samples.h"
#include "lacuna/training/adam_w.h"
#include "lacuna/training/attention_tap.h"
#include "lacuna/training/concept_images.h"
#include "training/concept_job.h"
#include "training/training_progress.h"

namespace lacuna {
namespace {

using nlohmann::ordered_json;

// Queries kept of one layer and picture: a quarter of the largest layer of SD1.x at 512 pixels.
constexpr int64_t kMaxQueries = 1024;

// Training needs a graph, whatever the caller's mode; forward passes that only look do not.
struct TrainingScope {
  c10::InferenceMode no_inference_mode{false};
  at::AutoGradMode no_grad{false};
};

using Group = std::vector<std::unique_ptr<ConceptJob>>;

std::string label_of(const Group& group) {
  std::string label = group.front()->item->target;
  if (group.size() > 1) label += " and " + std::to_string(group.size() - 1) + " more";
  return label;
}

// One of each concept.
std::vector<Draw> next_draws(std::vector<Draws>& draws, const Group& group) {
  std::vector<Draw> shown;
  for (size_t i = 0; i < group.size(); ++i) shown.push_back(draws[i].next(*group[i]));
  return shown;
}

std::vector<at::Tensor> parameters_of(LayerPairs& pairs) {
  return {pairs.key.up, pairs.key.down, pairs.value.up, pairs.value.down};
}

class Trainer {
 public:
  Trainer(const LoraTraining& training, const LoraOptions& options, size_t concepts,
          Progress& progress)
      : training_(training),
        model_(training.model),
        options_(options),
        progress_(progress),
        checks_(progress),
        layers_(trained_layers(model_, training.encoder.width())),
        levels_(model_, options.focal),
        effort_(progress, static_cast<int64_t>(concepts) * passes_per_concept()),
        preparation_(training, options, layers_, levels_, effort_, progress) {}

  // Concepts [begin, end) of the list, trained together.
  void train(const std::vector<Concept>& concepts, size_t begin, size_t end,
             const std::function<void(TrainedConcept)>& on_finished) {
    Group group;
    for (size_t i = begin; i < end; ++i) group.push_back(preparation_.prepare(concepts[i]));
    const std::vector<double> before = measure(group);
    for (size_t i = 0; i < group.size(); ++i) group[i]->mass_before = before[i];
    if (options_.gradient == LoraGradient::kFull) {
      train_full(group);
    } else {
      train_cached(group);
    }
    const std::vector<double> after = measure(group);
    for (size_t i = 0; i < group.size(); ++i) on_finished(finish(*group[i], after[i]));
  }

 private:
  int64_t passes_per_concept() const {
    const bool full = options_.gradient == LoraGradient::kFull;
    const int64_t training =
        full ? 3 * options_.steps  // a backward pass costs about two forward passes
             : (options_.refresh + 1) * (options_.captures + static_cast<int64_t>(layers_.size()));
    return drawing_passes(training_, options_) + training + 2 * options_.evaluations;
  }

  // A conditional forward pass of one draw of each concept, under the caller's grad mode.
  std::unique_ptr<LoraTap> forward(const Group& group, const std::vector<Draw>& draws,
                                   int64_t capture_limit = 0) {
    progress_.check();
    std::vector<TapSample> samples;
    std::vector<at::Tensor> noisy, sigma, original, context, pooled;
    for (size_t i = 0; i < group.size(); ++i) {
      const ConceptJob& job = *group[i];
      const Draw& draw = draws[i];
      samples.push_back({&job.pairs, job.tokens[draw.prompt],
                         job.images.masks.defined() ? job.images.masks[draw.image] : at::Tensor()});
      noisy.push_back(job.images.latents[draw.image] + draw.sigma * draw.noise);
      sigma.push_back(at::full({}, draw.sigma, at::kFloat));
      original.push_back(job.prompts.embedding.context[draw.prompt]);
      context.push_back(job.host_context[draw.prompt]);
      if (job.prompts.embedding.pooled.defined()) {
        pooled.push_back(job.prompts.embedding.pooled[draw.prompt]);
      }
    }
    DenoiseRequest pass;
    pass.noisy = at::stack(noisy);
    pass.sigma = at::stack(sigma);
    pass.text.context = at::stack(context);
    if (!pooled.empty()) pass.text.pooled = at::stack(pooled);
    pass.attention_only = true;
    auto tap = std::make_unique<LoraTap>(std::move(samples), at::stack(original),
                                         pass.noisy.size(2), pass.noisy.size(3), progress_);
    tap->capture_queries(capture_limit);
    model_.denoise(pass, tap.get());
    if (!tap->losses().defined()) throw Error("the model never showed its cross-attention");
    return tap;
  }

  static void check_loss(const ConceptJob& job, double loss) {
    if (!std::isfinite(loss)) {
      throw Error("training '" + job.item->target +
                  "' stopped: its loss became NaN or infinity; lower the learning rate, or use a "
                  "model in float32 or bfloat16");
    }
  }

  // Mean loss over the fixed draws, by concept.
  std::vector<double> measure(const Group& group) {
    std::vector<double> sums(group.size(), 0.0);
    for (int64_t k = 0; k < options_.evaluations; ++k) {
      std::vector<Draw> draws;
      for (const auto& job : group) draws.push_back(job->evaluation[static_cast<size_t>(k)]);
      const at::Tensor losses = forward(group, draws)->losses().to(at::kCPU, at::kDouble);
      for (size_t i = 0; i < group.size(); ++i) {
        sums[i] += losses[static_cast<int64_t>(i)].item<double>() /
                   static_cast<double>(options_.evaluations);
      }
      effort_.add(static_cast<int64_t>(group.size()));
    }
    for (size_t i = 0; i < group.size(); ++i) check_loss(*group[i], sums[i]);
    return sums;
  }

  void show_step(const Group& group, int64_t step) {
    double loss = 0.0;
    for (const auto& job : group) loss += job->losses[static_cast<size_t>(step)];
    char text[80];
    std::snprintf(text, sizeof text, ", loss %.3g, ", loss / static_cast<double>(group.size()));
    progress_.status(label_of(group) + ": step " + std::to_string(step + 1) + " of " +
                     std::to_string(options_.steps) + text + effort_.time_left());
  }

  void train_full(Group& group) {
    std::vector<Draws> draws;
    std::vector<AdamW> optimizers;
    std::vector<at::Tensor> parameters;
    for (auto& job : group) {
      draws.emplace_back(options_.seed, *job, "training", levels_);
      std::vector<at::Tensor> own;
      for (auto& [name, pairs] : job->pairs) {
        for (at::Tensor& parameter : parameters_of(pairs)) own.push_back(std::move(parameter));
      }
      parameters.insert(parameters.end(), own.begin(), own.end());
      optimizers.emplace_back(std::move(own), options_.learning_rate);
    }
    for (int64_t step = 0; step < options_.steps; ++step) {
      const std::vector<at::Tensor> gradients =
          gradients_of(group, next_draws(draws, group), parameters);
      auto next = gradients.begin();
      for (AdamW& optimizer : optimizers) {
        const auto end = next + static_cast<std::ptrdiff_t>(optimizer.parameters().size());
        optimizer.step({next, end});
        next = end;
      }
      effort_.add(3 * static_cast<int64_t>(group.size()));
      show_step(group, step);
    }
  }

  std::vector<at::Tensor> gradients_of(Group& group, const std::vector<Draw>& draws,
                                       const std::vector<at::Tensor>& parameters) {
    const at::AutoGradMode with_grad(true);
    const std::unique_ptr<LoraTap> tap = forward(group, draws);
    const at::Tensor losses = tap->losses();
    const at::Tensor values = losses.detach().to(at::kCPU, at::kDouble);
    for (size_t i = 0; i < group.size(); ++i) {
      const double loss = values[static_cast<int64_t>(i)].item<double>();
      check_loss(*group[i], loss);
      group[i]->losses.push_back(loss);
    }
    progress_.check();
    try {
      std::vector<at::Tensor> gradients =
          torch::autograd::grad({losses.sum() * kLossScale}, parameters, {}, std::nullopt, false,
                                /*allow_unused=*/true);
      for (at::Tensor& gradient : gradients) {
        if (gradient.defined()) gradient = gradient / kLossScale;
      }
      return gradients;
    } catch (const std::runtime_error&) {
      if (tap->interruption()) std::rethrow_exception(tap->interruption());
      throw;
    }
  }

  // Passes of the whole group, with the queries that they showed.
  using Captures = std::vector<std::unique_ptr<LoraTap>>;

  void train_cached(Group& group) {
    std::vector<Draws> draws;
    std::vector<std::map<std::string, AdamW>> optimizers(group.size());
    for (size_t i = 0; i < group.size(); ++i) {
      ConceptJob& job = *group[i];
      draws.emplace_back(options_.seed, job, "training", levels_);
      job.losses.assign(static_cast<size_t>(options_.steps), 0.0);
      for (auto& [name, pairs] : job.pairs) {
        std::vector<at::Tensor> parameters = parameters_of(pairs);
        if (options_.suppress_value == 0.0) parameters.resize(2);
        optimizers[i].emplace(name, AdamW(std::move(parameters), options_.learning_rate));
      }
    }
    const int64_t rounds = options_.refresh + 1;
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t first = options_.steps * round / rounds;
      const int64_t last = options_.steps * (round + 1) / rounds;
      Captures captures;
      for (int64_t k = 0; k < options_.captures; ++k) {
        captures.push_back(forward(group, next_draws(draws, group), kMaxQueries));
        effort_.add(static_cast<int64_t>(group.size()));
        progress_.status(label_of(group) + ": looking at pictures, " + effort_.time_left());
      }
      for (size_t i = 0; i < group.size(); ++i) {
        // Which capture and which prompt each step shows, the same in every layer.
        std::vector<std::pair<size_t, int64_t>> shown;
        Draws picks(options_.seed, *group[i], "picks " + std::to_string(round), levels_);
        for (int64_t step = first; step < last; ++step) {
          const int64_t capture = picks.by_epochs(options_.captures);
          shown.emplace_back(static_cast<size_t>(capture),
                             picks.below(group[i]->prompts.embedding.context.size(0)));
        }
        for (const TrainedLayer& layer : layers_) {
          train_layer(*group[i], i, layer, captures, shown, first, optimizers[i].at(layer.name));
          effort_.add(1);
        }
        for (int64_t step = first; step < last; ++step) {
          check_loss(*group[i], group[i]->losses[static_cast<size_t>(step)]);
        }
      }
      if (last > first) show_step(group, last - 1);
    }
  }

  // The same loss as in `full`, of one layer, with the queries as they were captured.
  void train_layer(ConceptJob& job, size_t index, const TrainedLayer& layer,
                   const Captures& captures, const std::vector<std::pair<size_t, int64_t>>& shown,
                   int64_t first_step, AdamW& optimizer) {
    const auto weight_of = [&](const TextEntry& projection, const at::Tensor& like) {
      const at::Tensor weight = model_.effective_weight(projection.name).detach();
      return (weight.is_inference() ? weight.clone() : weight).to(like.options());
    };
    const LayerPairs& pairs = job.pairs.at(layer.name);
    at::Tensor key_weight, value_weight;
    for (size_t s = 0; s < shown.size(); ++s) {
      progress_.check();
      const auto& [capture, prompt] = shown[s];
      const CapturedQueries& queries = captures[capture]->captured().at(layer.name);
      const at::Tensor query = queries.queries[index].unsqueeze(0);
      if (query.size(1) == 0) continue;  // the mask leaves nothing of so small a map
      if (!key_weight.defined()) {
        key_weight = weight_of(layer.key, query).t();
        if (options_.suppress_value > 0.0) value_weight = weight_of(layer.value, query).t();
      }
      const auto row = [&query, prompt = prompt](const at::Tensor& rows) {
        return rows.narrow(0, prompt, 1).to(query.options());
      };
      const at::Tensor original = row(job.prompts.embedding.context);
      const at::Tensor mapped = row(job.host_context);
      const at::Tensor tokens = row(job.tokens);
      const at::Tensor pixel_weights = queries.pixel_weights[index].unsqueeze(0);

      const at::AutoGradMode with_grad(true);
      const at::Tensor key = add_pairs(at::matmul(mapped, key_weight), original, {&pairs.key});
      const at::Tensor probabilities = attention_probabilities(query, key, queries.heads);
      at::Tensor loss = attention_mass(probabilities, pixel_weights, tokens);
      job.losses[static_cast<size_t>(first_step) + s] += loss.item<double>();
      if (value_weight.defined()) {
        const at::Tensor value =
            add_pairs(at::matmul(mapped, value_weight), original, {&pairs.value});
        const at::Tensor contribution =
            weighted_values(probabilities.detach() * tokens.unsqueeze(1).unsqueeze(1), value);
        const at::Tensor squared =
            (contribution.square().sum(2) * pixel_weights).sum().clamp_min(1e-12);
        loss = loss + options_.suppress_value * squared.sqrt();
      }
      optimizer.step(torch::autograd::grad({loss.sum()}, optimizer.parameters()));
    }
  }

  TrainedConcept finish(ConceptJob& job, double mass_after) {
    TrainedConcept out;
    out.losses = std::move(job.losses);
    out.mass_before = job.mass_before;
    out.mass_after = mass_after;
    out.pictures = picture_masks(model_, training_.decoder, job.images, training_.pictures,
                                 options_.width, options_.height, checks_);
    for (const TrainedLayer& layer : layers_) {
      const auto plain = [](const LoraPair& pair) {
        return LoraPair{pair.up.detach(), pair.down.detach()};
      };
      job.result.pairs[layer.key.lora_name] = plain(job.pairs.at(layer.name).key);
      job.result.pairs[layer.value.lora_name] = plain(job.pairs.at(layer.name).value);
    }
    // As in a bundle's file: a hundred concepts fit into memory, and saving them changes nothing.
    for (at::Tensor* statistic :
         {&job.result.prompt_gram, &job.result.refinement_gram, &job.result.refinement_shift}) {
      if (statistic->defined()) *statistic = statistic->to(at::kFloat);
    }
    ordered_json how;
    how["recipe"] = ordered_json::parse(recipe(options_, training_.refinement, training_.images));
    how["steps"] = options_.steps;
    how["first_loss"] = out.losses.empty() ? 0.0 : out.losses.front();
    how["last_loss"] = out.losses.empty() ? 0.0 : out.losses.back();
    how["mass_before"] = out.mass_before;
    how["mass_after"] = out.mass_after;
    job.result.training = how.dump();
    out.lora = std::make_shared<const ConceptLora>(std::move(job.result));
    return out;
  }

  const LoraTraining& training_;
  Denoiser& model_;
  const LoraOptions& options_;
  Progress& progress_;
  ChecksOnly checks_;
  std::vector<TrainedLayer> layers_;
  NoiseLevels levels_;
  Effort effort_;
  JobPreparation preparation_;
};

}  // namespace

void check(const LoraTraining& training, const LoraOptions& options) {
  check(options);
  check(training.images);
  // A host refuses a model that cannot draw from a text here, before anything is encoded.
  training.model.latent_shape(options.width, options.height);

  const int64_t width = training.encoder.width();
  for (const TrainedLayer& layer : trained_layers(training.model, width)) {
    const int64_t room = std::min({width, layer.key_rows, layer.value_rows});
    if (options.rank > room) {
      throw Error("rank " + std::to_string(options.rank) + " is above the width of layer '" +
                  layer.name + "' (" + std::to_string(room) + "); lower the rank");
    }
  }
  if (const Refinement* refinement = training.refinement) {
    if (refinement->matrices != EditedMatrices::kKeyAndValue) {
      throw Error(
          "the refinement edits values only; set 'matrices' of Attention Refine to key+value");
    }
    if (refinement->options.adversarial_rounds > 0) {
      throw Error(
          "LoRAs are not trained on top of adversarial rounds; set 'adversarial rounds' of "
          "Attention Refine to 0");
    }
    const WeightIdentity made{refinement->encoder_fingerprint, refinement->encoder_samples};
    const WeightIdentity connected = identity_of(training.encoder);
    const WeightComparison how = compare(made, connected);
    if (how.match != WeightMatch::kSame) {
      throw Error("the refinement was made with another text encoder (" +
                  describe(made, connected, how) +
                  "); connect the CLIP that went into Attention Refine");
    }
  }
}

std::string recipe(const LoraOptions& options, const Refinement* refinement,
                   const TrainingImages& images) {
  ordered_json json;
  const bool cached = options.gradient == LoraGradient::kCached;
  json["gradient"] = to_string(options.gradient);
  json["rank"] = options.rank;
  json["steps"] = options.steps;
  json["learning_rate"] = options.learning_rate;
  if (images.latents.defined()) {
    const auto hash = [](const at::Tensor& tensor) {
      const at::Tensor bytes = tensor.to(at::kCPU, at::kFloat).contiguous();
      return stable_hash({static_cast<const char*>(bytes.data_ptr()), bytes.nbytes()});
    };
    json["pictures"] = hash(images.latents);
    json["masks"] = images.masks.defined() ? hash(images.masks) : 0;
  } else {
    json["images"] = options.images;
    json["sampling_steps"] = options.sampling_steps;
    json["cfg"] = options.cfg;
    json["width"] = options.width;
    json["height"] = options.height;
  }
  if (options.focal.enabled) {
    json["focal"] = {options.focal.t1, options.focal.t2, options.focal.sharpness};
  } else {
    json["focal"] = nullptr;
  }
  json["mask"] = to_string(options.mask);
  json["tokens"] = to_string(options.tokens);
  json["seed"] = options.seed;
  if (cached) {
    json["refresh"] = options.refresh;
    json["captures"] = options.captures;
    json["suppress_value"] = options.suppress_value;
  }
  if (refinement != nullptr) {
    json["refinement"] = {{"method", refinement->options.method},
                          {"read_at", to_string(refinement->options.read_at)}};
  } else {
    json["refinement"] = nullptr;
  }
  return json.dump();
}

std::string recipe_of(const ConceptLora& lora) {
  try {
    const ordered_json json =
        parse_ordered_json(lora.training, "the training record", {.depth = 8, .values = 10'000});
    return json.is_object() && json.contains("recipe") ? json["recipe"].dump() : "";
  } catch (const Error&) {
    return "";
  }
}

void train_loras(const LoraTraining& training, const std::vector<Concept>& concepts,
                 const LoraOptions& options, Progress& progress,
                 const std::function<void(TrainedConcept)>& on_finished) {
  const TrainingScope scope;
  check(training, options);
  if (concepts.empty()) return;
  if (training.images.latents.defined() && concepts.size() != 1) {
    throw Error("pictures of your own are of one concept; train it alone, without the " +
                std::to_string(concepts.size() - 1) + " others");
  }
  Trainer trainer(training, options, concepts.size(), progress);
  const auto batch = static_cast<size_t>(options.batch);
  for (size_t begin = 0; begin < concepts.size(); begin += batch) {
    trainer.train(concepts, begin, std::min(concepts.size(), begin + batch), on_finished);
  }
}

}  // namespace lacuna
