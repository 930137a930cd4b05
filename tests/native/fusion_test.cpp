// SPDX-License-Identifier: Apache-2.0
// Invariants 13-21 and 30 of the closed-form fusion on random data, against oracles written from
// the objective
//   F(W*) = sum_i sum_e ||W* e - (W M_i + up_i down_i) e||^2 + s sum_p ||W* p - W p||^2
//           + lambda ||W* - W||^2.
#include "lacuna/training/fusion.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "lacuna/closed_form/general_prior.h"
#include "lacuna/error.h"
#include "lacuna/training/lora_bundle.h"
#include "support/fake_host.h"
#include "support/message_of.h"
#include "support/random_concepts.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::embeddings;
using testing::message_of;
using testing::random_concept;
using testing::random_matrix;
using testing::relative_difference;

constexpr int64_t kWidth = 20;
const TextEntry kKey{"k", "lora_k", EntryRole::kKey};
const TextEntry kValue{"v", "lora_v", EntryRole::kValue};
const std::map<std::string, int64_t> kRows{{"lora_k", 6}, {"lora_v", 9}};

class FusionInvariants : public testing::SeededTest {
 protected:
  using Item = std::shared_ptr<ConceptLora>;
  using Items = std::vector<Item>;

  Item item(const std::string& target, bool mapped = true, const at::Tensor& rows = {}) {
    return random_concept(target, kRows, rows.defined() ? rows : embeddings(30, kWidth), mapped);
  }
  Items items(int64_t n, bool mapped = true) {
    Items list;
    for (int64_t i = 0; i < n; ++i)
      list.push_back(item(std::string("c").append(std::to_string(i)), mapped));
    return list;
  }
  static FusionSums sums_of(const Items& list) {
    FusionSums sums;
    for (const Item& one : list) sums.add(one);
    return sums;
  }
  Fusion solve(const Items& list, const ConceptStrengths& strengths = {}) {
    FusionSums sums = sums_of(list);
    return sums.solve(kept_, options_, strengths, progress_);
  }
  // W*, [out, d] float64.
  static at::Tensor edited(const Fusion& fusion, const TextEntry& projection, const at::Tensor& w) {
    return w + weight_change(fusion.patch, projection, w);
  }
  static at::Tensor lora(const Item& one, const TextEntry& projection) {
    const LoraPair& pair = one->pairs.at(projection.lora_name);
    return at::matmul(pair.up, pair.down);
  }
  // W M_i: what the LoRA was trained on, where C - A = (M_i - I) B on the span of B.
  static at::Tensor refined(const Item& one, const at::Tensor& w) {
    return one->refinement_shift.defined()
               ? w + at::matmul(
                         w, at::matmul(one->refinement_shift, at::linalg_pinv(one->prompt_gram)))
               : w;
  }
  at::Tensor kept_gram() const {
    at::Tensor s = options_.regularization * at::eye(kWidth, at::kDouble);
    if (kept_.preserve.defined()) s = s + options_.preserve_weight * kept_.preserve;
    if (kept_.prior.defined()) s = s + options_.prior_weight * kept_.prior;
    return s;
  }
  // The normal equations of the objective, solved densely.
  at::Tensor oracle(const Items& list, const TextEntry& projection, const at::Tensor& w,
                    const ConceptStrengths& strengths = {}) {
    at::Tensor numerator = at::matmul(w, kept_gram());
    at::Tensor h = kept_gram();
    for (const Item& one : list) {
      const auto it = strengths.find(one->item.target);
      const double s = it == strengths.end() ? 1.0 : it->second;
      const at::Tensor target = w + s * (refined(one, w) + lora(one, projection) - w);
      numerator = numerator + at::matmul(target, one->prompt_gram);
      h = h + one->prompt_gram;
    }
    return at::linalg_solve(h, numerator.t()).t();
  }
  void with_kept_text() {
    const at::Tensor p = embeddings(50, kWidth);
    const at::Tensor q = embeddings(15, kWidth);
    kept_.prior = at::matmul(p.t(), p);
    kept_.preserve = at::matmul(q.t(), q);
    options_.prior_weight = 0.3;
    options_.preserve_weight = 0.8;
  }
  void plain_least_squares() {
    kept_ = {};
    options_.regularization = 0.0;
  }

  KeptText kept_;
  FusionOptions options_{FusionMode::kIndependent, 0.2, 1.0, 1.0};
  SilentProgress progress_;
};

TEST_F(FusionInvariants, EqualsTheDenseLeastSquaresSolutionOfEveryMatrix) {
  with_kept_text();
  const Items list = items(4);
  const ConceptStrengths strengths{{"c1", 0.4}, {"C3", 1.7}};
  const ConceptStrengths named{{"c1", 0.4}, {"c3", 1.7}};
  const Fusion fusion = solve(list, strengths);
  for (const TextEntry& projection : {kKey, kValue}) {
    const at::Tensor w = random_matrix(kRows.at(projection.lora_name), kWidth);
    EXPECT_LT(
        relative_difference(edited(fusion, projection, w), oracle(list, projection, w, named)),
        1e-9);
  }
  EXPECT_GE(fusion.condition, 1.0);
  EXPECT_EQ(fusion.floor_added, 0.0);
}

TEST_F(FusionInvariants, N13_OneConceptWithFullRankPromptsIsItsLora) {
  plain_least_squares();
  const Items list = items(1);
  const at::Tensor w = random_matrix(6, kWidth);
  EXPECT_LT(
      relative_difference(edited(solve(list), kKey, w), refined(list[0], w) + lora(list[0], kKey)),
      1e-9);
}

TEST_F(FusionInvariants, N14_OutsideTheConceptsSpanNothingHappens) {
  const at::Tensor rows = at::matmul(random_matrix(30, 7), random_matrix(7, kWidth));
  const Items list{item("c", false, rows)};
  const at::Tensor w = random_matrix(6, kWidth);
  const at::Tensor complement = std::get<2>(at::linalg_svd(rows, true)).narrow(0, 7, kWidth - 7);
  const auto error_inside = [&](double regularization) {
    options_.regularization = regularization;
    const at::Tensor w_new = edited(solve(list), kKey, w);
    EXPECT_LT(relative_difference(at::matmul(w_new, complement.t()), at::matmul(w, complement.t())),
              1e-7);
    return relative_difference(at::matmul(w_new, rows.t()),
                               at::matmul(w + lora(list[0], kKey), rows.t()));
  };
  const double error = error_inside(1e-4);
  EXPECT_LT(error, 1e-4);
  EXPECT_NEAR(error_inside(1e-3) / error, 10.0, 0.5);  // O(lambda)
}

TEST_F(FusionInvariants, N15_NoLoraIsTheRefinedModelAndNoRefinementIsTheModel) {
  plain_least_squares();
  Items list = items(3);
  const at::Tensor shared = random_matrix(kWidth, kWidth);  // the same M for all
  for (const Item& one : list) {
    for (auto& [name, pair] : one->pairs) pair.up.zero_();
    one->refinement_shift = at::matmul(shared, one->prompt_gram);
  }
  const at::Tensor w = random_matrix(6, kWidth);
  EXPECT_LT(relative_difference(edited(solve(list), kKey, w), w + at::matmul(w, shared)), 1e-9);
  with_kept_text();
  options_.regularization = 0.2;
  for (const Item& one : list) {
    one->refinement_shift.reset();
    one->refinement_gram.reset();
  }
  EXPECT_EQ(weight_change(solve(list).patch, kKey, w).abs().max().item<double>(), 0.0);
}

TEST_F(FusionInvariants, N16_EqualLorasFuseToThatLora) {
  plain_least_squares();
  Items list = items(4, false);
  for (const Item& one : list) one->pairs = list[0]->pairs;
  const at::Tensor w = random_matrix(6, kWidth);
  EXPECT_LT(relative_difference(edited(solve(list), kKey, w), w + lora(list[0], kKey)), 1e-9);
}

TEST_F(FusionInvariants, N17_OrthogonalConceptsDoNotInterfere) {
  options_.regularization = 1e-5;
  const at::Tensor basis = std::get<0>(at::linalg_qr(random_matrix(kWidth, kWidth))).t();
  Items list;
  std::vector<at::Tensor> spans;
  for (int64_t i = 0; i < 3; ++i) {
    spans.push_back(basis.narrow(0, 5 * i, 5));
    list.push_back(
        item("c" + std::to_string(i), false, at::matmul(random_matrix(30, 5), spans[i])));
  }
  const at::Tensor w = random_matrix(6, kWidth);
  const at::Tensor w_new = edited(solve(list), kKey, w);
  for (size_t i = 0; i < list.size(); ++i) {
    EXPECT_LT(relative_difference(at::matmul(w_new, spans[i].t()),
                                  at::matmul(w + lora(list[i], kKey), spans[i].t())),
              1e-5);
  }
}

TEST_F(FusionInvariants, N18_Superposition) {
  with_kept_text();
  const Items list = items(3);
  const at::Tensor w = random_matrix(6, kWidth);
  const at::Tensor all = weight_change(solve(list).patch, kKey, w);
  const auto with = [&](double a, double b, double c) {
    return weight_change(solve(list, {{"c0", a}, {"c1", b}, {"c2", c}}).patch, kKey, w);
  };
  EXPECT_LT(relative_difference(with(1, 0, 0) + with(0, 1, 0) + with(0, 0, 1), all), 1e-9);
  EXPECT_LT(relative_difference(with(0.3, 0, 0), 0.3 * with(1, 0, 0)), 1e-9);
  EXPECT_EQ(with(0, 0, 0).abs().max().item<double>(), 0.0);
  // Twice the `up` of one concept adds its contribution once more and nothing else.
  const at::Tensor before = solve(list).patch.delta;
  list[1]->pairs.at("lora_k").up.mul_(2.0);
  const Fusion doubled = solve(list);
  EXPECT_TRUE(at::equal(doubled.patch.delta, before));
  list[1]->refinement_shift.reset();
  list[1]->refinement_gram.reset();
  list[1]->pairs.at("lora_k").up.div_(2.0);
  EXPECT_LT(relative_difference(weight_change(doubled.patch, kKey, w) - all,
                                weight_change(solve(list, {{"c0", 0}, {"c2", 0}}).patch, kKey, w)),
            1e-9);
}

TEST_F(FusionInvariants, N19_ConceptsComeAndGoInAnyOrder) {
  with_kept_text();
  const Items list = items(5);
  FusionSums sums = sums_of(list);
  const Fusion before = sums.solve(kept_, options_, {}, progress_);
  const auto expect_same = [&](const Fusion& other) {
    EXPECT_TRUE(at::equal(other.patch.delta, before.patch.delta));
    ASSERT_EQ(other.patch.pairs.size(), before.patch.pairs.size());
    for (const auto& [name, pair] : before.patch.pairs) {
      EXPECT_TRUE(at::equal(other.patch.pairs.at(name).b, pair.b));
      EXPECT_TRUE(at::equal(other.patch.pairs.at(name).r, pair.r));
    }
  };
  const Item guest = item("b-guest");
  sums.add(guest);
  const Fusion with_guest = sums.solve(kept_, options_, {}, progress_);
  EXPECT_GT(relative_difference(with_guest.patch.delta, before.patch.delta), 1e-3);
  sums.remove("B-Guest");
  expect_same(sums.solve(kept_, options_, {}, progress_));
  expect_same(solve({list[3], list[0], list[4], list[2], list[1]}));
  // assign() is the same as starting over.
  sums.assign({guest, list[0]});
  EXPECT_EQ(sums.targets(), (std::vector<std::string>{"b-guest", "c0"}));
  sums.assign({list.rbegin(), list.rend()});
  expect_same(sums.solve(kept_, options_, {}, progress_));
  // Leaving a concept out is not the same as strength 0: then it is protected.
  FusionSums fewer = sums_of({list[0], list[1], list[2], list[3]});
  const Fusion without = fewer.solve(kept_, options_, {}, progress_);
  const Fusion zero = solve(list, {{"c4", 0.0}});
  const at::Tensor w = random_matrix(6, kWidth);
  EXPECT_GT(relative_difference(weight_change(zero.patch, kKey, w),
                                weight_change(without.patch, kKey, w)),
            1e-3);
}

TEST_F(FusionInvariants, N20_RankAndFile) {
  with_kept_text();
  const Items list = items(3);
  const Fusion fusion = solve(list);
  const at::Tensor w = random_matrix(9, kWidth);
  const at::Tensor low_rank =
      weight_change(fusion.patch, kValue, w) - at::matmul(w, fusion.patch.delta);
  const at::Tensor singular = at::linalg_svdvals(low_rank);
  EXPECT_LT((singular[3] / singular[0]).item<double>(), 1e-10);
  const testing::TemporaryFolder folder;
  save_patch(fusion.patch, folder.path("p.safetensors"));
  const ErasurePatch loaded = load_patch(folder.path("p.safetensors"));
  EXPECT_LT(relative_difference(w + weight_change(loaded, kValue, w), oracle(list, kValue, w)),
            1e-6);
  EXPECT_EQ(nlohmann::json::parse(loaded.metadata.at("concepts"))["concepts"].size(), 3u);
  EXPECT_EQ(loaded.metadata.at("mode"), "independent");
}

// float64 statistics and solve, patch applied in float32, against the known answer.
TEST_F(FusionInvariants, N21_SinglePrecisionPatchOfAnIllConditionedSystem) {
  plain_least_squares();
  const Items list = items(1);
  list[0]->prompt_gram = testing::random_spd(kWidth, 1e9);
  const at::Tensor map = 0.3 * random_matrix(kWidth, kWidth);
  list[0]->refinement_shift = at::matmul(map, list[0]->prompt_gram);
  const Fusion fusion = solve(list);
  EXPECT_GT(fusion.condition, 1e8);
  const at::Tensor w = random_matrix(6, kWidth).to(at::kFloat).to(at::kDouble);
  const at::Tensor w_new = w.to(at::kFloat) + weight_change(fusion.patch, kKey, w.to(at::kFloat));
  EXPECT_LT(relative_difference(w_new, w + at::matmul(w, map) + lora(list[0], kKey)), 1e-6);
}

// As a bundle file stores them.
TEST_F(FusionInvariants, SinglePrecisionStatisticsDoWithRegularization) {
  with_kept_text();
  const Items list = items(3);
  Items stored;
  for (const Item& one : list) {
    stored.push_back(std::make_shared<ConceptLora>(*one));
    stored.back()->prompt_gram = one->prompt_gram.to(at::kFloat);
    stored.back()->refinement_shift = one->refinement_shift.to(at::kFloat);
    for (auto& [name, pair] : stored.back()->pairs) {
      pair = {pair.up.to(at::kFloat), pair.down.to(at::kFloat)};
    }
  }
  const Fusion exact = solve(list);
  const Fusion single = solve(stored);
  EXPECT_EQ(single.patch.pairs.at("lora_k").b.scalar_type(), at::kFloat);
  EXPECT_EQ(single.patch.pairs.at("lora_k").r.scalar_type(), at::kDouble);
  const at::Tensor w = random_matrix(6, kWidth);
  // The condition number amplifies what float32 storage rounds off (6e-8).
  EXPECT_LT(relative_difference(edited(single, kKey, w), edited(exact, kKey, w)),
            1e-6 * exact.condition);
  EXPECT_LT(exact.condition, 1e5);
}

TEST_F(FusionInvariants, JointModeIsThePapersFormula) {
  with_kept_text();
  options_.mode = FusionMode::kJoint;
  const Items list = items(4);
  const ConceptStrengths strengths{{"c2", 0.5}};
  const Fusion fusion = solve(list, strengths);
  const at::Tensor w = random_matrix(6, kWidth);
  at::Tensor a = kept_gram(), shift = at::zeros_like(a), h = kept_gram();
  for (const Item& one : list) {
    a = a + one->refinement_gram;
    shift = shift + (one->item.target == "c2" ? 0.5 : 1.0) * one->refinement_shift;
    h = h + one->prompt_gram;
  }
  const at::Tensor refined_w = w + at::matmul(w, at::linalg_solve(a, shift.t()).t());
  // lambda anchors at W M, what is kept at W.
  const double lambda = options_.regularization;
  at::Tensor numerator =
      at::matmul(w, kept_gram() - lambda * at::eye(kWidth, at::kDouble)) + lambda * refined_w;
  for (const Item& one : list) {
    const double s = one->item.target == "c2" ? 0.5 : 1.0;
    numerator = numerator + at::matmul(refined_w + s * lora(one, kKey), one->prompt_gram);
  }
  EXPECT_LT(relative_difference(edited(fusion, kKey, w), at::linalg_solve(h, numerator.t()).t()),
            1e-9);
  EXPECT_EQ(fusion.patch.metadata.at("mode"), "joint");
  // Without any refinement both modes are one.
  const Items plain = items(3, false);
  const Fusion joint = solve(plain);
  options_.mode = FusionMode::kIndependent;
  EXPECT_TRUE(at::equal(joint.patch.pairs.at("lora_k").r, solve(plain).patch.pairs.at("lora_k").r));
  EXPECT_EQ(joint.patch.delta.abs().max().item<double>(), 0.0);
}

TEST_F(FusionInvariants, ManyColumnsAreSolvedInBlocksOfAnySize) {
  const std::map<std::string, int64_t> rows{{"lora_k", 6}};
  Items list;
  for (int64_t i = 0; i < 3; ++i) {  // 3 x 500 columns: two blocks
    list.push_back(
        random_concept("c" + std::to_string(i), rows, embeddings(30, kWidth), false, 500));
  }
  const at::Tensor w = random_matrix(6, kWidth);
  EXPECT_LT(relative_difference(edited(solve(list), kKey, w), oracle(list, kKey, w)), 1e-9);
}

TEST_F(FusionInvariants, BadInput) {
  const auto expect = [&](const std::function<void()>& call, const std::string& part) {
    const std::string message = message_of(call);
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  expect([&] { solve({}); }, "no LoRA to fuse");
  const Items list = items(2);
  expect([&] { solve(list, {{"c9", 1.0}}); }, "they hold: c0, c1");
  expect([&] { sums_of(list).remove("c9"); }, "they hold: c0, c1");
  expect([&] { sums_of({list[0], item("C0")}); }, "two different LoRAs");
  EXPECT_EQ(sums_of({list[0], list[0], std::make_shared<ConceptLora>(*list[0])}).size(), 1u);
  expect([&] { sums_of({list[0], random_concept("x", kRows, embeddings(30, kWidth + 1))}); },
         "different width");
  expect([&] { solve({list[0], random_concept("x", {{"lora_k", 7}}, embeddings(30, kWidth))}); },
         "does not fit the others");
  options_.mode = FusionMode::kJoint;
  expect([&] { solve({list[0], item("plain", false)}); }, "'plain' was not");
  options_.regularization = -1.0;
  expect([&] { solve(list); }, "regularization");
  EXPECT_NE(message_of([] { fusion_mode_from_string("best"); }), "");
  for (const FusionMode mode : {FusionMode::kIndependent, FusionMode::kJoint}) {
    EXPECT_EQ(fusion_mode_from_string(to_string(mode)), mode);
  }
}

TEST_F(FusionInvariants, CancelAtEveryCheckLeavesTheSumsUsable) {
  with_kept_text();
  const Items list = items(3);
  const Fusion expected = solve(list);
  testing::CountingProgress counter;
  sums_of(list).solve(kept_, options_, {}, counter);
  EXPECT_GE(counter.checks, 6);
  FusionSums sums = sums_of(list);
  for (int64_t at = 1; at <= counter.checks; ++at) {
    testing::CountingProgress progress;
    progress.cancel_at = at;
    try {
      sums.solve(kept_, options_, {}, progress);
    } catch (const testing::Cancelled&) {
    }
    const Fusion again = sums.solve(kept_, options_, {}, progress_);
    EXPECT_TRUE(at::equal(again.patch.delta, expected.patch.delta));
    EXPECT_TRUE(at::equal(again.patch.pairs.at("lora_k").r, expected.patch.pairs.at("lora_k").r));
  }
}

// The kept text of a fusion is that of a refinement with the same phrases.
TEST_F(FusionInvariants, KeptTextIsSharedWithTheRefinement) {
  testing::FakeTextEncoder encoder(8);
  StatisticsCache cache(64 << 20);
  ConceptSet set;
  set.concepts = {
      {.target = "tree", .anchor = "fog", .synonyms = {}, .comment = "", .templates = 2}};
  set.preserve = {{"wolf", ConceptKind::kObject, 3}, {"art", ConceptKind::kStyle, 2}};
  const RefinementProblem problem =
      collect_problem(encoder, set, RefinementOptions{}, nullptr, progress_);
  const auto collect = [&](const std::vector<std::string>& erased) {
    return collect_kept_text(encoder, set.preserve, set.general_prior, erased, &cache, progress_);
  };
  const KeptText text = collect({"tree"});
  EXPECT_TRUE(at::equal(text.preserve, problem.preserve));
  EXPECT_TRUE(at::equal(text.prior, problem.prior));
  const int64_t encoded = encoder.encoded_prompts;
  EXPECT_TRUE(at::equal(collect({"tree"}).prior, problem.prior));
  EXPECT_EQ(encoder.encoded_prompts, encoded);
  EXPECT_GT(relative_difference(collect({}).prior, problem.prior), 1e-6);
  EXPECT_TRUE(at::equal(collect({}).prior,
                        general_prior_gram(encoder, GeneralPriorSize::kSmall, progress_)));
}

}  // namespace
}  // namespace lacuna
