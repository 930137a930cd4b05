// SPDX-License-Identifier: Apache-2.0
#include "lacuna/evaluation/evaluation.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <set>

#include "evaluation/picture_studio.h"
#include "lacuna/closed_form/refinement.h"
#include "lacuna/closed_form/text_entry.h"
#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/error.h"
#include "lacuna/evaluation/attack.h"
#include "lacuna/evaluation/evaluation_prompts.h"
#include "lacuna/files/random_stream.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

constexpr int64_t kMostPairs = 4096;

std::string fingerprint_of_weights(Denoiser& model, Progress& progress) {
  uint64_t hash = 0;
  for (const TextEntry& projection : cross_attention(model)) {
    progress.check();
    const at::Tensor weight =
        model.effective_weight(projection.name).detach().to(at::kCPU, at::kFloat).contiguous();
    hash = stable_hash(std::to_string(hash) +
                       std::to_string(stable_hash(
                           {static_cast<const char*>(weight.data_ptr()), weight.nbytes()})));
  }
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

}  // namespace

void check(const EvaluationInputs& inputs, const ConceptSet& set,
           const EvaluationOptions& options) {
  validate(set);
  const auto in_range = [](const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) {
      throw Error(std::string(name) + " must be " + std::to_string(low) + " to " +
                  std::to_string(high) + ", not " + std::to_string(value));
    }
  };
  in_range("prompts", options.prompts, 1, kTemplatesPerKind);
  in_range("images", options.images, 1, 256);
  in_range("steps", options.steps, 1, 200);
  in_range("batch", options.batch, 1, 64);
  in_range("file_prompts", options.file_prompts, 1, kMostPairs);
  check_prompt_file(set, options);
  if (options.width < 64 || options.height < 64 || options.width % 8 != 0 ||
      options.height % 8 != 0) {
    throw Error("width and height must be multiples of 8 and at least 64, not " +
                std::to_string(options.width) + " x " + std::to_string(options.height));
  }
  if (!(options.detector_threshold >= 0.0 && options.detector_threshold <= 1.0)) {
    throw Error("detector threshold must lie between 0 and 1");
  }
  edited_entries(inputs.base, EditedMatrices::kKeyAndValue, inputs.encoder.width());
  check_same_family(inputs.base, inputs.edited);
  std::set<std::string> erased;
  for (const Concept& item : set.concepts) {
    for (const std::string& phrase : phrases(item)) erased.insert(fold_case(phrase));
  }
  for (const std::string& word : options.neighbours) {
    if (erased.contains(fold_case(word))) {
      throw Error("'" + word + "' is to be erased, so that it cannot be a neighbour to survive");
    }
  }
  check_phrases(inputs.encoder, set);
  if (options.level == EvaluationLevel::kPreflight) return;
  const std::vector<int64_t> shape = inputs.base.latent_shape(options.width, options.height);
  const at::Tensor picture = inputs.decoder.decode(
      inputs.base.to_host_latent(at::zeros({1, shape[0], shape[1], shape[2]})));
  if (picture.dim() != 4 || picture.size(0) != 1 || picture.size(3) != 3) {
    throw Error("the VAE does not make pictures; connect the VAE of the same checkpoint");
  }
  if (inputs.image_encoder == nullptr) return;
  const at::Tensor embedding = inputs.image_encoder->embed(at::zeros({1, 64, 64, 3}));
  if (embedding.dim() != 2 || embedding.size(0) != 1 || embedding.size(1) == 0) {
    throw Error("the clip vision model makes no embeddings of pictures; use one of CLIP, or none");
  }
}

Evaluation evaluate(const EvaluationInputs& inputs, const ConceptSet& set,
                    const EvaluationOptions& options, Progress& progress) {
  check(inputs, set, options);
  Evaluation evaluation;
  evaluation.options = options;
  evaluation.concepts = set;
  evaluation.family = inputs.base.family();
  evaluation.model_fingerprint = inputs.base.fingerprint();
  evaluation.encoder_fingerprint = inputs.encoder.fingerprint();
  evaluation.edited_fingerprint = fingerprint_of_weights(inputs.edited, progress);
  if (inputs.detector != nullptr) {
    evaluation.detector_name = inputs.detector->name();
    evaluation.detector_version = inputs.detector->version();
  }
  evaluation.scan =
      scan_residuals(inputs.base, inputs.edited, inputs.encoder, set, options.neighbours, progress);
  std::vector<std::string> neighbours;
  for (const WordDrift& word : evaluation.scan.neighbours) neighbours.push_back(word.word);
  evaluation.gate = scan_gate(inputs.edited, inputs.encoder, set, neighbours, progress);
  evaluation.quick_pairs = pairs_at(EvaluationLevel::kQuick, set, options, evaluation.scan);
  evaluation.thorough_pairs = pairs_at(EvaluationLevel::kThorough, set, options, evaluation.scan);
  if (options.level == EvaluationLevel::kPreflight) return evaluation;

  std::vector<std::vector<std::string>> searched;
  if (options.level == EvaluationLevel::kThorough) {
    progress.status(std::to_string(evaluation.thorough_pairs) + " pairs of pictures, " +
                    std::to_string(2 * evaluation.thorough_pairs * options.steps) +
                    " steps of drawing, a search for words and a training of embeddings");
    for (const Concept& item : set.concepts) {
      searched.push_back(
          searched_prompts(inputs.encoder, item, options.prompts, options.seed, progress));
    }
  }
  evaluation.prompts = evaluation_prompts(set, options, evaluation.scan, searched);
  for (size_t i = 0; i < evaluation.prompts.size(); ++i) {
    for (int64_t k = 0; k < options.images; ++k) {
      PicturePair pair;
      pair.prompt = i;
      pair.image = k;
      evaluation.pairs.push_back(pair);
    }
  }
  const auto pairs = static_cast<int64_t>(evaluation.pairs.size());
  if (pairs > kMostPairs) {
    throw Error("this would draw " + std::to_string(pairs) + " pairs of pictures, and " +
                std::to_string(kMostPairs) + " is the limit; lower 'prompts' or 'images'");
  }
  const auto attacks = std::count_if(
      evaluation.prompts.begin(), evaluation.prompts.end(),
      [](const EvaluationPrompt& prompt) { return prompt.list == PromptList::kAttacks; });
  progress.status(std::to_string(pairs) + " pairs of pictures (" +
                  std::to_string(attacks * options.images) + " of them attacks), " +
                  std::to_string(2 * pairs * options.steps) + " steps of drawing");
  draw_pairs(inputs, options, evaluation, progress);
  return evaluation;
}

}  // namespace lacuna
