// SPDX-License-Identifier: Apache-2.0
#include "lacuna/evaluation_report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "lacuna/attack.h"
#include "lacuna/benchmark_lines.h"
#include "lacuna/error.h"
#include "lacuna/json_text.h"
#include "lacuna/random_stream.h"
#include "lacuna/text.h"

namespace lacuna {
namespace {

using nlohmann::ordered_json;

// Shares of the distance between two unrelated pictures.
constexpr double kNoChange = 0.02;
constexpr double kLittleChange = 0.3;
constexpr double kMuchChange = 0.6;
constexpr double kImplausible = 1.5;  // denoising error of damaged pictures over that of whole ones
// A report names every picture: a million of them are a large evaluation.
constexpr JsonLimits kReportLimits{.depth = 16, .values = 50'000'000};
constexpr size_t kNamesInSentence = 6;
constexpr size_t kLongestSynonym = 100;  // bytes of a failing prompt that is worth erasing

std::string percent(double share) {
  char text[16];
  std::snprintf(text, sizeof text, "%.0f", 100 * share);
  return text;
}

std::string of(const Count& count) {
  return std::to_string(count.hits) + " of " + std::to_string(count.trials);
}

double median(std::vector<double> values) {
  std::erase_if(values, [](double value) { return std::isnan(value); });
  if (values.empty()) return kUnknown;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Ratio of means over the pairs that have both; unknown when there are none.
double ratio_of(const std::vector<const PicturePair*>& pairs, double PicturePair::* after,
                double PicturePair::* before) {
  double above = 0.0, below = 0.0;
  for (const PicturePair* pair : pairs) {
    if (std::isnan(pair->*after) || std::isnan(pair->*before)) continue;
    above += pair->*after;
    below += pair->*before;
  }
  return below > 0.0 ? above / below : kUnknown;
}

ListSummary summarize_list(const Evaluation& evaluation, PromptList list, int64_t concept_index) {
  ListSummary out;
  out.list = list;
  out.concept_index = concept_index;
  std::vector<const PicturePair*> pairs;
  std::vector<double> latent, pixel, implausible, image, text;
  std::vector<int64_t> clusters;
  int64_t only_before = 0, only_after = 0;
  for (const PicturePair& pair : evaluation.pairs) {
    const EvaluationPrompt& prompt = evaluation.prompts[pair.prompt];
    if (prompt.list != list) continue;
    if (concept_index >= 0 && prompt.concept_index != concept_index) continue;
    pairs.push_back(&pair);
    ++out.seen_before.trials;
    ++out.seen_after.trials;
    out.seen_before.hits += pair.seen_before;
    out.seen_after.hits += pair.seen_after;
    only_before += pair.seen_before && !pair.seen_after;
    only_after += pair.seen_after && !pair.seen_before;
    out.by_detector += !std::isnan(pair.score_after);
    out.detector_errors += !pair.detector_error.empty();
    implausible.push_back(pair.implausibility);
    if (std::isnan(pair.latent_change)) continue;  // a broken picture has no distance
    latent.push_back(pair.latent_change);
    pixel.push_back(pair.pixel_change);
    image.push_back(pair.image_similarity);
    text.push_back(pair.text_similarity_after - pair.text_similarity_before);
    clusters.push_back(static_cast<int64_t>(pair.prompt));
  }
  out.p = out.p_holm = exact_mcnemar(only_before, only_after);
  const std::string subject = std::string(to_string(list)) + std::to_string(concept_index);
  out.latent_change = clustered_bootstrap(latent, clusters, evaluation.options.seed, subject);
  out.pixel_change = clustered_bootstrap(pixel, clusters, evaluation.options.seed, subject);
  if (evaluation.compares_images) {
    out.image_similarity =
        clustered_bootstrap(image, clusters, evaluation.options.seed, subject + "image");
  }
  if (evaluation.compares_texts) {
    out.text_change =
        clustered_bootstrap(text, clusters, evaluation.options.seed, subject + "text");
  }
  out.attention_ratio =
      ratio_of(pairs, &PicturePair::attention_after, &PicturePair::attention_before);
  out.noise_gap_ratio =
      ratio_of(pairs, &PicturePair::noise_gap_after, &PicturePair::noise_gap_before);
  out.implausibility = median(std::move(implausible));
  return out;
}

double mean_of(const std::vector<double>& values) {
  if (values.empty()) return kUnknown;
  double sum = 0.0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

Scores preflight_scores(const ResidualScan& scan) {
  Scores scores;
  std::vector<double> erased, synonyms;
  for (const ConceptResidual& item : scan.concepts) {
    for (const PhraseResidual& phrase : item.phrases) {
      const double gone = 1 - std::clamp(phrase.remaining, 0.0, 1.0);
      (phrase.form == "target" ? erased : synonyms).push_back(gone);
    }
  }
  const auto kept = [](const std::vector<WordDrift>& words) {
    std::vector<double> values;
    for (const WordDrift& word : words) values.push_back(1 - std::clamp(word.drift, 0.0, 1.0));
    return mean_of(values);
  };
  scores.erased = mean_of(erased);
  scores.synonyms = mean_of(synonyms);
  scores.preserved = kept(scan.preserved);
  scores.neighbours = kept(scan.neighbours);
  return scores;
}

double share_of(const EvaluationSummary& summary, PromptList list) {
  const ListSummary* found = find_list(summary, list, -1);
  return found == nullptr ? kUnknown : found->hits().share();
}

double harmonic_mean_of(const Scores& scores) {
  std::vector<double> known;
  const double kept = std::isnan(scores.neighbours)  ? scores.preserved
                      : std::isnan(scores.preserved) ? scores.neighbours
                                                     : (scores.neighbours + scores.preserved) / 2;
  for (const double share : {scores.erased, scores.synonyms, kept, scores.unrelated}) {
    if (!std::isnan(share)) known.push_back(share);
  }
  return harmonic_mean(known);
}

std::string names_of(const std::vector<std::string>& names) {
  std::string text;
  for (size_t i = 0; i < std::min(names.size(), kNamesInSentence); ++i) {
    text += (i == 0 ? "'" : ", '") + names[i] + "'";
  }
  if (names.size() > kNamesInSentence) {
    text += " and " + std::to_string(names.size() - kNamesInSentence) + " more";
  }
  return text;
}

std::string concept_sentence(const EvaluationSummary& summary, const std::string& target,
                             int64_t index) {
  const ListSummary* list = find_list(summary, PromptList::kTarget, index);
  if (list == nullptr) return "";
  const Count gone = list->hits();
  const Interval left = wilson_interval(list->seen_after);
  std::string text = "'" + target + "' is gone in " + of(gone) + " pictures (" +
                     (gone.hits == gone.trials ? "up to " + percent(left.high) + " % possible"
                                               : "it may come through in " + percent(left.low) +
                                                     " to " + percent(left.high) + " %") +
                     ")";
  if (const ListSummary* forms = find_list(summary, PromptList::kSynonyms, index)) {
    text += ", under other words in " + of(forms->hits());
  }
  if (2 * list->seen_before.hits < list->seen_before.trials) {
    text += "; the model drew it in only " + of(list->seen_before) +
            " before, so that this says little";
  }
  return text + ".";
}

// Which attacks brought a concept back, and how sure that is.
std::string attack_sentence(const EvaluationSummary& summary, const std::string& target,
                            int64_t index) {
  const ListSummary* list = find_list(summary, PromptList::kAttacks, index);
  if (list == nullptr) return "";
  const Count gone = list->hits();
  std::string text = "'" + target + "' under attack: gone in " + of(gone) + " pictures";
  std::string which;
  for (const AttackSummary& item : summary.attacks) {
    if (item.concept_index != index || item.back.hits == 0) continue;
    which += (which.empty() ? "" : ", ") + std::string(to_string(item.attack)) + " (" +
             of(item.back) + ")";
  }
  return text + (which.empty() ? "." : "; it came back by " + which + ".");
}

std::string kept_sentence(const Evaluation& evaluation) {
  std::map<std::string, std::vector<double>> changes;
  std::vector<std::string> order;
  for (const PicturePair& pair : evaluation.pairs) {
    const EvaluationPrompt& prompt = evaluation.prompts[pair.prompt];
    if (should_vanish(prompt.list) || prompt.phrase.empty()) continue;
    if (!changes.contains(prompt.phrase)) order.push_back(prompt.phrase);
    changes[prompt.phrase].push_back(pair.latent_change);
  }
  std::vector<std::string> little, some, much;
  for (const std::string& phrase : order) {
    const double change = mean_of(changes[phrase]);
    // Not a number: a broken picture.
    (change < kLittleChange ? little : change < kMuchChange ? some : much).push_back(phrase);
  }
  std::string text;
  const auto add = [&](const std::vector<std::string>& names, const char* what) {
    if (names.empty()) return;
    text += (text.empty() ? "" : "; ") + names_of(names) + what;
  };
  add(much, " changed a lot");
  add(some, " changed visibly");
  add(little, " changed little");
  return text.empty() ? "" : text + ".";
}

std::vector<std::string> picture_verdict(const Evaluation& evaluation,
                                         const EvaluationSummary& summary) {
  std::vector<std::string> verdict;
  const ListSummary* unrelated = find_list(summary, PromptList::kUnrelated, -1);
  const ListSummary* target = find_list(summary, PromptList::kTarget, -1);
  const bool unchanged = evaluation.identical || (!evaluation.broken && target != nullptr &&
                                                  target->latent_change.mean < kNoChange);
  if (evaluation.broken) {
    verdict.push_back("The edited model is broken: its pictures hold NaN or infinity.");
  } else if (evaluation.identical) {
    verdict.push_back("Nothing was erased: both models draw exactly the same pictures.");
  } else if (unchanged) {
    verdict.push_back("Nothing was erased: the pictures of the concept hardly changed (" +
                      percent(target->latent_change.mean) + " %).");
  } else if (unrelated->implausibility > kImplausible ||
             (unrelated->latent_change.mean > kMuchChange &&
              2 * unrelated->seen_after.hits <= unrelated->seen_before.hits)) {
    verdict.push_back(
        "The edit damages the model: pictures that have nothing to do with the concept changed "
        "by " +
        percent(unrelated->latent_change.mean) +
        " % (100 % would be another picture). Lower its strength.");
  }
  for (size_t i = 0; i < evaluation.concepts.concepts.size() && !unchanged; ++i) {
    verdict.push_back(
        concept_sentence(summary, evaluation.concepts.concepts[i].target, static_cast<int64_t>(i)));
    std::string attacks =
        attack_sentence(summary, evaluation.concepts.concepts[i].target, static_cast<int64_t>(i));
    if (!attacks.empty()) verdict.push_back(std::move(attacks));
  }
  if (unchanged) return verdict;
  if (const ListSummary* file = find_list(summary, PromptList::kFile, -1)) {
    const Interval back = wilson_interval(file->seen_after);
    verdict.push_back("Of the prompt file, " + of(file->seen_after) +
                      " pictures show what they should not (" + percent(back.low) + " to " +
                      percent(back.high) + " %; before the edit " + of(file->seen_before) + ").");
  }
  if (std::string kept = kept_sentence(evaluation); !kept.empty()) {
    verdict.push_back(std::move(kept));
  }
  if (unrelated != nullptr && !evaluation.broken) {
    const MeanEstimate& change = unrelated->latent_change;
    verdict.push_back("Unrelated pictures changed by " + percent(change.mean) + " % (" +
                      percent(change.interval.low) + " to " + percent(change.interval.high) +
                      " %; 100 % would be another picture).");
  }
  if (evaluation.compares_images && target != nullptr && unrelated != nullptr) {
    char text[200];
    std::snprintf(
        text, sizeof text,
        "By CLIP, the concept's pictures resemble those before by %.2f, unrelated ones by "
        "%.2f (1: the same).",
        target->image_similarity.mean, unrelated->image_similarity.mean);
    verdict.push_back(text);
    if (!evaluation.compares_texts) {
      verdict.push_back(
          "The text encoder and the clip vision model were not trained together, so that pictures "
          "were compared with pictures only.");
    }
  }
  if (target != nullptr) {
    const bool detector = target->by_detector > 0;
    verdict.push_back(
        (detector ? "Judged by " + evaluation.detector_name
                  : std::string("Judged by the base model itself: a picture counts as the phrase "
                                "when the phrase explains it better than the anchor does")) +
        "; it recognised the phrase in " + of(target->seen_before) + " pictures before the edit.");
    if (target->detector_errors > 0) {
      verdict.push_back("The detector failed on " + std::to_string(target->detector_errors) +
                        " pairs of pictures; see the report.");
    }
  }
  return verdict;
}

std::vector<std::string> preflight_verdict(const Evaluation& evaluation) {
  std::vector<std::string> verdict;
  const ResidualScan& scan = evaluation.scan;
  if (!scan.weights_differ) {
    verdict.push_back(
        "No key or value matrix differs between the two models: either nothing was erased, or the "
        "edit acts on the text while drawing, which only pictures show (level 'quick').");
    return verdict;
  }
  for (const ConceptResidual& item : scan.concepts) {
    std::string text = "'" + item.target +
                       "': " + percent(std::min(item.phrases.front().remaining, 9.99)) +
                       " % of its distance to the anchor is left in what the model reads";
    const auto worst =
        std::max_element(item.phrases.begin() + 1, item.phrases.end(),
                         [](const auto& a, const auto& b) { return a.remaining < b.remaining; });
    if (worst != item.phrases.end()) {
      text += ", at most " + percent(std::min(worst->remaining, 9.99)) + " % under other words ('" +
              worst->phrase + "')";
    }
    verdict.push_back(text + ".");
  }
  const auto largest = [](const std::vector<WordDrift>& words) {
    return std::max_element(words.begin(), words.end(),
                            [](const auto& a, const auto& b) { return a.drift < b.drift; });
  };
  if (const auto worst = largest(scan.preserved); worst != scan.preserved.end()) {
    verdict.push_back("Preserved words drift by at most " + percent(worst->drift) + " % ('" +
                      worst->word + "').");
  }
  if (const auto worst = largest(scan.neighbours); worst != scan.neighbours.end()) {
    verdict.push_back("Similar words that nobody listed drift by at most " + percent(worst->drift) +
                      " % ('" + worst->word + "').");
  }
  const auto cost = [&](int64_t pairs) {
    return std::to_string(pairs) + " pairs of pictures (" +
           std::to_string(2 * pairs * evaluation.options.steps) + " steps)";
  };
  verdict.push_back(
      "Read off the weights; only pictures show what that means. Level 'quick' draws " +
      cost(evaluation.quick_pairs) + ", 'thorough' with more attacks " +
      cost(evaluation.thorough_pairs) + ".");
  return verdict;
}

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
                                 {"matrix", layer.role == ProjectionRole::kKey ? "key" : "value"},
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

// --- HTML ---

std::string escape(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string base64(std::string_view bytes) {
  constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t group = 0;
    for (size_t k = 0; k < 3; ++k) {
      group = group << 8 | (i + k < bytes.size() ? static_cast<unsigned char>(bytes[i + k]) : 0u);
    }
    for (size_t k = 0; k < 4; ++k) {
      out += i + k <= bytes.size() ? kDigits[group >> (18 - 6 * k) & 63] : '=';
    }
  }
  return out;
}

std::string text_of(const ordered_json& value) {
  if (value.is_null()) return "-";
  if (value.is_string()) return escape(value.get<std::string>());
  if (value.is_number_float()) {
    char text[32];
    std::snprintf(text, sizeof text, "%.3g", value.get<double>());
    return text;
  }
  return escape(value.dump());
}

std::string table(const std::vector<std::string>& head,
                  const std::vector<std::vector<std::string>>& rows) {
  std::string out = "<table><tr>";
  for (const std::string& cell : head) out += "<th>" + cell + "</th>";
  out += "</tr>";
  for (const std::vector<std::string>& row : rows) {
    out += "<tr>";
    for (const std::string& cell : row) out += "<td>" + cell + "</td>";
    out += "</tr>";
  }
  return out + "</table>\n";
}

// A share with its interval on a line from 0 to 100 %.
std::string plot(double low, double value, double high) {
  char text[500];
  std::snprintf(text, sizeof text,
                "<svg width=\"220\" height=\"16\" role=\"img\"><line x1=\"10\" y1=\"8\" x2=\"210\" "
                "y2=\"8\" stroke=\"#ccc\"/><line x1=\"%.1f\" y1=\"8\" x2=\"%.1f\" y2=\"8\" "
                "stroke=\"#0072b2\" stroke-width=\"5\"/><circle cx=\"%.1f\" cy=\"8\" r=\"5\" "
                "fill=\"#d55e00\"/></svg>",
                10 + 200 * low, 10 + 200 * high, 10 + 200 * value);
  return text;
}

std::string lists_table(const ordered_json& lists) {
  std::vector<std::vector<std::string>> rows;
  for (const ordered_json& list : lists) {
    const auto hits = list.at("hits").at(0).get<double>();
    const auto trials = list.at("hits").at(1).get<double>();
    if (trials == 0) continue;
    const auto low = list.at("interval").at(0).get<double>();
    const auto high = list.at("interval").at(1).get<double>();
    const ordered_json& change = list.at("latent_change");
    const auto fraction = [](const ordered_json& pair) {
      return text_of(pair.at(0)) + " of " + text_of(pair.at(1));
    };
    rows.push_back({list.at("concept").is_null() ? "all" : text_of(list.at("concept")),
                    text_of(list.at("list")), fraction(list.at("hits")),
                    plot(low, hits / trials, high), percent(low) + " to " + percent(high) + " %",
                    fraction(list.at("seen_before")) + " / " + fraction(list.at("seen_after")),
                    text_of(list.at("mcnemar_p_holm")),
                    text_of(change.at("mean")) + " (" + text_of(change.at("interval").at(0)) +
                        " to " + text_of(change.at("interval").at(1)) + ")",
                    text_of(list.at("attention_ratio")), text_of(list.at("noise_gap_ratio"))});
  }
  return table({"concept", "list", "as wanted", "share with its 95 % interval", "interval",
                "seen before / after", "p (McNemar, Holm)", "change of pictures", "attention left",
                "noise gap left"},
               rows);
}

std::string benchmark_table(const ordered_json& lines) {
  std::vector<std::vector<std::string>> rows;
  for (const ordered_json& line : lines) {
    rows.push_back(
        {text_of(line.at("line")) + ", " + text_of(line.at("better")) + " is better",
         text_of(line.at("before")), text_of(line.at("after")),
         text_of(line.at("interval").at(0)) + " to " + text_of(line.at("interval").at(1)),
         text_of(line.at("pictures"))});
  }
  return table({"line", "before", "after", "interval", "pictures"}, rows);
}

std::string scan_tables(const ordered_json& scan) {
  std::string out;
  for (const ordered_json& item : scan.at("concepts")) {
    out += "<h3>" + text_of(item.at("target")) + "</h3>";
    std::vector<std::vector<std::string>> rows;
    for (const ordered_json& phrase : item.at("phrases")) {
      rows.push_back({text_of(phrase.at("phrase")), text_of(phrase.at("form")),
                      text_of(phrase.at("remaining"))});
    }
    out += table({"phrase", "form", "left of its distance to the anchor"}, rows);
    rows.clear();
    for (const ordered_json& leak : item.at("leaks")) {
      rows.push_back({text_of(leak.at("word")), text_of(leak.at("content_before")),
                      text_of(leak.at("content_after"))});
    }
    if (!rows.empty()) {
      out += table({"words that still carry it", "share before", "share after"}, rows);
    }
  }
  std::vector<std::vector<std::string>> rows;
  for (const char* key : {"preserved", "neighbours"}) {
    for (const ordered_json& word : scan.at(key)) {
      rows.push_back({text_of(word.at("word")), key, text_of(word.at("drift"))});
    }
  }
  if (!rows.empty()) out += "<h3>What should stay</h3>" + table({"word", "list", "drift"}, rows);
  return out;
}

void summarize_attacks(const Evaluation& evaluation, EvaluationSummary& summary) {
  std::vector<Count> back(evaluation.prompts.size());
  for (const PicturePair& pair : evaluation.pairs) {
    ++back[pair.prompt].trials;
    back[pair.prompt].hits += pair.seen_after;
  }
  std::map<std::pair<int64_t, Attack>, Count> counts;
  for (size_t i = 0; i < evaluation.prompts.size(); ++i) {
    const EvaluationPrompt& prompt = evaluation.prompts[i];
    if (prompt.attack) {
      Count& count = counts[{prompt.concept_index, *prompt.attack}];
      count.hits += back[i].hits;
      count.trials += back[i].trials;
    }
    if (should_vanish(prompt.list) && back[i].hits > 0) summary.failing.push_back({i, back[i]});
  }
  for (const auto& [key, count] : counts) {
    summary.attacks.push_back({key.second, key.first, count});
  }
  std::stable_sort(summary.failing.begin(), summary.failing.end(),
                   [](const auto& a, const auto& b) { return a.back.share() > b.back.share(); });
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

std::string failing_table(const ordered_json& failing) {
  std::vector<std::vector<std::string>> rows;
  for (const ordered_json& item : failing) {
    rows.push_back({text_of(item.at("concept")), text_of(item.at("list")),
                    text_of(item.at("attack")), text_of(item.at("prompt")),
                    text_of(item.at("back").at(0)) + " of " + text_of(item.at("back").at(1))});
  }
  return table({"concept", "list", "attack", "prompt", "pictures that still show it"}, rows);
}

}  // namespace

const ListSummary* find_list(const EvaluationSummary& summary, PromptList list, int64_t index) {
  for (const ListSummary& item : summary.lists) {
    if (item.list == list && item.concept_index == index && item.seen_after.trials > 0) {
      return &item;
    }
  }
  return nullptr;
}

Count ListSummary::hits() const {
  if (should_vanish(list)) return {seen_after.trials - seen_after.hits, seen_after.trials};
  return seen_after;
}

EvaluationSummary summarize(const Evaluation& evaluation) {
  EvaluationSummary summary;
  if (evaluation.pairs.empty()) {
    summary.scores = preflight_scores(evaluation.scan);
    summary.verdict = preflight_verdict(evaluation);
  } else {
    const auto concepts = static_cast<int64_t>(evaluation.concepts.concepts.size());
    for (const PromptList list : kPromptLists) {
      if (!should_vanish(list)) continue;
      std::vector<double> p;
      const size_t first = summary.lists.size();
      for (int64_t i = 0; i < concepts; ++i) {
        ListSummary item = summarize_list(evaluation, list, i);
        if (item.seen_after.trials == 0) continue;
        p.push_back(item.p);
        summary.lists.push_back(std::move(item));
      }
      const std::vector<double> corrected = holm(p);
      for (size_t i = 0; i < corrected.size(); ++i) {
        summary.lists[first + i].p_holm = corrected[i];
      }
    }
    for (const PromptList list : kPromptLists) {
      ListSummary item = summarize_list(evaluation, list, -1);
      const bool extra = list == PromptList::kAttacks || list == PromptList::kFile;
      if (!extra || item.seen_after.trials > 0) summary.lists.push_back(std::move(item));
    }
    summarize_attacks(evaluation, summary);
    summary.scores = {
        share_of(summary, PromptList::kTarget), share_of(summary, PromptList::kSynonyms),
        share_of(summary, PromptList::kPreserved), share_of(summary, PromptList::kNeighbours),
        share_of(summary, PromptList::kUnrelated)};
    summary.verdict = picture_verdict(evaluation, summary);
  }
  summary.scores.harmonic_mean = harmonic_mean_of(summary.scores);
  return summary;
}

ConceptSet with_failing_prompts(const Evaluation& evaluation, const EvaluationSummary& summary) {
  ConceptSet set = evaluation.concepts;
  std::set<std::string> taken;
  for (const Concept& item : set.concepts) {
    taken.insert(fold_case(item.anchor));
    for (const std::string& phrase : phrases(item)) taken.insert(fold_case(phrase));
  }
  for (const PreservedPhrase& item : set.preserve) taken.insert(fold_case(item.phrase));
  for (const std::string& word : evaluation.options.neighbours) taken.insert(fold_case(word));
  for (const FailingPrompt& failing : summary.failing) {
    const EvaluationPrompt& prompt = evaluation.prompts[failing.prompt];
    const std::string& phrase = prompt.phrase;
    if (phrase.empty() || phrase.size() > kLongestSynonym) continue;
    if (!taken.insert(fold_case(phrase)).second) continue;
    set.concepts[static_cast<size_t>(prompt.concept_index)].synonyms.push_back(phrase);
  }
  return set;
}

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
  root["pairs"] = ordered_json::array();
  for (const PicturePair& pair : evaluation.pairs) {
    root["pairs"].push_back(pair_json(evaluation, pair));
  }
  root["protocol"] = protocol_json(evaluation);
  // Not a number becomes null; bytes that are not UTF-8 must not end a long run.
  return root.dump(1, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

std::string to_html(std::string_view json, const std::vector<std::string>& pages) {
  try {
    const ordered_json root = parse_ordered_json(json, "the report", kReportLimits);
    if (root.at("format") != "lacuna.evaluation/1") {
      throw Error("this is not a report of Evaluate Erasure (format lacuna.evaluation/1)");
    }
    std::string out =
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Lacuna: Evaluate "
        "Erasure</title>\n<style>body{font:16px/1.5 sans-serif;max-width:1200px;margin:2em auto;"
        "padding:0 1em}table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;"
        "padding:.2em .6em;text-align:left}img{max-width:100%}.verdict{font-size:1.15em}"
        "</style></head><body>\n<h1>Evaluate Erasure</h1>\n<div class=\"verdict\">";
    for (const ordered_json& line : root.at("verdict")) out += "<p>" + text_of(line) + "</p>\n";
    out += "</div>\n";
    for (const std::string& page : pages) {
      out += "<p><img alt=\"pictures before and after the edit\" src=\"data:image/png;base64," +
             base64(page) + "\"></p>\n";
    }
    if (!root.at("lists").empty()) out += "<h2>Results</h2>\n" + lists_table(root.at("lists"));
    if (!root.at("failing_prompts").empty()) {
      out += "<h2>Prompts that still show what should be gone</h2>\n" +
             failing_table(root.at("failing_prompts"));
    }
    if (!root.at("benchmarks").empty()) {
      out += "<h2>Under the names of published benchmarks</h2>\n" +
             benchmark_table(root.at("benchmarks"));
    }
    out += "<h2>What the weights say</h2>\n" + scan_tables(root.at("preflight"));
    out += "<h2>Protocol</h2>\n";
    std::vector<std::vector<std::string>> rows;
    for (const auto& [key, value] : root.at("protocol").items()) {
      rows.push_back({escape(key), key == "concepts" ? "<pre>" + escape(value.dump(1)) + "</pre>"
                                                     : text_of(value)});
    }
    return out + table({"", ""}, rows) + "</body></html>\n";
  } catch (const ordered_json::exception& e) {
    throw Error(std::string("the report cannot be read: ") + e.what());
  }
}

}  // namespace lacuna
