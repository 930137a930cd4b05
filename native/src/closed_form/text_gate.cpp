// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/text_gate.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <string>
#include <utility>

#include "lacuna/closed_form/concept_recognizer.h"
#include "lacuna/closed_form/gate_prompts.h"
#include "lacuna/closed_form/spd_solver.h"
#include "lacuna/closed_form/text_statistics.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

// Chosen on the demo model's flags and objects, by words that its protocol does not use.
constexpr double kShareOfOthers = 0.5;
constexpr double kShareOfTargets = 0.5;  // of the spread within phrases; the rest is of words
constexpr double kRidge = 1e-3;
// One odd prompt of a concept does not decide its threshold.
constexpr int64_t kOddPrompts = 1;
constexpr double kMargin = 0.1;
constexpr double kNothing = -1e9;

// Every row that was sampled of prompts with the one before it, a block of phrases at a time: those
// of the full retain set take gigabytes.
class PairsInBlocks {
 public:
  // rows: [phrases, prompts, sampled positions, d] float16
  PairsInBlocks(const at::Tensor& rows, int64_t window, Progress& progress)
      : rows_(rows), progress_(progress) {
    const std::vector<int64_t> places = sampled_positions(window);
    std::vector<int64_t> now;
    for (size_t i = 1; i < places.size(); ++i) {
      if (places[i] == places[i - 1] + 1) now.push_back(static_cast<int64_t>(i));
    }
    now_ = at::tensor(now, at::kLong);
  }

  int64_t count() const { return rows_.size(0) * rows_.size(1) * now_.size(0); }

  // visit(first phrase, [phrases of the block * prompts, m, 2 d] float32)
  template <typename Visit>
  void each(const Visit& visit) const {
    for (int64_t first = 0; first < rows_.size(0); first += kPhrases) {
      progress_.check();
      const at::Tensor block =
          rows_.narrow(0, first, std::min(kPhrases, rows_.size(0) - first)).flatten(0, 1);
      visit(first, at::cat({block.index_select(1, now_), block.index_select(1, now_ - 1)}, 2)
                       .to(at::kFloat));
    }
  }

  // [2 d] float64
  at::Tensor mean() const {
    at::Tensor sum = at::zeros({2 * rows_.size(3)}, at::kDouble);
    each([&](int64_t, const at::Tensor& block) { sum += block.sum({0, 1}, false, at::kDouble); });
    return sum / static_cast<double>(count());
  }

 private:
  static constexpr int64_t kPhrases = 64;
  at::Tensor rows_;
  Progress& progress_;
  at::Tensor now_;
};

std::string shown(const std::string& phrase) { return in_quotes(phrase, 40); }

// What must stay: retained words and preserved phrases.
PhraseRows rows_to_stay(TextEncoder& encoder, const std::vector<PreservedPhrase>& preserve,
                        const RetainSet& retained, StatisticsCache* cache, Progress& progress) {
  std::vector<std::string> preserved;
  for (const PreservedPhrase& item : preserve) preserved.push_back(item.phrase);
  PhraseRows stay = retained.kept;
  const PhraseRows listed =
      read_phrase_rows(encoder, preserved, retained.vocabulary, progress, cache);
  stay.phrases.insert(stay.phrases.end(), listed.phrases.begin(), listed.phrases.end());
  stay.prompts.insert(stay.prompts.end(), listed.prompts.begin(), listed.prompts.end());
  stay.before.insert(stay.before.end(), listed.before.begin(), listed.before.end());
  stay.last = at::cat({stay.last, listed.last});
  stay.rows = at::cat({stay.rows, listed.rows});
  return stay;
}

// [phrases, prompts, k]: prompts of what must stay in which a concept stands beside it.
at::Tensor named_beside(const PhraseRows& stay, const std::vector<NamedPhrase>& named,
                        Progress& progress) {
  const int64_t phrases_kept = stay.rows.size(0);
  at::Tensor beside =
      at::zeros({phrases_kept, kRetainPrompts, static_cast<int64_t>(named.size())}, at::kBool);
  bool* out = beside.mutable_data_ptr<bool>();
  std::vector<std::string> targets;
  for (const NamedPhrase& each : named) targets.push_back(fold_case(each.phrase));
  for (int64_t i = 0; i < phrases_kept; ++i) {
    progress.check();
    const std::string phrase = fold_case(stay.phrases[static_cast<size_t>(i)]);
    for (int64_t j = 0; j < kRetainPrompts; ++j) {
      const std::string prompt =
          fold_case(stay.prompts[static_cast<size_t>(i * kRetainPrompts + j)]);
      for (const std::string& target : targets) {
        *out++ = names_phrase(prompt, target) && !names_phrase(phrase, target);
      }
    }
  }
  return beside;
}

// A phrase that ordinary prompts are made of ("a", "photo") says nothing of what they are about;
// `confused` as in FittedGate.
void name_ordinary_words(const PhraseRows& stay, const std::vector<NamedPhrase>& named,
                         const at::Tensor& beside, std::vector<std::string>& confused) {
  constexpr double kOrdinary = 0.25;  // of the prompts
  const at::Tensor of_prompts = beside.flatten(0, 1).to(at::kDouble);
  const auto [says, first] = of_prompts.max(0);
  const at::Tensor share = of_prompts.mean(0);
  for (size_t k = 0; k < named.size(); ++k) {
    const auto column = static_cast<int64_t>(k);
    if (share[column].item<double>() < kOrdinary) continue;
    const auto prompt = static_cast<size_t>(first[column].item<int64_t>());
    confused.push_back(shown(named[k].phrase) + " from " + shown(stay.prompts[prompt]));
  }
}

// [k, k]: phrases of the same concept.
at::Tensor same_concept(const std::vector<NamedPhrase>& named) {
  std::vector<int64_t> items;
  for (const NamedPhrase& each : named) items.push_back(static_cast<int64_t>(each.item));
  const at::Tensor item = at::tensor(items, at::kLong);
  return item.unsqueeze(0).eq(item.unsqueeze(1));
}

// Places of the phrase's last token in what is sampled of each of its prompts; only of phrases with
// two or more that are.
std::vector<std::vector<std::pair<int64_t, int64_t>>> last_tokens(TextEncoder& encoder,
                                                                  const PhraseRows& stay,
                                                                  Progress& progress) {
  const std::vector<int64_t> places = sampled_positions(encoder.window());
  const auto tokens = [&](const std::string& text) {
    return text.empty() ? 0 : static_cast<int64_t>(encoder.tokenize(text).size()) - 2;
  };
  std::vector<std::vector<std::pair<int64_t, int64_t>>> out;  // prompt and row, of each phrase
  for (size_t i = 0; i < stay.phrases.size(); ++i) {
    progress.check();
    const int64_t own = tokens(stay.phrases[i]);
    std::vector<std::pair<int64_t, int64_t>> found;
    for (int64_t j = 0; j < kRetainPrompts; ++j) {
      const int64_t last = tokens(stay.before[i * kRetainPrompts + static_cast<size_t>(j)]) + own;
      const auto at = std::find(places.begin(), places.end(), last);
      if (at == places.begin() || at == places.end() || *(at - 1) != last - 1) continue;
      found.emplace_back(static_cast<int64_t>(i) * kRetainPrompts + j, at - places.begin());
    }
    if (found.size() > 1) out.push_back(std::move(found));
  }
  return out;
}

// Adds how the last token of what must stay, with the one before, differs from prompt to prompt,
// phrase by phrase: a few targets in their own prompts show less of it than hundreds of words do.
// Returns the share of the whole spread within phrases that is left to the targets.
double add_spread_of_words(GramSum& spread, TextEncoder& encoder, const PhraseRows& stay,
                           Progress& progress) {
  const auto places = last_tokens(encoder, stay, progress);
  size_t degrees = 0;
  for (const auto& phrase : places) degrees += phrase.size() - 1;
  if (degrees == 0) return 1.0;
  const at::Tensor prompts = stay.rows.flatten(0, 1);
  for (const auto& phrase : places) {
    progress.check();
    std::vector<at::Tensor> rows;
    for (const auto& [prompt, row] : phrase) {
      rows.push_back(at::cat({prompts[prompt][row], prompts[prompt][row - 1]}));
    }
    const at::Tensor tokens = at::stack(rows).to(at::kFloat);
    spread.add(tokens - tokens.mean(0), (1.0 - kShareOfTargets) / static_cast<double>(degrees));
  }
  return kShareOfTargets;
}

// The last token of each phrase, whatever else its prompt says; `confused` as in FittedGate.
TextGate::Test token_test(TextEncoder& encoder, const PhraseRows& stay,
                          const std::vector<NamedPhrase>& named, const at::Tensor& beside,
                          std::vector<std::string>& confused, Progress& progress) {
  const int64_t d = stay.rows.size(3);
  const auto count = static_cast<int64_t>(named.size());
  const PairsInBlocks others(stay.rows, encoder.window(), progress);
  const at::Tensor mean = others.mean();
  GramSum spread(2 * d);
  others.each([&](int64_t, const at::Tensor& block) {
    spread.add(block.flatten(0, 1) - mean.to(at::kFloat),
               kShareOfOthers / static_cast<double>(others.count()));
  });
  int64_t prompts = 0;
  for (const NamedPhrase& each : named) prompts += each.tokens.size(0);
  const double share = add_spread_of_words(spread, encoder, stay, progress);
  std::vector<at::Tensor> means;
  for (const NamedPhrase& each : named) {
    progress.check();
    const at::Tensor tokens = each.tokens.to(at::kDouble);
    means.push_back(tokens.mean(0));
    spread.add(tokens - means.back(), share / static_cast<double>(prompts));
  }
  at::Tensor covariance = spread.finish();
  covariance.diagonal().add_(kRidge * covariance.diagonal().mean().item<double>());
  const at::Tensor centred = at::stack(means) - mean;  // [k, 2 d]
  at::Tensor weights = SpdSolver(covariance, kNoiseFloor).solve(centred.transpose(0, 1));
  weights = weights / (centred.transpose(0, 1) * weights).sum(0).clamp_min(1e-12);  // [2 d, k]
  const at::Tensor zero = at::matmul(mean, weights);                                // [k]

  // [phrases, k]
  at::Tensor stay_score = at::zeros({stay.rows.size(0), count}, at::kDouble);
  others.each([&](int64_t first, const at::Tensor& block) {
    const at::Tensor scores = at::matmul(block, weights.to(at::kFloat)) - zero.to(at::kFloat);
    const int64_t phrases = block.size(0) / kRetainPrompts;
    stay_score.narrow(0, first, phrases)
        .copy_(scores.amax(1)
                   .reshape({phrases, kRetainPrompts, count})
                   .masked_fill(beside.narrow(0, first, phrases), kNothing)
                   .amax(1));
  });
  const auto [highest, which] = stay_score.max(0);
  // Unlisted things of a class are as like a target as the other targets of the class are.
  std::vector<double> lowest;
  std::vector<at::Tensor> most;  // of each phrase's prompts, by the weights of all: [k]
  for (int64_t k = 0; k < count; ++k) {
    progress.check();
    const at::Tensor tokens = named[static_cast<size_t>(k)].tokens.to(at::kDouble);
    const at::Tensor scores = at::matmul(tokens, weights) - zero;
    most.push_back(scores.amax(0));
    const at::Tensor sorted = std::get<0>(scores.select(1, k).sort());
    lowest.push_back(sorted[std::min(kOddPrompts, sorted.size(0) - 1)].item<double>());
  }
  const at::Tensor alike =
      same_concept(named).logical_or(at::stack(most).ge(at::tensor(lowest, at::kDouble)));
  const at::Tensor siblings_most = at::stack(most).masked_fill(alike, kNothing).amax(0);
  std::vector<double> thresholds;
  for (size_t k = 0; k < named.size(); ++k) {
    const auto column = static_cast<int64_t>(k);
    const double other = highest[column].item<double>();
    if (lowest[k] <= other) {
      const auto number = static_cast<size_t>(which[column].item<int64_t>());
      confused.push_back(shown(named[k].phrase) + " from " + shown(stay.phrases[number]));
    }
    const double nearest = std::max(other, siblings_most[column].item<double>());
    thresholds.push_back(lowest[k] > nearest ? (lowest[k] + nearest) / 2 : lowest[k] - 1e-6);
  }
  return {weights.narrow(0, 0, d).to(at::kFloat).contiguous(),
          weights.narrow(0, d, d).to(at::kFloat).contiguous(),
          (zero + at::tensor(thresholds, at::kDouble)).to(at::kFloat), false};
}

// What whole prompts are about.
TextGate::Test prompt_test(const PhraseRows& stay, const std::vector<NamedPhrase>& named,
                           const at::Tensor& beside) {
  const int64_t d = stay.rows.size(3);
  std::vector<at::Tensor> centres;
  for (const NamedPhrase& each : named) centres.push_back(each.ends.to(at::kDouble).mean(0));
  const ConceptRecognizer recognizer(stay.last, at::stack(centres));
  const at::Tensor ends_of_others =
      stay.rows.select(2, stay.rows.size(2) - 1).reshape({-1, d}).to(at::kDouble);
  const at::Tensor stay_most =
      recognizer.scores(ends_of_others).masked_fill(beside.flatten(0, 1), kNothing).amax(0);
  std::vector<at::Tensor> most;
  for (const NamedPhrase& each : named) {
    most.push_back(recognizer.scores(each.ends.to(at::kDouble)).amax(0));
  }
  const at::Tensor between = at::stack(most).masked_fill(same_concept(named), kNothing);
  const at::Tensor others_most = at::maximum(stay_most, between.amax(0));
  const at::Tensor enough = (others_most + kMargin).clamp_min(ConceptRecognizer::kNames);
  return {recognizer.weights().to(at::kFloat),
          {},
          (at::matmul(recognizer.mean(), recognizer.weights()) + enough).to(at::kFloat),
          true};
}

}  // namespace

FittedGate fit_gate(TextEncoder& encoder, const std::vector<Concept>& concepts,
                    const std::vector<PreservedPhrase>& preserve, const RetainSet& retained,
                    Progress& progress, StatisticsCache* cache) {
  const PhraseRows stay = rows_to_stay(encoder, preserve, retained, cache, progress);
  const std::vector<NamedPhrase> named =
      read_named_phrases(encoder, concepts, retained.vocabulary, cache, progress);
  const at::Tensor beside = named_beside(stay, named, progress);
  FittedGate fitted;
  name_ordinary_words(stay, named, beside, fitted.confused);
  TextGate gate;
  gate.window = encoder.window();
  gate.tests.push_back(token_test(encoder, stay, named, beside, fitted.confused, progress));
  gate.tests.push_back(prompt_test(stay, named, beside));
  fitted.gate = std::make_shared<const TextGate>(std::move(gate));
  return fitted;
}

FittedGate fit_gate(TextEncoder& encoder, const std::vector<Concept>& concepts,
                    const std::vector<PreservedPhrase>& preserve, const RetainSet& retained,
                    RetainSetSize asked, Progress& progress, StatisticsCache* cache) {
  if (!retained.frames.empty()) {
    return fit_gate(encoder, concepts, preserve, retained, progress, cache);
  }
  const RetainSetSize size = asked == RetainSetSize::kNone ? RetainSetSize::kSmall : asked;
  const RetainSet words = collect_retain_set(encoder, concepts, size, progress, cache);
  return fit_gate(encoder, concepts, preserve, words, progress, cache);
}

at::Tensor opens(const TextGate& gate, const at::Tensor& context) {
  at::Tensor open = at::zeros({context.size(0)}, at::kBool);
  for (const at::Tensor& window : context.to(at::kCPU, at::kFloat).split(gate.window, 1)) {
    for (const TextGate::Test& test : gate.tests) {
      const int64_t first = test.last_row_only ? window.size(1) - 1 : 1;
      const int64_t count = window.size(1) - first;
      if (first < 1 || count < 1) continue;
      at::Tensor score = at::matmul(window.narrow(1, first, count), test.now) - test.offset;
      if (test.before.defined()) {
        score = score + at::matmul(window.narrow(1, first - 1, count), test.before);
      }
      open = open.logical_or(score.gt(0).flatten(1).any(1));
    }
  }
  return open;
}

}  // namespace lacuna
