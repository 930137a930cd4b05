// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/retain_set.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>

#include "lacuna/closed_form/concept_recognizer.h"
#include "lacuna/closed_form/refinement.h"
#include "lacuna/error.h"
#include "lacuna/files/text.h"
#include "support/fake_host.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::FakeTextEncoder;
using testing::message_of;
using testing::random_matrix;
using testing::relative_difference;

Concept concept_of(const std::string& target, std::vector<std::string> synonyms = {}) {
  Concept item;
  item.target = target;
  item.anchor = "scenery";
  item.synonyms = std::move(synonyms);
  item.templates = 2;
  return item;
}

TEST(ConceptRecognizer, TellsAConceptAndWhatIsNearItFromOtherWords) {
  const at::Tensor words = random_matrix(300, 24);
  const at::Tensor concepts = 3.0 * random_matrix(4, 24);
  const ConceptRecognizer recognizer(words, concepts);
  const at::Tensor own = recognizer.scores(concepts).diagonal();
  EXPECT_LT((own - 1.0).abs().max().item<double>(), 1e-9);
  EXPECT_LT(recognizer.scores(words.mean(0, true)).abs().max().item<double>(), 1e-9);
  const at::Tensor near = concepts + 0.3 * random_matrix(4, 24);
  EXPECT_GT(recognizer.scores(near).diagonal().min().item<double>(), ConceptRecognizer::kNames);
  const at::Tensor others = recognizer.scores(words);
  EXPECT_LT(others.gt(ConceptRecognizer::kNames).any(1).sum().item<int64_t>(), 15);
}

TEST(ConceptRecognizer, AConceptLikeEveryWordIsNotFoundEverywhere) {
  const at::Tensor words = random_matrix(50, 8);
  const ConceptRecognizer recognizer(words, words.mean(0, true));
  EXPECT_EQ(recognizer.scores(words).abs().max().item<double>(), 0.0);
}

TEST(RetainSet, FramesAreWhatTargetsShare) {
  EXPECT_EQ(shared_frames({concept_of("owl"), concept_of("dog")}), std::vector<std::string>{"{}"});
  EXPECT_EQ(shared_frames(
                {concept_of("flag of norway"), concept_of("flag of sweden"), concept_of("dog")}),
            (std::vector<std::string>{"{}", "flag of {}"}));
  Concept style = concept_of("van gogh style");
  style.kind = ConceptKind::kStyle;
  EXPECT_EQ(shared_frames({style}), (std::vector<std::string>{"{}", "{} style"}));
  EXPECT_EQ(shared_frames({concept_of("flag of christmas island"), concept_of("flag of norway")}),
            (std::vector<std::string>{"{}", "flag of {}"}));
  std::vector<Concept> many;
  for (int i = 0; i < 40; ++i) many.push_back(concept_of("thing" + std::to_string(i)));
  many.push_back(concept_of("hong kong"));
  many.push_back(concept_of("hong fu"));
  EXPECT_EQ(shared_frames(many).size(), 1u);  // two of forty-two share nothing worth keeping
}

class RetainSetTest : public ::testing::Test {
 protected:
  RetainSetTest() {
    folder_ =
        std::filesystem::temp_directory_path() /
        ("lacuna_retain_" + std::to_string(::testing::UnitTest::GetInstance()->random_seed()) +
         ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
    encoder_.vocabulary_ = {"the",   "x",     "house", "owl",   "tree",
                            "naïve", "river", "boat",  "stone", "owls"};
  }
  ~RetainSetTest() override { std::filesystem::remove_all(folder_); }

  std::filesystem::path folder_;
  FakeTextEncoder encoder_{16};
  SilentProgress progress_;
};

TEST_F(RetainSetTest, SumsUpEveryWordButTheTargetsAndTheirPlurals) {
  const RetainSet set =
      collect_retain_set(encoder_, {concept_of("owl")}, RetainSetSize::kSmall, progress_);
  for (const char* phrase : {"owl", "owls"}) {
    EXPECT_NE(std::find(set.left_out.begin(), set.left_out.end(), phrase), set.left_out.end());
  }
  EXPECT_EQ(set.words + static_cast<int64_t>(set.left_out.size()), 8);  // without "x" and "naïve"
  // As if no prompt had named the target, not even beside a word that stays.
  ASSERT_EQ(set.kept.prompts.size(), set.kept.phrases.size() * kRetainPrompts);
  at::Tensor sum = at::zeros({16, 16}, at::kDouble);
  int naming = 0;
  for (const std::string& prompt : set.kept.prompts) {
    if (names_phrase(prompt, "owl")) {
      ++naming;
      continue;
    }
    const at::Tensor rows = encoder_.encode({prompt})[0].to(at::kHalf).to(at::kDouble);
    // Of the padding a pair stands for all since the pair before.
    const std::vector<int64_t> places = sampled_positions(encoder_.window());
    double rows_counted = 0.0;
    for (size_t i = 0; i < places.size(); ++i) {
      const bool beginning = places[i] == static_cast<int64_t>(i);
      const size_t second = i + (i % 2 == 0 ? 1 : 0);
      const double weight =
          beginning ? 1.0 : static_cast<double>(places[second] - places[second - 2]) / 2;
      rows_counted += weight;
      const at::Tensor row = rows[places[i]];
      sum += weight * at::outer(row, row) / static_cast<double>(kRetainPrompts);
    }
    ASSERT_EQ(rows_counted, static_cast<double>(encoder_.window()));
  }
  EXPECT_GT(naming, 0);
  EXPECT_LT(relative_difference(set.gram, sum), 1e-5);
  EXPECT_FALSE(collect_retain_set(encoder_, {concept_of("owl")}, RetainSetSize::kNone, progress_)
                   .gram.defined());
}

TEST_F(RetainSetTest, PhrasesStandBesideDifferentWordsInDifferentWaysWhereverTheyAreListed) {
  const std::vector<std::string> listed{"lion", "castle", "bridge", "lamp", "violin", "cactus"};
  const auto beside = [&](const std::vector<std::string>& phrases) {
    std::vector<std::string> prompts;
    const PhraseRows read = read_phrase_rows(encoder_, phrases, encoder_.vocabulary_, progress_);
    for (size_t i = 0; i < phrases.size(); ++i) {
      prompts.push_back(read.prompts[kRetainPrompts * (i + 1) - 1]);
    }
    return prompts;
  };
  const std::vector<std::string> all = beside(listed);
  std::set<std::string> ways;
  for (size_t i = 0; i < all.size(); ++i) {
    EXPECT_EQ(all[i], beside({listed[i]}).front());
    std::string way = all[i];
    ways.insert(way.replace(way.find(listed[i]), listed[i].size(), "{}"));
  }
  EXPECT_GE(ways.size(), 4u);
}

TEST_F(RetainSetTest, NothingIsKeptFromAStyle) {
  std::vector<Concept> concepts{concept_of("owl")};
  EXPECT_EQ(retained_size(RetainSetSize::kFull, concepts), RetainSetSize::kFull);
  EXPECT_EQ(retained_size(RetainSetSize::kNone, concepts), RetainSetSize::kNone);
  concepts.push_back(concept_of("fauve style"));
  concepts.back().kind = ConceptKind::kStyle;
  EXPECT_EQ(retained_size(RetainSetSize::kFull, concepts), RetainSetSize::kNone);
}

TEST_F(RetainSetTest, WhatContainsATargetIsNotKept) {
  const RetainSet set = collect_retain_set(
      encoder_, {concept_of("owl"), concept_of("nest of river")}, RetainSetSize::kSmall, progress_);
  ASSERT_NE(std::find(set.frames.begin(), set.frames.end(), "nest of {}"), set.frames.end());
  for (const std::string& phrase : set.kept.phrases) {
    EXPECT_FALSE(names_phrase(phrase, "owl")) << phrase;
    EXPECT_NE(phrase, "nest of river");
  }
}

TEST_F(RetainSetTest, IsReadOnceForAnEncoderAndDamagedFilesAreReadAgain) {
  encoder_.cache_directory_ = folder_.string();
  const std::vector<Concept> concepts{concept_of("owl")};
  const RetainSet first = collect_retain_set(encoder_, concepts, RetainSetSize::kSmall, progress_);
  const int64_t once = std::exchange(encoder_.encoded_prompts, 0);
  const RetainSet again = collect_retain_set(encoder_, concepts, RetainSetSize::kSmall, progress_);
  EXPECT_LT(encoder_.encoded_prompts, once / 2);
  EXPECT_TRUE(at::equal(first.gram, again.gram));
  EXPECT_EQ(first.left_out, again.left_out);

  for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(-9, std::ios::end);
    file.put('\x55');
  }
  EXPECT_TRUE(at::equal(
      first.gram, collect_retain_set(encoder_, concepts, RetainSetSize::kSmall, progress_).gram));
}

TEST_F(RetainSetTest, AnEncoderWithoutWordsIsRefusedInASentence) {
  encoder_.vocabulary_.clear();
  EXPECT_NE(message_of([&] {
              collect_retain_set(encoder_, {concept_of("owl")}, RetainSetSize::kFull, progress_);
            }).find("set 'retain set' to none"),
            std::string::npos);
}

TEST_F(RetainSetTest, ConceptsThatLeaveNothingToKeepAreRefusedInASentence) {
  encoder_.vocabulary_ = {"owl", "ship"};
  EXPECT_NE(message_of([&] {
              collect_retain_set(encoder_, {concept_of("owl"), concept_of("ship")},
                                 RetainSetSize::kSmall, progress_);
            }).find("are all that the retain set could keep"),
            std::string::npos);
}

TEST_F(RetainSetTest, ADamagedEncoderIsFoundOutByTheFirstPrompts) {
  encoder_.broken = true;
  EXPECT_THROW(collect_retain_set(encoder_, {}, RetainSetSize::kSmall, progress_), Error);
  EXPECT_LT(encoder_.encoded_prompts, 10);
}

TEST_F(RetainSetTest, CanBeCancelled) {
  testing::CountingProgress cancelled;
  cancelled.cancel_at = 2;
  EXPECT_THROW(collect_retain_set(encoder_, {concept_of("owl")}, RetainSetSize::kSmall, cancelled),
               testing::Cancelled);
}

// What is retained moves less; what is erased still goes.
TEST_F(RetainSetTest, RetainedWordsMoveLess) {
  ConceptSet set;
  set.general_prior = GeneralPriorSize::kNone;
  set.concepts = {concept_of("owl")};
  RefinementOptions options;
  options.regularization = 0.1;
  RefinementProblem problem = collect_problem(encoder_, set, options, nullptr, progress_);
  const auto moved = [&](const std::string& phrase) {
    const Refinement refinement = solve_refinement(problem, options);
    const at::Tensor rows = encoder_.encode({phrase}).reshape({-1, 16}).to(at::kDouble);
    return at::matmul(rows, refinement.delta.t()).norm().item<double>();
  };
  const double river = moved("river");
  const double owl = moved("owl");
  problem.retain =
      collect_retain_set(encoder_, set.concepts, RetainSetSize::kSmall, progress_).gram;
  EXPECT_LT(moved("river"), 0.6 * river);
  EXPECT_GT(moved("owl"), 0.2 * owl);
}

}  // namespace
}  // namespace lacuna
