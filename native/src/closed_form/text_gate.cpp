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
    if (prompts.size() < static_cast<size_t>(kPlainPrompts) || last_token < encoder.window()) {
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

// The same of what was sampled of prompts, a block of phrases at a time: those of the full retain
// set take gigabytes.
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

std::vector<std::string> plurals(const std::string& phrase) {
  std::vector<std::string> forms{phrase + "s"};
  const auto ending = [&](std::string_view from, std::string_view to) {
    if (!phrase.ends_with(from)) return;
    forms.push_back(phrase.substr(0, phrase.size() - from.size()) + std::string(to));
  };
  for (const std::string_view sibilant : {"s", "x", "z", "ch", "sh", "o"}) {
    ending(sibilant, std::string(sibilant) + "es");
  }
  ending("y", "ies");
  ending("f", "ves");
  ending("fe", "ves");
  ending("man", "men");
  return forms;
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
  const int64_t phrases_kept = stay.rows.size(0);
  const PairsInBlocks others(stay.rows, window, progress);
  const at::Tensor mean = others.mean();
  GramSum spread(2 * d);
  others.each([&](int64_t, const at::Tensor& block) {
    spread.add(block.flatten(0, 1) - mean.to(at::kFloat),
               kShareOfOthers / static_cast<double>(others.count()));
  });

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
      progress.status("learning which prompts name " + shown(phrase));
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
    progress.check();
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
  at::Tensor stay_score = at::zeros({phrases_kept, concepts_named}, at::kDouble);
  others.each([&](int64_t first, const at::Tensor& block) {
    const at::Tensor scores = at::matmul(block, weights.to(at::kFloat)) - zero.to(at::kFloat);
    const int64_t count = block.size(0) / kRetainPrompts;
    stay_score.narrow(0, first, count)
        .copy_(scores.amax(1)
                   .reshape({count, kRetainPrompts, concepts_named})
                   .masked_fill(beside.narrow(0, first, count), kNothing)
                   .amax(1));
  });
  const auto [highest, which] = stay_score.max(0);
  // Unlisted things of a class are as like a target as the other targets of the class are.
  at::Tensor same = at::zeros({concepts_named, concepts_named}, at::kBool);
  for (int64_t k = 0; k < concepts_named; ++k) {
    const size_t item = concept_of[static_cast<size_t>(k)];
    for (int64_t other = k; other >= 0 && concept_of[static_cast<size_t>(other)] == item; --other) {
      same[k][other] = same[other][k] = true;
    }
  }
  std::vector<double> lowest;
  std::vector<at::Tensor> most;  // of each phrase's prompts, by the weights of all: [k]
  for (int64_t k = 0; k < concepts_named; ++k) {
    progress.check();
    const at::Tensor scores = at::matmul(own[static_cast<size_t>(k)], weights) - zero;
    most.push_back(scores.amax(0));
    const at::Tensor sorted = std::get<0>(scores.select(1, k).sort());
    lowest.push_back(sorted[std::min(kOddPrompts, sorted.size(0) - 1)].item<double>());
  }
  const at::Tensor siblings = at::stack(most);  // [of k, by k]
  const at::Tensor siblings_most =
      siblings.masked_fill(same.logical_or(siblings.ge(at::tensor(lowest, at::kDouble))), kNothing)
          .amax(0);
  FittedGate fitted;
  std::vector<double> thresholds;
  for (size_t k = 0; k < named.size(); ++k) {
    const auto column = static_cast<int64_t>(k);
    const double other = highest[column].item<double>();
    if (lowest[k] <= other) {
      const auto number = static_cast<size_t>(which[column].item<int64_t>());
      fitted.confused.push_back(shown(named[k]) + " from " + shown(stay.phrases[number]));
    }
    const double nearest = std::max(other, siblings_most[column].item<double>());
    thresholds.push_back(lowest[k] > nearest ? (lowest[k] + nearest) / 2 : lowest[k] - 1e-6);
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
  const at::Tensor stay_most =
      recognizer.scores(ends_of_others).masked_fill(beside.flatten(0, 1), kNothing).amax(0);
  const at::Tensor between = recognizer.scores(at::cat(ends))
                                 .reshape({concepts_named, kPlainPrompts, -1})
                                 .amax(1)
                                 .masked_fill(same, kNothing);
  const at::Tensor others_most = at::maximum(stay_most, between.amax(0));
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
  constexpr std::array<std::string_view, 3> kArticles{"a ", "an ", "the "};
  constexpr std::array<std::string_view, 7> kBehindTheHead{" of ", " in ",   " with ", " on ",
                                                           " at ", " from ", " for "};
  constexpr std::string_view kStyle = " style";
  std::vector<std::string> forms;
  const auto add = [&](std::string phrase) {
    for (const std::string_view article : kArticles) {
      if (phrase.starts_with(article)) phrase.erase(0, article.size());
    }
    std::vector<std::string> numbers{phrase};
    for (std::string& each : plurals(phrase)) numbers.push_back(std::move(each));
    // Flags of norway.
    for (const std::string_view behind : kBehindTheHead) {
      const size_t at = phrase.find(behind);
      if (at == std::string::npos) continue;
      for (const std::string& each : plurals(phrase.substr(0, at))) {
        numbers.push_back(each + phrase.substr(at));
      }
    }
    for (std::string& each : numbers) {
      std::string joined = each;
      std::erase(joined, '-');
      if (joined != each) forms.push_back(std::move(joined));
      forms.push_back(std::move(each));
    }
  };
  for (const Concept& item : concepts) {
    for (const std::string& phrase : phrases(item)) {
      std::string folded = fold_case(phrase);
      add(folded);
      // By van gogh, in the manner of van gogh.
      if (item.kind == ConceptKind::kStyle && folded.ends_with(kStyle)) {
        add(folded.substr(0, folded.size() - kStyle.size()));
      }
    }
  }
  return forms;
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
