// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/concepts/concept_prompts.h"
#include "lacuna/concepts/concept_set.h"
#include "lacuna/host.h"
#include "lacuna/training/attention_tap.h"
#include "lacuna/training/concept_lora.h"
#include "lacuna/training/lora_options.h"
#include "lacuna/training/timestep_sampler.h"
#include "training/training_progress.h"

namespace lacuna {

// What a concept brings to its training: prompts, pictures with masks, the pairs that learn, and
// its own random numbers.

// One cross-attention layer as the trainer sees it.
struct TrainedLayer {
  std::string name;
  TextEntry key;
  TextEntry value;
  int64_t key_rows = 0;
  int64_t value_rows = 0;
};

// Throws Error for a layer without both matrices, and like edited_entries.
std::vector<TrainedLayer> trained_layers(Denoiser& model, int64_t text_width);

// What one training or measuring pass shows of a concept.
struct Draw {
  int64_t image = 0;
  int64_t prompt = 0;
  double sigma = 0.0;
  at::Tensor noise;  // [c, h, w]
};

// A concept on its way.
struct ConceptJob {
  const Concept* item = nullptr;
  std::string subject;  // what seeds its random numbers
  ConceptPrompts prompts;
  at::Tensor tokens;        // [n, window]
  at::Tensor host_context;  // [n, window, d]: what the host reads
  TrainingImages images;
  ConceptPairs pairs;
  std::vector<Draw> evaluation;
  std::vector<double> losses;
  double mass_before = 0.0;
  ConceptLora result;
};

// The model's noise levels, each as likely as training looks at it.
class NoiseLevels {
 public:
  NoiseLevels(Denoiser& model, const FocalTimesteps& focal);
  double draw(at::Generator& generator) const;

 private:
  at::Tensor sigmas_;  // [timesteps] float64 CPU
  TimestepSampler timesteps_;
};

// Everything random about a concept's training, from its own stream.
class Draws {
 public:
  Draws(int64_t seed, const ConceptJob& job, std::string_view purpose, const NoiseLevels& levels);

  int64_t below(int64_t n);
  // Every index once before any comes again.
  int64_t by_epochs(int64_t n);
  Draw next(const ConceptJob& job);

 private:
  at::Generator generator_;
  const NoiseLevels& levels_;
  std::vector<int64_t> order_;
};

// Forward passes of one sample that drawing a concept's pictures takes.
int64_t drawing_passes(const LoraTraining& training, const LoraOptions& options);

// Makes jobs of concepts, ready to be trained. What it is given must outlive it.
class JobPreparation {
 public:
  JobPreparation(const LoraTraining& training, const LoraOptions& options,
                 const std::vector<TrainedLayer>& layers, const NoiseLevels& levels, Effort& effort,
                 Progress& progress);

  std::unique_ptr<ConceptJob> prepare(const Concept& item);

 private:
  void read_prompts(ConceptJob& job);
  const at::Tensor& anchor_of(const Concept& item);
  void prepare_images(ConceptJob& job);
  void prepare_pairs(ConceptJob& job) const;

  const LoraTraining& training_;
  const LoraOptions& options_;
  const std::vector<TrainedLayer>& layers_;
  const NoiseLevels& levels_;
  Effort& effort_;
  Progress& progress_;
  ChecksOnly checks_;
  TextEmbedding negative_;
  std::vector<std::string> anchor_prompts_;
  at::Tensor anchor_;
};

}  // namespace lacuna
