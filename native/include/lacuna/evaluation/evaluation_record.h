// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/evaluation/confidence.h"
#include "lacuna/evaluation/detector.h"
#include "lacuna/evaluation/evaluation_prompt.h"
#include "lacuna/evaluation/gate_scan.h"
#include "lacuna/evaluation/image_encoder.h"
#include "lacuna/evaluation/residual_scan.h"
#include "lacuna/host.h"

namespace lacuna {

// What an edit erased and what survived it: pictures of the same seeds, drawn by the model before
// and after the edit.

inline constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();

// One seed of one prompt. Values that were not measured are NaN.
struct PicturePair {
  size_t prompt = 0;
  int64_t image = 0;
  // Of the base model's denoising errors: alternative minus own prompt, in units of noise variance.
  // Above 0: the picture is likelier under its own prompt (a diffusion classifier).
  double likelihood_before = kUnknown;
  double likelihood_after = kUnknown;
  // The same of the picture before, seen by the edited model: does the word still mean it?
  double likelihood_edited = kUnknown;
  double implausibility = kUnknown;  // denoising error of the picture after over that before
  double score_before = kUnknown;    // the detector's
  double score_after = kUnknown;
  std::string detector_error;
  bool seen_before = false;  // by the detector if it knows the name, else by likelihood
  bool seen_after = false;
  double latent_change = kUnknown;     // 0: the same, 1: as different as two unrelated pictures
  double pixel_change = kUnknown;      // root mean square, pictures in 0..1
  double attention_before = kUnknown;  // mass on the phrase's tokens while denoising
  double attention_after = kUnknown;
  double noise_gap_before = kUnknown;  // ||eps(prompt) - eps(alternative)||, root mean square
  double noise_gap_after = kUnknown;
  double noise_shift = kUnknown;  // ||eps after - eps before|| for the prompt itself
  // With an image encoder: cosines of embeddings.
  double image_similarity = kUnknown;        // of both pictures: 1, the same
  double text_similarity_before = kUnknown;  // of a picture and what it is judged by
  double text_similarity_after = kUnknown;
};

struct Evaluation {
  EvaluationOptions options;
  ConceptSet concepts;
  ResidualScan scan;
  GateScan gate;
  std::vector<EvaluationPrompt> prompts;
  std::vector<PicturePair> pairs;  // prompt by prompt
  at::Tensor before;               // [pairs, H, W, 3] uint8 CPU
  at::Tensor after;
  // What the other levels would draw: pairs of pictures.
  int64_t quick_pairs = 0;
  int64_t thorough_pairs = 0;
  bool identical = false;  // both models draw exactly the same
  bool broken = false;     // the edited model returned NaN or infinity
  // For the protocol.
  std::string family;
  std::string model_fingerprint;
  std::string encoder_fingerprint;
  std::string edited_fingerprint;  // of the edited keys and values
  std::string detector_name;
  std::string detector_version;
  bool compares_images = false;  // an image encoder was there
  bool compares_texts = false;   // and the text encoder was trained with it
};

// Everything an evaluation reads.
struct EvaluationInputs {
  Denoiser& base;
  Denoiser& edited;
  TextEncoder& encoder;
  ImageDecoder& decoder;
  Detector* detector = nullptr;
  ImageEncoder* image_encoder = nullptr;
};

}  // namespace lacuna
