// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/text_gate.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include "lacuna/closed_form/concept_recognizer.h"
#include "lacuna/closed_form/spd_solver.h"
#include "lacuna/closed_form/text_statistics.h"
#include "lacuna/concepts/concept_prompts.h"
#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

constexpr int kPlainPrompts = 8;  // of the concept's own templates
// Chosen on the demo model's flags and objects, by words that its protocol does not use.
constexpr double kShareOfOthers = 0.5;
constexpr double kRidge = 1e-3;
// One odd prompt of a concept does not decide its threshold.
constexpr int64_t kOddPrompts = 1;

constexpr std::array<std::string_view, 8> kBesideOthers{"{} and {1}",
                                                        "a photo of {} with {1}",
                                                        "{1} and {}",
                                                        "{1}, {2}, {}",
                                                        "a picture of {1} beside {}",
                                                        "a drawing of {1} and {} in {2} style",
                                                        "a large {1} on a {2} next to {}, sunset",
                                                        "{1} {2} {}"};

// So many other words before the phrase: its rows depend on where it stands.
constexpr std::array<size_t, 3> kWordsBefore{6, 14, 30};

// A prompt that names a phrase, and where the phrase's last token stands.
struct NamingPrompt {
  std::string text;
  int64_t last_token;
};

std::vector<NamingPrompt> naming_prompts(TextEncoder& encoder, const Concept& item,
                                         const std::string& phrase, size_t number,
                                         const std::vector<std::string>& companions) {
  std::vector<std::string> templates;
  for (std::string_view each : prompt_templates(item.kind).first(kPlainPrompts)) {
    templates.emplace_back(each);
  }
  const auto companion = [&](size_t which) -> const std::string& {
    return companions[(number * 31 + which) % companions.size()];
  };
  for (size_t i = 0; i < kBesideOthers.size(); ++i) {
    templates.push_back(
        fill_companions(kBesideOthers[i], companion(i * 17 + 101), companion(i * 17 + 202)));
  }
  for (const size_t words : kWordsBefore) {
    std::string text;
    for (size_t i = 0; i < words; ++i) text += companion(words * 13 + i * 7) + (i % 3 ? " " : ", ");
    templates.push_back(text + "{}, " + companion(words));
  }
  const auto tokens = static_cast<int64_t>(encoder.tokenize(phrase).size()) - 2;
  std::vector<NamingPrompt> prompts;
  for (const std::string& each : templates) {
    const std::string before = prefix_of_template(each);
    const int64_t begin =
        before.empty() ? 0 : static_cast<int64_t>(encoder.tokenize(before).size()) - 2;
    const int64_t last_token = begin + tokens;
    // A window that ends before the phrase does says nothing of it.
    if (last_token < encoder.window() || prompts.empty()) {
      prompts.push_back({fill_template(each, phrase), std::min(last_token, encoder.window() - 1)});
    }
  }
  return prompts;
}

// [rows, 2 d]: every row but the first with the one before it; embedded: [T, d]
at::Tensor with_row_before(const at::Tensor& embedded) {
  const int64_t pairs = embedded.size(0) - 1;
  return at::cat({embedded.narrow(0, 1, pairs), embedded.narrow(0, 0, pairs)}, 1);
}

// The same of what was sampled of prompts, [m, 2 d]; rows: [n, prompts, P, d]
at::Tensor sampled_pairs(const at::Tensor& rows, int64_t window) {
  const std::vector<int64_t> places = sampled_positions(window);
  std::vector<int64_t> now;
  for (size_t i = 1; i < places.size(); ++i) {
    if (places[i] == places[i - 1] + 1) now.push_back(static_cast<int64_t>(i));
  }
  const at::Tensor at_now = at::tensor(now, at::kLong);
  return at::cat({rows.index_select(2, at_now), rows.index_select(2, at_now - 1)}, 3);
}

std::string shown(const std::string& phrase) { return in_quotes(phrase, 40); }

}  // namespace

FittedGate fit_gate(TextEncoder& encoder, const std::vector<Concept>& concepts,
                    const std::vector<PreservedPhrase>& preserve, const RetainSet& retained,
                    Progress& progress) {
  const int64_t d = encoder.width();
  const int64_t window = encoder.window();
  // What must stay: retained words and preserved phrases.
  std::vector<std::string> preserved;
  for (const PreservedPhrase& item : preserve) preserved.push_back(item.phrase);
  PhraseRows stay = read_phrase_rows(encoder, preserved, retained.vocabulary, progress);
  stay.phrases.insert(stay.phrases.begin(), retained.kept.phrases.begin(),
                      retained.kept.phrases.end());
  stay.prompts.insert(stay.prompts.begin(), retained.kept.prompts.begin(),
                      retained.kept.prompts.end());
  stay.last = at::cat({retained.kept.last, stay.last});
  stay.rows = at::cat({retained.kept.rows, stay.rows});
  const at::Tensor pairs = sampled_pairs(stay.rows, window);  // [n, prompts, m, 2 d]
  const int64_t phrases_kept = pairs.size(0);
  const at::Tensor others = pairs.reshape({-1, 2 * d}).to(at::kFloat);
  const at::Tensor mean = others.mean(0, false, at::kDouble);
  GramSum spread(2 * d);
  spread.add(others - mean.to(at::kFloat), kShareOfOthers / static_cast<double>(others.size(0)));

  // The concepts' own prompts, phrase by phrase.
  std::vector<std::string> named;
  std::vector<std::string> folded;  // of each phrase
  std::vector<size_t> concept_of;   // of each phrase
  std::vector<at::Tensor> own;      // of each phrase: [prompts, 2 d], the phrase's last token
  std::vector<at::Tensor> ends;     // of each phrase: [plain prompts, d]
  std::vector<at::Tensor> means;
  std::vector<at::Tensor> odd;
  for (const Concept& item : concepts) {
    for (const std::string& phrase : phrases(item)) {
      std::vector<std::string> texts;
      std::vector<int64_t> places;
      for (NamingPrompt& each :
           naming_prompts(encoder, item, phrase, named.size(), retained.vocabulary)) {
        texts.push_back(std::move(each.text));
        places.push_back(each.last_token);
      }
      const auto plain = std::min<std::ptrdiff_t>(kPlainPrompts, std::ssize(texts));
      std::vector<at::Tensor> last;
      for (auto text = texts.begin(); text != texts.begin() + plain; ++text) {
        progress.check();
        last.push_back(encoder.encode({*text})[0][window - 1].to(at::kCPU, at::kDouble));
      }
      const std::vector<at::Tensor> starts = encode_starts(encoder, texts, progress);
      std::vector<at::Tensor> tokens;
      for (size_t i = 0; i < starts.size(); ++i) {
        tokens.push_back(
            with_row_before(starts[i])[std::min(places[i], starts[i].size(0) - 1) - 1].to(
                at::kDouble));
      }
      own.push_back(at::stack(tokens));
      means.push_back(own.back().mean(0));
      odd.push_back(own.back() - means.back());
      ends.push_back(at::stack(last));
      named.push_back(phrase);
      folded.push_back(fold_case(phrase));
      concept_of.push_back(static_cast<size_t>(&item - concepts.data()));
      progress.status("gate: " + shown(phrase));
    }
  }
  const at::Tensor within = at::cat(odd);
  at::Tensor covariance = spread.finish();
  covariance.addmm_(within.transpose(0, 1), within, 1.0, 1.0 / static_cast<double>(within.size(0)));
  covariance.diagonal().add_(kRidge * covariance.diagonal().mean().item<double>());
  const at::Tensor centred = at::stack(means) - mean;  // [k, 2 d]
  at::Tensor weights = SpdSolver(covariance, kNoiseFloor).solve(centred.transpose(0, 1));
  weights = weights / (centred.transpose(0, 1) * weights).sum(0).clamp_min(1e-12);  // [2 d, k]
  const at::Tensor zero = at::matmul(mean, weights);                                // [k]

  // Prompts of what must stay in which a concept stands beside it: [phrases, prompts, k].
  const auto concepts_named = static_cast<int64_t>(named.size());
  at::Tensor beside = at::zeros({phrases_kept, kRetainPrompts, concepts_named}, at::kBool);
  for (int64_t i = 0; i < phrases_kept; ++i) {
    const std::string phrase = fold_case(stay.phrases[static_cast<size_t>(i)]);
    for (int64_t j = 0; j < kRetainPrompts; ++j) {
      const std::string prompt =
          fold_case(stay.prompts[static_cast<size_t>(i * kRetainPrompts + j)]);
      for (int64_t k = 0; k < concepts_named; ++k) {
        const std::string& target = folded[static_cast<size_t>(k)];
        if (names_phrase(prompt, target) && !names_phrase(phrase, target)) beside[i][j][k] = true;
      }
    }
  }

  // Scores of what must stay, [phrases, k], and thresholds.
  constexpr double kNothing = -1e9;
  const at::Tensor stay_score = (at::matmul(others, weights.to(at::kFloat)) - zero.to(at::kFloat))
                                    .reshape({phrases_kept, kRetainPrompts, -1, concepts_named})
                                    .amax(2)
                                    .masked_fill(beside, kNothing)
                                    .amax(1)
                                    .to(at::kDouble);
  const auto [highest, which] = stay_score.max(0);
  // Each phrase's prompts, by the weights of all, [phrases, prompts, k].
  std::vector<at::Tensor> between_tokens;
  for (const at::Tensor& each : own) between_tokens.push_back(at::matmul(each, weights) - zero);
  FittedGate fitted;
  std::vector<double> thresholds;
  for (size_t k = 0; k < named.size(); ++k) {
    const auto column = static_cast<int64_t>(k);
    const at::Tensor scores = std::get<0>(between_tokens[k].select(1, column).sort());
    const double lowest = scores[std::min<int64_t>(kOddPrompts, scores.size(0) - 1)].item<double>();
    double other = highest[column].item<double>();
    if (lowest <= other) {
      const auto number = static_cast<size_t>(which[column].item<int64_t>());
      fitted.confused.push_back(shown(named[k]) + " from " + shown(stay.phrases[number]));
    }
    // Unlisted things of a class are as like a target as the other targets of the class are.
    for (size_t sibling = 0; sibling < named.size(); ++sibling) {
      if (concept_of[sibling] == concept_of[k]) continue;
      const double score = between_tokens[sibling].select(1, column).max().item<double>();
      if (score < lowest) other = std::max(other, score);
    }
    thresholds.push_back(lowest > other ? (lowest + other) / 2 : lowest - 1e-6);
  }
  TextGate gate;
  gate.window = window;
  gate.tests.push_back({weights.narrow(0, 0, d).to(at::kFloat).contiguous(),
                        weights.narrow(0, d, d).to(at::kFloat).contiguous(),
                        (zero + at::tensor(thresholds, at::kDouble)).to(at::kFloat), false});

  // What whole prompts are about.
  std::vector<at::Tensor> centres;
  for (const at::Tensor& each : ends) centres.push_back(each.mean(0));
  const ConceptRecognizer recognizer(stay.last, at::stack(centres));
  const at::Tensor ends_of_others =
      stay.rows.select(2, stay.rows.size(2) - 1).reshape({-1, d}).to(at::kDouble);
  at::Tensor others_most =
      recognizer.scores(ends_of_others).masked_fill(beside.flatten(0, 1), kNothing).amax(0);
  // Unlisted things of a class are as like a target as the other targets of the class are.
  const at::Tensor between = recognizer.scores(at::cat(ends))
                                 .reshape({static_cast<int64_t>(named.size()), kPlainPrompts, -1})
                                 .amax(1);
  for (size_t k = 0; k < named.size(); ++k) {
    for (size_t other = 0; other < named.size(); ++other) {
      if (concept_of[other] == concept_of[k]) continue;
      const auto column = static_cast<int64_t>(k);
      const double score = between[static_cast<int64_t>(other)][column].item<double>();
      if (score > others_most[column].item<double>()) others_most[column] = score;
    }
  }
  constexpr double kMargin = 0.1;
  const at::Tensor enough = (others_most + kMargin).clamp_min(ConceptRecognizer::kNames);
  gate.tests.push_back(
      {recognizer.weights().to(at::kFloat),
       {},
       (at::matmul(recognizer.mean(), recognizer.weights()) + enough).to(at::kFloat),
       true});
  fitted.gate = std::make_shared<const TextGate>(std::move(gate));
  return fitted;
}

std::vector<std::string> written_forms(const std::vector<Concept>& concepts) {
  std::vector<std::string> forms;
  const auto joined = [](std::string text, std::string_view by) {
    for (size_t at = text.find(' '); at != std::string::npos; at = text.find(' ', at + by.size())) {
      text.replace(at, 1, by);
    }
    return text;
  };
  for (const Concept& item : concepts) {
    for (const std::string& phrase : phrases(item)) {
      std::vector<std::string> numbers{phrase, phrase + "s", phrase + "es"};
      if (phrase.ends_with('y')) numbers.push_back(phrase.substr(0, phrase.size() - 1) + "ies");
      // Flags of norway.
      const size_t of = phrase.find(" of ");
      if (of != std::string::npos) {
        numbers.push_back(phrase.substr(0, of) + "s" + phrase.substr(of));
      }
      for (const std::string& each : numbers) {
        forms.push_back(each);
        if (each.find(' ') == std::string::npos) continue;
        forms.push_back(joined(each, "-"));
        forms.push_back(joined(each, ""));
      }
    }
  }
  return forms;
}

at::Tensor opens(const TextGate& gate, const at::Tensor& context) {
  const int64_t n = context.size(0);
  const int64_t windows = context.size(1) / gate.window;
  const at::Tensor rows =
      context.to(at::kCPU, at::kFloat).reshape({n, windows, gate.window, context.size(2)});
  at::Tensor open = at::zeros({n}, at::kBool);
  for (const TextGate::Test& test : gate.tests) {
    const int64_t first = test.last_row_only ? gate.window - 1 : 1;
    const int64_t count = gate.window - first;
    at::Tensor score = at::matmul(rows.narrow(2, first, count), test.now) - test.offset;
    if (test.before.defined()) {
      score = score + at::matmul(rows.narrow(2, first - 1, count), test.before);
    }
    open = open.logical_or(score.gt(0).reshape({n, -1}).any(1));
  }
  return open;
}

}  // namespace lacuna
