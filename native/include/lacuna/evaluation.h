// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/concept_set.h"
#include "lacuna/confidence.h"
#include "lacuna/detector.h"
#include "lacuna/host.h"
#include "lacuna/image_encoder.h"
#include "lacuna/latent_sampler.h"
#include "lacuna/prompt_file.h"
#include "lacuna/residual_scan.h"

namespace lacuna {

// What an edit erased and what survived it: pictures of the same seeds, drawn by the model before
// and after the edit.

enum class EvaluationLevel {
  kPreflight,  // the scan of weights, no pictures
  kQuick,      // pictures before and after, side by side, and a few attacks
  kThorough,   // more of the attacks (attack.h)
};

std::string_view to_string(EvaluationLevel level);
EvaluationLevel evaluation_level_from_string(std::string_view text);

// What a prompt is there to show.
enum class PromptList {
  kTarget,      // the phrase itself
  kSynonyms,    // its synonyms, plural, and a typing error
  kAttacks,     // attempts to call it back
  kFile,        // of the prompt file
  kPreserved,   // listed to be preserved
  kNeighbours,  // similar, and never listed
  kUnrelated,   // captions of the general prior
};
inline constexpr PromptList kPromptLists[] = {
    PromptList::kTarget,    PromptList::kSynonyms,   PromptList::kAttacks,  PromptList::kFile,
    PromptList::kPreserved, PromptList::kNeighbours, PromptList::kUnrelated};

// "erased", "synonyms", "attacks", "prompt file", "preserved", "neighbours", "unrelated": the keys
// of reports.
std::string_view to_string(PromptList list);
// Whether the concept should be gone from its pictures; else they should stay as they are.
bool should_vanish(PromptList list);

enum class Attack;  // attack.h

struct EvaluationOptions {
  EvaluationLevel level = EvaluationLevel::kQuick;
  int64_t prompts = 4;  // of each list and concept
  int64_t images = 2;   // of each prompt
  int64_t steps = 20;
  double cfg = 7.0;
  Sampler sampler = Sampler::kEuler;
  int64_t seed = 0;
  int64_t width = 512;
  int64_t height = 512;
  double detector_threshold = 0.5;      // from which score on a picture shows a name
  std::vector<std::string> neighbours;  // words to watch; empty: the nearest common words
  int64_t batch = 4;                    // pictures drawn together; changes rounding only
  std::vector<FilePrompt> file;         // the prompt file; of a longer one, evenly spread prompts
  std::string file_name;                // for the report
  int64_t file_prompts = 200;           // at most so many of them
};

struct EvaluationPrompt {
  PromptList list = PromptList::kTarget;
  int64_t concept_index = -1;  // whose concept; -1: of the whole set
  std::string phrase;          // what stands in the prompt; empty for captions
  std::string name;            // what a detector is asked for; empty: nothing
  std::string text;
  std::string alternative;    // the prompt that a leaking edit would draw instead: the anchor's
  std::string question = {};  // what the picture is judged by; empty: the text itself
  std::optional<Attack> attack = {};
};

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

// Throws Error for options out of range, models of different families, a text encoder or decoder of
// another model, a prompt file that is about something else. Nothing is drawn.
void check(const EvaluationInputs& inputs, const ConceptSet& set, const EvaluationOptions& options);

// scan: nearest words by concept, for want of given ones; searched: as of attack_prompts().
std::vector<EvaluationPrompt> evaluation_prompts(
    const ConceptSet& set, const EvaluationOptions& options, const ResidualScan& scan,
    const std::vector<std::vector<std::string>>& searched = {});

// Scans the weights, draws "before" first and "after" second, and measures. A picture depends on
// its prompt, its number and the seed alone.
Evaluation evaluate(const EvaluationInputs& inputs, const ConceptSet& set,
                    const EvaluationOptions& options, Progress& progress);

}  // namespace lacuna
