// SPDX-License-Identifier: Apache-2.0
#include "training/concept_job.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "lacuna/closed_form/refinement.h"
#include "lacuna/closed_form/text_entry.h"
#include "lacuna/closed_form/text_statistics.h"
#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/error.h"
#include "lacuna/files/random_stream.h"
#include "lacuna/training/concept_images.h"

namespace lacuna {
namespace {

std::string subject_of(const Concept& item) {
  std::string text(to_string(item.kind));
  for (const std::string& phrase : phrases(item)) text += '\n' + phrase;
  return text;
}

int64_t passes_per_step(const LoraOptions& options) { return options.cfg != 1.0 ? 2 : 1; }

}  // namespace

std::vector<TrainedLayer> trained_layers(Denoiser& model, int64_t text_width) {
  std::vector<TrainedLayer> layers;
  for (const TextEntry& projection :
       edited_entries(model, EditedMatrices::kKeyAndValue, text_width)) {
    const std::string name = layer_of(projection);
    auto it = std::find_if(layers.begin(), layers.end(),
                           [&](const TrainedLayer& layer) { return layer.name == name; });
    if (it == layers.end()) it = layers.insert(layers.end(), TrainedLayer{name, {}, {}, 0, 0});
    const int64_t rows = model.effective_weight(projection.name).size(0);
    if (projection.role == EntryRole::kKey) {
      it->key = projection;
      it->key_rows = rows;
    } else {
      it->value = projection;
      it->value_rows = rows;
    }
  }
  for (const TrainedLayer& layer : layers) {
    if (layer.key_rows == 0 || layer.value_rows == 0) {
      throw Error("the cross-attention layer '" + layer.name + "' has no key or no value matrix");
    }
  }
  return layers;
}

NoiseLevels::NoiseLevels(Denoiser& model, const FocalTimesteps& focal)
    : sigmas_(model.noise_levels().to(at::kCPU, at::kDouble)), timesteps_(focal, sigmas_.size(0)) {}

double NoiseLevels::draw(at::Generator& generator) const {
  return sigmas_[timesteps_.draw(generator)].item<double>();
}

Draws::Draws(int64_t seed, const ConceptJob& job, std::string_view purpose,
             const NoiseLevels& levels)
    : generator_(random_stream(seed, job.subject, purpose)), levels_(levels) {}

int64_t Draws::below(int64_t n) {
  return at::randint(n, {1}, generator_, at::TensorOptions(at::kLong)).item<int64_t>();
}

int64_t Draws::by_epochs(int64_t n) {
  if (order_.empty()) {
    const at::Tensor order = at::randperm(n, generator_, at::TensorOptions(at::kLong));
    for (int64_t i = 0; i < n; ++i) order_.push_back(order[i].item<int64_t>());
  }
  const int64_t index = order_.back();
  order_.pop_back();
  return index;
}

Draw Draws::next(const ConceptJob& job) {
  const at::Tensor& latents = job.images.latents;
  Draw draw;
  draw.image = by_epochs(latents.size(0));
  draw.prompt = below(job.prompts.embedding.context.size(0));
  draw.sigma = levels_.draw(generator_);
  draw.noise = at::randn(latents.sizes().slice(1), generator_, at::TensorOptions(at::kFloat));
  return draw;
}

int64_t drawing_passes(const LoraTraining& training, const LoraOptions& options) {
  if (training.images.latents.defined()) return 0;
  return options.images * options.sampling_steps * passes_per_step(options);
}

JobPreparation::JobPreparation(const LoraTraining& training, const LoraOptions& options,
                               const std::vector<TrainedLayer>& layers, const NoiseLevels& levels,
                               Effort& effort, Progress& progress)
    : training_(training),
      options_(options),
      layers_(layers),
      levels_(levels),
      effort_(effort),
      progress_(progress),
      checks_(progress) {
  if (!training.images.latents.defined()) {
    negative_ = embed_in_batches(training.encoder, {""}, checks_);
  }
}

std::unique_ptr<ConceptJob> JobPreparation::prepare(const Concept& item) {
  progress_.check();
  progress_.status(item.target + ": reading prompts");
  auto job = std::make_unique<ConceptJob>();
  job->item = &item;
  job->subject = subject_of(item);
  job->result.item = item;
  read_prompts(*job);
  prepare_images(*job);
  prepare_pairs(*job);
  Draws draws(options_.seed, *job, "evaluation", levels_);
  for (int64_t i = 0; i < options_.evaluations; ++i) job->evaluation.push_back(draws.next(*job));
  return job;
}

void JobPreparation::read_prompts(ConceptJob& job) {
  job.prompts = encode_prompts(training_.encoder, *job.item, checks_);
  job.tokens = job.prompts.tokens(options_.tokens);
  const at::Tensor& context = job.prompts.embedding.context;
  const auto count = static_cast<double>(job.prompts.texts.size());

  StatisticsAccumulator sums(context.size(2));
  for (int64_t i = 0; i < context.size(0); ++i) sums.add_kept(context[i], 1.0 / count);
  job.result.prompt_gram = sums.finish().kept;
  job.host_context = context;
  if (training_.refinement != nullptr) {
    const AnchoredPrompts anchored = anchor_prompts(
        training_.encoder, *job.item, context, anchor_of(*job.item), training_.refinement->options);
    job.result.refinement_gram = anchored.statistics.edited + anchored.statistics.kept;
    job.result.refinement_shift = anchored.statistics.shift;
    job.host_context = anchored.context;
  }
}

// Embeddings of every template with the concept's anchor; lists often share one.
const at::Tensor& JobPreparation::anchor_of(const Concept& item) {
  std::vector<std::string> prompts;
  for (const std::string_view prompt_template :
       prompt_templates(item.kind).first(static_cast<size_t>(item.templates))) {
    prompts.push_back(fill_template(prompt_template, item.anchor));
  }
  if (prompts != anchor_prompts_) {
    anchor_ = embed_in_batches(training_.encoder, prompts, checks_).context;
    anchor_prompts_ = std::move(prompts);
  }
  return anchor_;
}

void JobPreparation::prepare_images(ConceptJob& job) {
  // A style is everywhere in the picture.
  const bool masked =
      options_.mask == MaskSource::kAttention && job.item->kind != ConceptKind::kStyle;
  if (training_.images.latents.defined()) {
    job.images = training_.images;
    if (!job.images.masks.defined() && masked) {
      job.images.masks =
          masks_of(training_.model, job.prompts, job.images.latents, job.subject, progress_);
    }
  } else {
    int64_t drawn = 0;
    job.images = draw_concept(
        training_.model, job.prompts, negative_, options_, job.subject, masked, progress_,
        [&](int64_t pictures) {
          drawn += pictures;
          effort_.add(pictures * passes_per_step(options_));
          progress_.status(
              job.item->target + ": drawing pictures, " +
              std::to_string(100 * drawn / (options_.images * options_.sampling_steps)) + " %, " +
              effort_.time_left());
        });
  }
  if (!at::isfinite(job.images.latents).all().item<bool>()) {
    throw Error("the pictures of '" + job.item->target +
                "' hold NaN or infinity; use an undamaged checkpoint, or a model in float32 or "
                "bfloat16");
  }
  progress_.preview(picture_masks(training_.model, training_.decoder, job.images, 1, options_.width,
                                  options_.height, checks_)[0]);
}

void JobPreparation::prepare_pairs(ConceptJob& job) const {
  at::Generator generator = random_stream(options_.seed, job.subject, "pairs");
  const int64_t rank = options_.rank;
  const int64_t width = training_.encoder.width();
  const at::TensorOptions floats(at::kFloat);
  for (const TrainedLayer& layer : layers_) {
    const auto pair = [&](int64_t rows) {
      LoraPair out;
      out.down = at::randn({rank, width}, generator, floats) / static_cast<double>(rank);
      out.up = at::zeros({rows, rank}, floats);
      out.down.requires_grad_();
      out.up.requires_grad_();
      return out;
    };
    LayerPairs& pairs = job.pairs[layer.name];
    pairs.key = pair(layer.key_rows);
    pairs.value = pair(layer.value_rows);
  }
}

}  // namespace lacuna
