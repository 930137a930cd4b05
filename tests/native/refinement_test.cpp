// SPDX-License-Identifier: Apache-2.0
// From words to the closed form: which rows are collected, what is cached, what is refused.
#include "lacuna/closed_form/refinement.h"

#include "lacuna/closed_form/general_prior.h"
#include "lacuna/closed_form/text_entry.h"
#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/error.h"
#include "support/fake_host.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::CountingProgress;
using testing::FakeTextEncoder;
using testing::relative_difference;

Concept concept_of(const std::string& target, const std::string& anchor, int templates = 6) {
  Concept item;
  item.target = target;
  item.anchor = anchor;
  item.templates = templates;
  return item;
}

ConceptSet set_of(std::vector<Concept> concepts) {
  ConceptSet set;
  set.concepts = std::move(concepts);
  set.general_prior = GeneralPriorSize::kNone;
  return set;
}

RefinementOptions options_of(const std::string& method, ReadAt read_at = ReadAt::kAll) {
  RefinementOptions options;
  options.method = method;
  options.read_at = read_at;
  return options;
}

TextStatistics collect(FakeTextEncoder& encoder, const ConceptSet& set,
                       const RefinementOptions& options) {
  SilentProgress progress;
  return collect_problem(encoder, set, options, nullptr, progress).concepts;
}

class RefinementTest : public testing::DeviceTest {};
INSTANTIATE_TEST_SUITE_P(Devices, RefinementTest, ::testing::ValuesIn(testing::devices()));

// Invariant 11: rows before the phrase are identical in both prompts and contribute no shift.
TEST_P(RefinementTest, N11_CausalRowsBeforeThePhraseCarryNoEdit) {
  FakeTextEncoder encoder(16, device());
  const at::Tensor target = encoder.encode({"a photo of cat in rain"})[0].cpu();
  const at::Tensor anchor = encoder.encode({"a photo of fog in rain"})[0].cpu();
  EXPECT_TRUE(at::equal(target.narrow(0, 0, 4), anchor.narrow(0, 0, 4)));
  EXPECT_GT((target[5] - anchor[5]).norm().item<double>(), 1e-4);

  const TextStatistics sums =
      collect(encoder, set_of({concept_of("cat", "fog")}), options_of("mace"));
  at::Tensor kept = at::zeros({16, 16}, at::kDouble);
  for (int i = 0; i < 6; ++i) {
    const std::string prompt(prompt_templates(ConceptKind::kObject)[i]);
    const int64_t before =
        static_cast<int64_t>(encoder.tokenize(prefix_of_template(prompt)).size()) - 1;
    const at::Tensor rows = encoder.encode({fill_template(prompt, "cat")})[0]
                                .narrow(0, 0, before)
                                .cpu()
                                .to(at::kDouble);
    kept += at::matmul(rows.t(), rows) / 6;
  }
  EXPECT_LT(relative_difference(sums.kept, kept), 1e-6);
}

// The rows of every method, against a sum written out by hand for one template.
TEST_P(RefinementTest, MethodsCollectTheirRows) {
  FakeTextEncoder encoder(16, device());
  const std::string prompt(prompt_templates(ConceptKind::kObject)[0]);
  ASSERT_EQ(prompt, "a photo of {}");
  const at::Tensor f = encoder.encode({"a photo of black cat"})[0].cpu().to(at::kDouble);
  const at::Tensor g = encoder.encode({"a photo of fog"})[0].cpu().to(at::kDouble);
  // target: 0 start, 1-3 words, 4-5 phrase, 6 end, padding; anchor: 4 phrase, 5 end, padding.
  const auto shift = [&](std::vector<std::pair<int, int>> pairs) {
    at::Tensor sum = at::zeros({16, 16}, at::kDouble);
    for (auto [a, b] : pairs) sum += at::outer(g[b] - f[a], f[a]);
    return sum;
  };
  std::vector<std::pair<int, int>> after;
  for (int k = 6; k < 77; ++k) after.emplace_back(k, k - 1);
  std::vector<std::pair<int, int>> all = after;
  all.emplace_back(4, 4);
  all.emplace_back(5, 4);

  const ConceptSet set = set_of({concept_of("black cat", "fog", 1)});
  const auto shift_of = [&](const RefinementOptions& options) {
    return collect(encoder, set, options).shift;
  };
  EXPECT_LT(relative_difference(shift_of(options_of("mace")), shift(after)), 1e-6);
  EXPECT_LT(relative_difference(shift_of(options_of("mace", ReadAt::kEndOfText)), shift(after)),
            1e-6);
  EXPECT_LT(relative_difference(shift_of(options_of("uce")), shift(all)), 1e-6);
  EXPECT_LT(
      relative_difference(shift_of(options_of("uce", ReadAt::kSubject)), shift({{4, 4}, {5, 4}})),
      1e-6);
  EXPECT_LT(relative_difference(shift_of(options_of("uce", ReadAt::kEndOfText)), shift(after)),
            1e-6);
}

TEST_P(RefinementTest, TheEditMovesTheConceptToTheAnchorAndKeepsThePreserved) {
  FakeTextEncoder encoder(96, device());
  const auto delta_with = [&](bool preserve) {
    ConceptSet set = set_of({concept_of("black cat", "fog", 30)});
    if (preserve) set.preserve = {{"dog", ConceptKind::kObject, 30}};
    SilentProgress progress;
    RefinementOptions options = options_of("uce");
    options.regularization = 1e-3;
    return solve_refinement(collect_problem(encoder, set, options, nullptr, progress), options)
        .delta;
  };
  const auto read = [&](const std::string& prompt) {
    return encoder.encode({prompt})[0].narrow(0, 6, 70).cpu().to(at::kDouble);  // after the phrase
  };
  const auto moved = [](const at::Tensor& rows, const at::Tensor& delta) {
    return rows + at::matmul(rows, delta.t());
  };
  const at::Tensor cat = read("a photo of black cat").narrow(0, 0, 69);
  const at::Tensor fog =
      encoder.encode({"a photo of fog"})[0].narrow(0, 5, 69).cpu().to(at::kDouble);
  const at::Tensor dog = read("a photo of dog");
  const at::Tensor delta = delta_with(true);
  EXPECT_LT(relative_difference(moved(cat, delta), fog), 0.6 * relative_difference(cat, fog));
  EXPECT_LT(relative_difference(moved(dog, delta), dog),
            0.7 * relative_difference(moved(dog, delta_with(false)), dog));
}

TEST_P(RefinementTest, ConceptsAddUpAndDoNotDependOnEachOther) {
  FakeTextEncoder encoder(16, device());
  const Concept cat = concept_of("cat", "fog");
  Concept dog = concept_of("dog", "fog");
  dog.synonyms = {"hound", "puppy"};
  TextStatistics sum = collect(encoder, set_of({cat}), options_of("uce"));
  sum.add(collect(encoder, set_of({dog}), options_of("uce")));
  const TextStatistics together = collect(encoder, set_of({dog, cat}), options_of("uce"));
  EXPECT_LT(relative_difference(together.shift, sum.shift), 1e-12);
  EXPECT_LT(relative_difference(together.edited, sum.edited), 1e-12);
}

// What is erased must not be protected by a generic caption that happens to name it.
TEST_P(RefinementTest, PriorLeavesOutCaptionsThatNameTheConcept) {
  FakeTextEncoder encoder(8, device());
  SilentProgress progress;
  ConceptSet set = set_of({concept_of("tree", "fog", 1)});
  set.general_prior = GeneralPriorSize::kSmall;
  const auto unwanted = captions_naming(GeneralPriorSize::kSmall, {"tree"});
  ASSERT_FALSE(unwanted.empty());
  at::Tensor expected = general_prior_gram(encoder, GeneralPriorSize::kSmall, progress);
  for (const std::string& caption : unwanted) {
    const at::Tensor rows = encoder.encode({caption})[0].cpu().to(at::kDouble);
    expected -= at::matmul(rows.t(), rows) / 200.0;
  }
  const RefinementProblem problem =
      collect_problem(encoder, set, options_of("uce"), nullptr, progress);
  EXPECT_LT(relative_difference(problem.prior, expected), 1e-9);
}

TEST_P(RefinementTest, SharedAnchorsAreEncodedOnceAndProgressReachesItsTotal) {
  FakeTextEncoder encoder(16, device());
  CountingProgress progress;
  collect_problem(encoder, set_of({concept_of("cat", "fog", 10), concept_of("dog", "fog", 10)}),
                  options_of("uce"), nullptr, progress);
  EXPECT_EQ(encoder.encoded_prompts, 30);
  EXPECT_EQ(progress.last_done, progress.last_total);
  EXPECT_EQ(progress.last_total, 9);
  EXPECT_GE(progress.checks, 9);
}

TEST_P(RefinementTest, TheCacheSavesEncodingAndChangesNothing) {
  FakeTextEncoder encoder(16, device());
  StatisticsCache cache(64 << 20);
  SilentProgress progress;
  ConceptSet set = set_of({concept_of("cat", "fog"), concept_of("dog", "fog")});
  set.preserve = {{"wolf", ConceptKind::kObject, 6}};
  const auto run = [&] {
    return collect_problem(encoder, set, options_of("uce"), &cache, progress);
  };
  const RefinementProblem first = run();
  const int64_t encoded = encoder.encoded_prompts;
  const RefinementProblem second = run();
  EXPECT_EQ(encoder.encoded_prompts, encoded);
  EXPECT_LT(relative_difference(second.concepts.shift, first.concepts.shift), 1e-14);
  EXPECT_TRUE(at::equal(second.preserve, first.preserve));

  // One concept more: only that one (and its anchor) is encoded.
  set.concepts.push_back(concept_of("owl", "sky"));
  run();
  EXPECT_EQ(encoder.encoded_prompts, encoded + 12);

  // Another anchor, template count or method is another concept; anchors that are known stay known.
  set.concepts[0].anchor = "sky";
  run();
  EXPECT_EQ(encoder.encoded_prompts, encoded + 18);

  encoder.fingerprint_ = "";  // unknown weights: never cached
  run();
  EXPECT_GT(encoder.encoded_prompts, encoded + 36);
}

TEST(StatisticsCache, DropsTheLeastRecentlyUsed) {
  const auto entry = [] {
    return std::vector<at::Tensor>{at::zeros({300}, at::kDouble)};  // 2400 bytes
  };
  StatisticsCache cache(5000);
  cache.insert("a", entry());
  cache.insert("b", entry());
  EXPECT_NE(cache.find("a"), nullptr);
  cache.insert("c", entry());
  EXPECT_NE(cache.find("a"), nullptr);
  EXPECT_EQ(cache.find("b"), nullptr);
  EXPECT_NE(cache.find("c"), nullptr);
  EXPECT_EQ(cache.bytes(), 4800);
  cache.insert("huge", {at::zeros({1000}, at::kDouble)});
  EXPECT_EQ(cache.find("huge"), nullptr);
}

TEST_P(RefinementTest, CancellingPassesTheHostsExceptionThrough) {
  FakeTextEncoder encoder(16, device());
  StatisticsCache cache(64 << 20);
  CountingProgress progress;
  progress.cancel_at = 3;
  const ConceptSet set = set_of({concept_of("cat", "fog", 30)});
  EXPECT_THROW(collect_problem(encoder, set, options_of("uce"), &cache, progress),
               testing::Cancelled);
  EXPECT_EQ(cache.bytes(), 0);
}

// Adversarial rounds against the same steps on explicit rows.
TEST_P(RefinementTest, AdversarialRoundsMatchExplicitRows) {
  const int64_t d = 12;
  const at::Tensor f = testing::random_matrix(40, d);
  const at::Tensor g = testing::random_matrix(40, d);
  const at::Tensor w = testing::random_matrix(50, d);
  const at::Tensor k = at::matmul(w.t(), w);
  RefinementOptions options = options_of("uce");
  options.adversarial_rounds = 2;
  StatisticsAccumulator sums(d);
  sums.add_pairs(f, g);
  const RefinementProblem problem{sums.finish(), {}, {}};

  at::Tensor rows = f;
  at::Tensor goals = g;
  const at::Tensor identity = at::eye(d, at::kDouble);
  at::Tensor n;
  for (int round = 0;; ++round) {
    const at::Tensor gram = at::matmul(rows.t(), rows) + options.regularization * identity;
    const at::Tensor cross = at::matmul(goals.t(), rows) + options.regularization * identity;
    n = at::linalg_solve(gram, cross.t()).t();
    if (round == 2) break;
    const at::Tensor edited_w = at::matmul(w, n);
    const double ridge = 1e-2 * k.diagonal().mean().item<double>();
    // argmin over c' of ||W' c' - W c||^2 + ridge ||c'||^2, row by row.
    const at::Tensor adversarial =
        at::linalg_solve(at::matmul(edited_w.t(), edited_w) + ridge * identity,
                         at::matmul(edited_w.t(), at::matmul(w, f.t())))
            .t();
    rows = at::cat({rows, adversarial});
    goals = at::cat({goals, g});
  }
  EXPECT_LT(relative_difference(solve_refinement(problem, options, k).delta, n - identity), 1e-8);
  EXPECT_THROW(solve_refinement(problem, options), Error);
}

TEST_P(RefinementTest, BadInputIsRefusedBeforeEncoding) {
  FakeTextEncoder encoder(16, device());
  std::string long_phrase;
  for (int i = 0; i < 76; ++i) long_phrase += "w" + std::to_string(i) + " ";
  EXPECT_THROW(check_phrases(encoder, set_of({concept_of(long_phrase, "fog")})), Error);
  EXPECT_THROW(check_phrases(encoder, set_of({concept_of("cat", long_phrase)})), Error);
  EXPECT_THROW(check_phrases(encoder, set_of({concept_of(" ", "fog")})), Error);
  EXPECT_THROW(check_phrases(encoder, set_of({concept_of("cat  dog", "cat dog")})), Error);
  ConceptSet preserved = set_of({concept_of("cat", "fog")});
  preserved.preserve = {{long_phrase, ConceptKind::kObject, 6}};
  EXPECT_THROW(check_phrases(encoder, preserved), Error);
  EXPECT_NO_THROW(check_phrases(encoder, set_of({concept_of("cat", "fog")})));
  EXPECT_EQ(encoder.encoded_prompts, 0);

  for (const double bad : {-1.0, 1e12, std::nan("")}) {
    RefinementOptions options;
    options.regularization = bad;
    EXPECT_THROW(check(options), Error);
  }
  EXPECT_THROW(check(options_of("mace", ReadAt::kSubject)), Error);
  EXPECT_THROW(check(options_of("unknown")), Error);
  EXPECT_NO_THROW(check(RefinementOptions{}));
}

TEST_P(RefinementTest, NotANumberEmbeddingsAreNamed) {
  FakeTextEncoder encoder(16, device());
  encoder.broken = true;
  SilentProgress progress;
  EXPECT_THROW(collect_problem(encoder, set_of({concept_of("cat", "fog")}), options_of("uce"),
                               nullptr, progress),
               Error);
  // Text statistics from elsewhere.
  RefinementProblem problem;
  problem.concepts = TextStatistics::zeros(16);
  problem.concepts.kept[0][0] = std::nan("");
  EXPECT_THROW(solve_refinement(problem, options_of("uce")), Error);
}

class WrongShapeEncoder : public FakeTextEncoder {
 public:
  at::Tensor encode(const std::vector<std::string>& prompts) override {
    return FakeTextEncoder::encode(prompts).narrow(1, 0, 70);
  }
};

TEST(Refinement, EncoderOfAnotherShapeIsAnError) {
  WrongShapeEncoder encoder;
  SilentProgress progress;
  EXPECT_THROW(collect_problem(encoder, set_of({concept_of("cat", "fog")}), options_of("uce"),
                               nullptr, progress),
               Error);
  EXPECT_THROW(StatisticsAccumulator(8).add_kept(at::zeros({3, 9})), Error);
}

}  // namespace
}  // namespace lacuna
