// SPDX-License-Identifier: Apache-2.0
#include "lacuna/evaluation/evaluation_report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "lacuna/error.h"
#include "lacuna/evaluation/attack.h"
#include "lacuna/evaluation/benchmark_lines.h"
#include "lacuna/files/json_text.h"
#include "lacuna/files/random_stream.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

using nlohmann::ordered_json;

ordered_json interval_json(const Interval& interval) { return {interval.low, interval.high}; }

ordered_json list_json(const Evaluation& evaluation, const ListSummary& list) {
  ordered_json out;
  out["list"] = to_string(list.list);
  out["concept"] = nullptr;
  if (list.concept_index >= 0) {
    out["concept"] = evaluation.concepts.concepts[static_cast<size_t>(list.concept_index)].target;
  }
  out["hits"] = {list.hits().hits, list.hits().trials};
  out["interval"] = interval_json(wilson_interval(list.hits()));
  out["seen_before"] = {list.seen_before.hits, list.seen_before.trials};
  out["seen_after"] = {list.seen_after.hits, list.seen_after.trials};
  out["mcnemar_p"] = list.p;
  out["mcnemar_p_holm"] = list.p_holm;
  const auto estimate = [](const MeanEstimate& value) {
    return ordered_json{{"mean", value.mean}, {"interval", interval_json(value.interval)}};
  };
  out["latent_change"] = estimate(list.latent_change);
  out["pixel_change"] = estimate(list.pixel_change);
  if (evaluation.compares_images) out["image_similarity"] = estimate(list.image_similarity);
  if (evaluation.compares_texts) out["text_similarity_change"] = estimate(list.text_change);
  out["attention_ratio"] = list.attention_ratio;
  out["noise_gap_ratio"] = list.noise_gap_ratio;
  out["implausibility"] = list.implausibility;
  out["judged_by_detector"] = list.by_detector;
  out["detector_errors"] = list.detector_errors;
  return out;
}

ordered_json scan_json(const ResidualScan& scan) {
  ordered_json out;
  out["weights_differ"] = scan.weights_differ;
  out["concepts"] = ordered_json::array();
  for (const ConceptResidual& item : scan.concepts) {
    ordered_json entry;
    entry["target"] = item.target;
    entry["phrases"] = ordered_json::array();
    for (const PhraseResidual& phrase : item.phrases) {
      entry["phrases"].push_back(
          {{"phrase", phrase.phrase}, {"form", phrase.form}, {"remaining", phrase.remaining}});
    }
    entry["leaks"] = ordered_json::array();
    for (const WordContent& leak : item.leaks) {
      entry["leaks"].push_back(
          {{"word", leak.word}, {"content_before", leak.before}, {"content_after", leak.after}});
    }
    entry["neighbours"] = item.neighbours;
    entry["positions"] = item.positions;
    entry["layers"] = ordered_json::array();
    for (const LayerResidual& layer : item.layers) {
      entry["layers"].push_back({{"layer", layer.layer},
                                 {"matrix", layer.role == EntryRole::kKey ? "key" : "value"},
                                 {"before", layer.before},
                                 {"after", layer.after}});
    }
    out["concepts"].push_back(std::move(entry));
  }
  const auto drifts = [](const std::vector<WordDrift>& words) {
    ordered_json list = ordered_json::array();
    for (const WordDrift& word : words) {
      list.push_back({{"word", word.word}, {"drift", word.drift}});
    }
    return list;
  };
  out["preserved"] = drifts(scan.preserved);
  out["neighbours"] = drifts(scan.neighbours);
  return out;
}

ordered_json gate_json(const GateScan& gate) {
  if (!gate.gated) return nullptr;
  const auto count_json = [](const GateCount& count) {
    return ordered_json{{"prompts", count.form},
                        {"acted", {count.acted.hits, count.acted.trials}},
                        {"interval", interval_json(wilson_interval(count.acted))},
                        {"wrong", count.wrong}};
  };
  ordered_json out;
  out["concepts"] = ordered_json::array();
  for (const ConceptGate& item : gate.concepts) {
    ordered_json entry{{"target", item.target}, {"named", ordered_json::array()}};
    for (const GateCount& form : item.named) entry["named"].push_back(count_json(form));
    entry["disguised"] = count_json(item.disguised);
    out["concepts"].push_back(std::move(entry));
  }
  out["others"] = ordered_json::array();
  for (const GateCount& item : gate.others) out["others"].push_back(count_json(item));
  return out;
}

ordered_json pair_json(const Evaluation& evaluation, const PicturePair& pair) {
  const EvaluationPrompt& prompt = evaluation.prompts[pair.prompt];
  ordered_json out;
  out["list"] = to_string(prompt.list);
  out["concept"] = nullptr;
  if (prompt.concept_index >= 0) {
    out["concept"] = evaluation.concepts.concepts[static_cast<size_t>(prompt.concept_index)].target;
  }
  if (prompt.attack) out["attack"] = to_string(*prompt.attack);
  out["prompt"] = prompt.text;
  if (!prompt.question.empty()) out["judged_by"] = prompt.question;
  out["phrase"] = prompt.phrase;
  out["image"] = pair.image;
  out["seen_before"] = pair.seen_before;
  out["seen_after"] = pair.seen_after;
  out["likelihood_before"] = pair.likelihood_before;
  out["likelihood_after"] = pair.likelihood_after;
  out["likelihood_edited"] = pair.likelihood_edited;
  out["implausibility"] = pair.implausibility;
  out["score_before"] = pair.score_before;
  out["score_after"] = pair.score_after;
  if (!pair.detector_error.empty()) out["detector_error"] = pair.detector_error;
  out["latent_change"] = pair.latent_change;
  out["pixel_change"] = pair.pixel_change;
  out["attention_before"] = pair.attention_before;
  out["attention_after"] = pair.attention_after;
  out["noise_gap_before"] = pair.noise_gap_before;
  out["noise_gap_after"] = pair.noise_gap_after;
  out["noise_shift"] = pair.noise_shift;
  if (evaluation.compares_images) out["image_similarity"] = pair.image_similarity;
  if (evaluation.compares_texts) {
    out["text_similarity_before"] = pair.text_similarity_before;
    out["text_similarity_after"] = pair.text_similarity_after;
  }
  return out;
}

ordered_json protocol_json(const Evaluation& evaluation) {
  const EvaluationOptions& options = evaluation.options;
  std::string all;
  for (const EvaluationPrompt& prompt : evaluation.prompts) all += prompt.text + '\n';
  char hash[17];
  std::snprintf(hash, sizeof hash, "%016llx", static_cast<unsigned long long>(stable_hash(all)));
  ordered_json out;
  out["pack"] = "lacuna " LACUNA_VERSION;
  out["level"] = to_string(options.level);
  out["family"] = evaluation.family;
  out["model"] = evaluation.model_fingerprint;
  out["edited_weights"] = evaluation.edited_fingerprint;
  out["text_encoder"] = evaluation.encoder_fingerprint;
  out["sampler"] = to_string(options.sampler);
  out["scheduler"] = "normal";
  out["steps"] = options.steps;
  out["cfg"] = options.cfg;
  out["seed"] = options.seed;
  out["size"] = {options.width, options.height};
  out["prompts_per_list"] = options.prompts;
  out["images_per_prompt"] = options.images;
  out["prompts_hash"] = hash;
  out["prompt_file"] = nullptr;
  if (!options.file.empty()) {
    std::string texts;
    for (const FilePrompt& prompt : options.file) texts += prompt.text + '\n';
    std::snprintf(hash, sizeof hash, "%016llx",
                  static_cast<unsigned long long>(stable_hash(texts)));
    out["prompt_file"] = {
        {"name", options.file_name},
        {"hash", hash},
        {"prompts", options.file.size()},
        {"used", std::min(static_cast<int64_t>(options.file.size()), options.file_prompts)}};
  }
  out["clip_vision"] = evaluation.compares_texts    ? "images and texts"
                       : evaluation.compares_images ? "images"
                                                    : "none";
  out["detector"] = nullptr;
  if (!evaluation.detector_name.empty()) {
    out["detector"] = {{"name", evaluation.detector_name},
                       {"version", evaluation.detector_version},
                       {"threshold", options.detector_threshold}};
  }
  out["concepts"] = ordered_json::parse(to_json(evaluation.concepts));
  return out;
}

ordered_json failing_json(const Evaluation& evaluation, const EvaluationSummary& summary) {
  ordered_json out = ordered_json::array();
  for (const FailingPrompt& item : summary.failing) {
    const EvaluationPrompt& prompt = evaluation.prompts[item.prompt];
    ordered_json entry;
    entry["concept"] =
        evaluation.concepts.concepts[static_cast<size_t>(prompt.concept_index)].target;
    entry["list"] = to_string(prompt.list);
    entry["attack"] = nullptr;
    if (prompt.attack) entry["attack"] = to_string(*prompt.attack);
    entry["prompt"] = prompt.text;
    entry["phrase"] = prompt.phrase;
    entry["back"] = {item.back.hits, item.back.trials};
    out.push_back(std::move(entry));
  }
  return out;
}

}  // namespace

std::string to_json(const Evaluation& evaluation, const EvaluationSummary& summary) {
  ordered_json root;
  root["format"] = "lacuna.evaluation/1";
  root["verdict"] = summary.verdict;
  root["scores"] = {
      {"erased", summary.scores.erased},       {"synonyms", summary.scores.synonyms},
      {"preserved", summary.scores.preserved}, {"neighbours", summary.scores.neighbours},
      {"unrelated", summary.scores.unrelated}, {"harmonic_mean", summary.scores.harmonic_mean}};
  root["counts"] = ordered_json::object();
  root["lists"] = ordered_json::array();
  for (const ListSummary& list : summary.lists) {
    if (list.concept_index < 0) {
      root["counts"][std::string(to_string(list.list))] = {list.hits().hits, list.hits().trials};
    }
    root["lists"].push_back(list_json(evaluation, list));
  }
  root["attacks"] = ordered_json::array();
  for (const AttackSummary& item : summary.attacks) {
    const auto index = static_cast<size_t>(item.concept_index);
    root["attacks"].push_back({{"concept", evaluation.concepts.concepts[index].target},
                               {"attack", to_string(item.attack)},
                               {"back", {item.back.hits, item.back.trials}},
                               {"interval", interval_json(wilson_interval(item.back))}});
  }
  root["failing_prompts"] = failing_json(evaluation, summary);
  root["benchmarks"] = ordered_json::array();
  for (const BenchmarkLine& line : benchmark_lines(evaluation)) {
    root["benchmarks"].push_back({{"line", line.name},
                                  {"before", line.before},
                                  {"after", line.after},
                                  {"interval", interval_json(line.interval)},
                                  {"better", line.lower_is_better ? "lower" : "higher"},
                                  {"pictures", line.pictures}});
  }
  root["cost"] = {
      {"pairs", evaluation.pairs.size()},
      {"steps", 2 * evaluation.pairs.size() * static_cast<size_t>(evaluation.options.steps)},
      {"quick_pairs", evaluation.quick_pairs},
      {"thorough_pairs", evaluation.thorough_pairs}};
  root["preflight"] = scan_json(evaluation.scan);
  root["gate"] = gate_json(evaluation.gate);
  root["pairs"] = ordered_json::array();
  for (const PicturePair& pair : evaluation.pairs) {
    root["pairs"].push_back(pair_json(evaluation, pair));
  }
  root["protocol"] = protocol_json(evaluation);
  // Not a number becomes null; bytes that are not UTF-8 must not end a long run.
  return root.dump(1, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace lacuna
