// SPDX-License-Identifier: Apache-2.0
#include "lacuna/evaluation/evaluation_summary.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <set>

#include "lacuna/files/text.h"

namespace lacuna {
namespace {

// Shares of the distance between two unrelated pictures.
constexpr double kNoChange = 0.02;
constexpr double kLittleChange = 0.3;
constexpr double kMuchChange = 0.6;
constexpr double kImplausible = 1.5;  // denoising error of damaged pictures over that of whole ones
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

// Of an edit that lies in no weight: where it acts.
Scores gate_scores(const GateScan& gate) {
  Scores scores;
  Count other_words;
  const auto add = [](Count& sum, const Count& count) {
    sum.hits += count.hits;
    sum.trials += count.trials;
  };
  Count erased;
  for (const ConceptGate& item : gate.concepts) {
    add(other_words, item.disguised.acted);
    for (const GateCount& form : item.named) {
      add(form.form == "synonyms" ? other_words : erased, form.acted);
    }
  }
  const auto share = [](const Count& count) { return count.trials > 0 ? count.share() : kUnknown; };
  scores.erased = share(erased);
  scores.synonyms = share(other_words);
  for (const GateCount& item : gate.others) {
    const double left_alone = 1 - item.acted.share();
    if (item.form == "preserved") scores.preserved = left_alone;
    if (item.form == "similar words that nobody listed") scores.neighbours = left_alone;
    if (item.form == "unrelated captions") scores.unrelated = left_alone;
  }
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

std::string first_of(const std::vector<std::string>& prompts) {
  return prompts.empty() ? "" : ", not on '" + prompts.front() + "'";
}

// Told from the text alone.
std::vector<std::string> gate_verdict(const GateScan& gate) {
  if (!gate.gated) return {};
  std::vector<std::string> verdict;
  const Count named = gate.named();
  const Interval missed = wilson_interval({named.trials - named.hits, named.trials});
  std::string text = "The edit acts on prompts that name a concept: on " + of(named) +
                     " that do (it may miss " + percent(missed.low) + " to " +
                     percent(missed.high) + " %)";
  std::map<std::string, GateCount> forms;
  for (const ConceptGate& item : gate.concepts) {
    for (const GateCount& form : item.named) {
      GateCount& sum = forms[form.form];
      sum.acted.hits += form.acted.hits;
      sum.acted.trials += form.acted.trials;
      sum.wrong.insert(sum.wrong.end(), form.wrong.begin(), form.wrong.end());
    }
  }
  std::string parts;
  for (const auto& [form, sum] : forms) {
    parts += (parts.empty() ? ": " : ", ") + form + " " + of(sum.acted) + first_of(sum.wrong);
  }
  text += parts + ".";
  if (named.hits < named.trials) {
    text +=
        " Attention Refine's clip, connected to the prompts, misses none that says a concept word "
        "for word (at strength 1).";
  }
  verdict.push_back(std::move(text));
  std::string example;
  for (const ConceptGate& item : gate.concepts) {
    if (example.empty()) example = first_of(item.disguised.wrong);
  }
  const Count disguised = gate.disguised();
  if (disguised.trials > 0) {
    verdict.push_back("Written otherwise (typing errors, parted words, descriptions) it acts on " +
                      of(disguised) + example + ".");
  }
  text.clear();
  for (const GateCount& item : gate.others) {
    text += (text.empty() ? "" : ", ") + of(item.acted) + " of " + item.form;
    if (!item.wrong.empty()) text += " ('" + item.wrong.front() + "')";
  }
  verdict.push_back("Of prompts that name none it acts on " + text +
                    "; all others are drawn as before, bit for bit.");
  return verdict;
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

std::string cost_sentence(const Evaluation& evaluation) {
  const auto cost = [&](int64_t pairs) {
    return std::to_string(pairs) + " pairs of pictures (" +
           std::to_string(2 * pairs * evaluation.options.steps) + " steps)";
  };
  return "Level 'quick' draws " + cost(evaluation.quick_pairs) + ", 'thorough' with more attacks " +
         cost(evaluation.thorough_pairs) + ".";
}

std::vector<std::string> preflight_verdict(const Evaluation& evaluation) {
  std::vector<std::string> verdict;
  const ResidualScan& scan = evaluation.scan;
  if (!scan.weights_differ && evaluation.gate.gated) {
    verdict = gate_verdict(evaluation.gate);
    verdict.push_back("Told from the text alone; what is drawn then, pictures show. " +
                      cost_sentence(evaluation));
    return verdict;
  }
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
  for (std::string& line : gate_verdict(evaluation.gate)) verdict.push_back(std::move(line));
  verdict.push_back("Read off the weights; only pictures show what that means. " +
                    cost_sentence(evaluation));
  return verdict;
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
    summary.scores = evaluation.gate.gated && !evaluation.scan.weights_differ
                         ? gate_scores(evaluation.gate)
                         : preflight_scores(evaluation.scan);
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
    for (std::string& line : gate_verdict(evaluation.gate)) {
      summary.verdict.push_back(std::move(line));
    }
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

}  // namespace lacuna
