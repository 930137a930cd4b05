// SPDX-License-Identifier: Apache-2.0
#include "nodes/evaluate_erasure_node.h"

#include <cmath>
#include <filesystem>
#include <system_error>
#include <utility>

#include "lacuna/concepts/typed_list.h"
#include "lacuna/error.h"
#include "lacuna/evaluation/contact_sheet.h"
#include "lacuna/evaluation/evaluation.h"
#include "lacuna/evaluation/evaluation_report.h"
#include "lacuna/files/text.h"
#include "nodes/common_inputs.h"
#include "nodes/numbered_path.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMostNeighbours = 200;

std::vector<std::string> read_neighbours(const std::string& text) {
  ReadingNotes unused;
  std::vector<std::string> words;
  for (TypedPhrase& item : typed_phrases(text, "'neighbours'", unused)) {
    words.push_back(std::move(item.phrase));
  }
  if (words.size() > kMostNeighbours) {
    throw Error("'neighbours' has " + std::to_string(words.size()) + " lines; " +
                std::to_string(kMostNeighbours) + " is the limit");
  }
  return words;
}

std::string prompt_path(const std::string& folder, const std::string& file) {
  return path_within(folder, file, "input");
}

std::vector<FilePrompt> read_prompts(const NodeInputs& inputs, const std::string& folder) {
  const std::string& file = inputs.string("prompt_file");
  return file.empty() ? std::vector<FilePrompt>() : load_prompts(prompt_path(folder, file));
}

EvaluationOptions read_evaluation_options(const NodeInputs& inputs) {
  EvaluationOptions options;
  options.level = evaluation_level_from_string(inputs.string("level"));
  options.prompts = inputs.integer("prompts");
  options.images = inputs.integer("images");
  options.steps = inputs.integer("steps");
  options.cfg = inputs.number("cfg");
  options.sampler = sampler_from_string(inputs.string("sampler"));
  options.seed = inputs.integer("evaluation_seed");
  options.width = inputs.integer("width");
  options.height = inputs.integer("height");
  options.neighbours = read_neighbours(inputs.string("neighbours"));
  options.batch = inputs.integer("batch");
  if (options.width % 8 != 0 || options.height % 8 != 0) {
    throw Error("width and height must be multiples of 8, not " + std::to_string(options.width) +
                " x " + std::to_string(options.height));
  }
  return options;
}

}  // namespace

EvaluateErasureNode::EvaluateErasureNode(std::string input_folder)
    : input_folder_(std::move(input_folder)) {}

const NodeSchema& EvaluateErasureNode::schema() const {
  static const EvaluationOptions defaults;
  static const NodeSchema schema{
      .id = "LacunaEvaluateErasure",
      .display_name = "Evaluate Erasure",
      .description =
          "Shows what is gone and what survived: draws the same pictures with the model before and "
          "after the edit, counts, and says how sure the result is.",
      .category = "lacuna",
      .search_aliases = {"test erasure", "compare models", "before after", "contact sheet",
                         "concept erasure", "benchmark"},
      .output_node = true,
      .inputs =
          {
              {.id = "base_model",
               .display_name = "base model",
               .type = socket::kModel,
               .tooltip = "The model before the edit."},
              {.id = "erased_model",
               .display_name = "erased model",
               .type = socket::kModel,
               .tooltip = "The same model after the edit."},
              clip_input(),
              {.id = "vae",
               .display_name = "vae",
               .type = socket::kVae,
               .tooltip = "The VAE of the same checkpoint."},
              concepts_input("From Concept Set: what should be gone, and what should stay."),
              {.id = "level",
               .display_name = "level",
               .type = socket::kCombo,
               .tooltip =
                   "preflight: reads the weights, draws nothing, takes seconds, and says what "
                   "the others would cost. quick: also draws pictures before and after, "
                   "side by side. thorough: also tries to call the concept back.",
               .default_value = std::string(to_string(defaults.level)),
               .options = {"preflight", "quick", "thorough"}},
              {.id = "prompts",
               .display_name = "prompts",
               .type = socket::kInt,
               .tooltip = "Prompts of each list and concept: the concept itself, other words for "
                          "it, what is preserved, what is similar, and unrelated captions.",
               .default_value = defaults.prompts,
               .min = 1,
               .max = 30,
               .step = 1},
              {.id = "images",
               .display_name = "images per prompt",
               .type = socket::kInt,
               .tooltip = "More pictures, narrower intervals: 20 show less than 16 % left, 100 "
                          "less than 4 %.",
               .default_value = defaults.images,
               .min = 1,
               .max = 256,
               .step = 1},
              {.id = "steps",
               .display_name = "steps",
               .type = socket::kInt,
               .tooltip = "Steps of drawing each picture.",
               .default_value = defaults.steps,
               .min = 1,
               .max = 200,
               .step = 1},
              cfg_input(defaults.cfg, "Guidance of drawing."),
              {.id = "sampler",
               .display_name = "sampler",
               .type = socket::kCombo,
               .tooltip = "How pictures are drawn.",
               .advanced = true,
               .default_value = std::string(to_string(defaults.sampler)),
               .options = {"euler", "dpmpp_2m"}},
              // Not "seed": the page would add a control that changes it after every run.
              {.id = "evaluation_seed",
               .display_name = "seed",
               .type = socket::kInt,
               .tooltip = "The same seed draws the same pictures, before and after.",
               .default_value = defaults.seed,
               .min = 0,
               .max = 9007199254740991.0,
               .step = 1},
              side_input("width", defaults.width,
                         "Width of the pictures: what the model was made for."),
              side_input("height", defaults.height, "Height of the pictures."),
              {.id = "neighbours",
               .display_name = "neighbours",
               .type = socket::kString,
               .tooltip = "Similar things that must survive though the edit was never told so, one "
                          "a line. Empty: the nearest common words are looked up.",
               .multiline = true,
               .default_value = std::string()},
              {.id = "batch",
               .display_name = "batch",
               .type = socket::kInt,
               .tooltip = "Pictures drawn together. Lower it when memory runs out.",
               .advanced = true,
               .default_value = defaults.batch,
               .min = 1,
               .max = 64,
               .step = 1},
              {.id = "detector",
               .display_name = "detector",
               .type = socket::kDetector,
               .tooltip = "A classifier of another pack that says what a picture shows. Without "
                          "one the base model itself is the judge.",
               .optional = true},
              {.id = "clip_vision",
               .display_name = "clip vision",
               .type = socket::kClipVision,
               .tooltip = "Also compares what the pictures mean: with each other, and with their "
                          "texts when the text encoder was trained with it.",
               .optional = true},
              {.id = "detector_threshold",
               .display_name = "detector threshold",
               .type = socket::kFloat,
               .tooltip = "From which score on the detector has seen it.",
               .optional = true,
               .advanced = true,
               .default_value = defaults.detector_threshold,
               .min = 0.0,
               .max = 1.0,
               .step = 0.01},
              {.id = "prompt_file",
               .display_name = "prompt file",
               .type = socket::kString,
               .tooltip = "Prompts that must not show the concept, e.g. published attacks: a file "
                          "in ComfyUI's input folder, .txt with one prompt a line or .csv with a "
                          "column 'prompt' (and 'concept', 'name').",
               .optional = true,
               .default_value = std::string()},
              {.id = "file_prompts",
               .display_name = "file prompts",
               .type = socket::kInt,
               .tooltip = "At most so many prompts of the file, evenly spread over it.",
               .optional = true,
               .advanced = true,
               .default_value = defaults.file_prompts,
               .min = 1,
               .max = 4096,
               .step = 1},
          },
      .outputs = {{"sheet", "sheet", socket::kImage, "Pictures before and after, with labels."},
                  {"json", "report", socket::kString,
                   "Everything in numbers, as JSON with the protocol that repeats it."},
                  {"erased", "erased", socket::kFloat,
                   "Share of the concept's pictures in which it is gone."},
                  {"synonyms", "synonyms", socket::kFloat, "The same under other words."},
                  {"neighbours", "neighbours", socket::kFloat,
                   "Share of the pictures of similar, never listed things that still show them."},
                  {"unrelated", "unrelated", socket::kFloat,
                   "Share of the unrelated pictures that still show their caption."},
                  {"harmonic_mean", "harmonic mean", socket::kFloat,
                   "Of these: low as soon as one of them is low."},
                  {"report", "verdict", socket::kString, "What it means, in sentences."},
                  {"harder_concepts", "concepts + failing", socket::kString,
                   "The concepts with the prompts that still show them as synonyms, for Concept "
                   "Set: erase these, too."}},
      .reads_files = true,
  };
  return schema;
}

void EvaluateErasureNode::validate(const NodeInputs& constants) const {
  if (constants.has_all({"level", "prompts", "images", "steps", "cfg", "sampler", "evaluation_seed",
                         "width", "height", "neighbours", "batch"})) {
    read_evaluation_options(constants);
  }
  if (constants.has("prompt_file")) read_prompts(constants, input_folder_);
}

std::string EvaluateErasureNode::outside_state(const NodeInputs& constants) const {
  if (!constants.has("prompt_file") || constants.string("prompt_file").empty()) return "";
  const fs::path path = prompt_path(input_folder_, constants.string("prompt_file"));
  std::error_code error;
  const auto size = fs::file_size(path, error);
  if (error) return "absent";
  const auto time = fs::last_write_time(path, error);
  return std::to_string(size) + "@" + std::to_string(time.time_since_epoch().count());
}

NodeResult EvaluateErasureNode::run(const NodeInputs& inputs, Progress& progress) {
  EvaluationOptions options = read_evaluation_options(inputs);
  options.detector_threshold = inputs.number("detector_threshold");
  options.file = read_prompts(inputs, input_folder_);
  options.file_name = inputs.string("prompt_file");
  options.file_prompts = inputs.integer("file_prompts");
  // Kept here for the length of the run; none: judged by the base model.
  const std::shared_ptr<Detector> detector =
      inputs.has("detector") ? inputs.get<std::shared_ptr<Detector>>("detector") : nullptr;
  const std::shared_ptr<ImageEncoder> vision =
      inputs.has("clip_vision") ? inputs.get<std::shared_ptr<ImageEncoder>>("clip_vision")
                                : nullptr;
  const EvaluationInputs evaluated{
      .base = *inputs.get<std::shared_ptr<Denoiser>>("base_model"),
      .edited = *inputs.get<std::shared_ptr<Denoiser>>("erased_model"),
      .encoder = *inputs.get<std::shared_ptr<TextEncoder>>("clip"),
      .decoder = *inputs.get<std::shared_ptr<ImageDecoder>>("vae"),
      .detector = detector.get(),
      .image_encoder = vision.get(),
  };
  const ConceptSet& set = *inputs.get<std::shared_ptr<const ConceptSet>>("concepts");
  Evaluation evaluation;
  try {
    evaluation = evaluate(evaluated, set, options, progress);
  } catch (const std::exception& e) {
    // The host must see its own exception, but only we know what would help.
    if (fold_case(e.what()).find("out of memory") != std::string::npos) {
      progress.status("Out of memory. Lower 'batch', or draw smaller pictures.");
    }
    throw;
  }
  const EvaluationSummary summary = summarize(evaluation);
  std::string verdict;
  for (const std::string& line : summary.verdict) verdict += (verdict.empty() ? "" : "\n") + line;
  const Scores& scores = summary.scores;
  NodeResult result;
  result.text = {verdict};
  result.outputs = {draw_contact_sheet(evaluation, summary),
                    to_json(evaluation, summary),
                    scores.erased,
                    scores.synonyms,
                    std::isnan(scores.neighbours) ? scores.preserved : scores.neighbours,
                    scores.unrelated,
                    scores.harmonic_mean,
                    verdict,
                    to_json(with_failing_prompts(evaluation, summary))};
  return result;
}

}  // namespace lacuna
