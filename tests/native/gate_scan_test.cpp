// SPDX-License-Identifier: Apache-2.0
// Where a gated edit acts, from the text alone: counted against a gate whose mistakes are known.
#include "lacuna/evaluation/gate_scan.h"

#include <algorithm>

#include "lacuna/evaluation/evaluation_report.h"
#include "lacuna/evaluation/evaluation_summary.h"
#include "lacuna/files/text.h"
#include "support/fake_host.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::FakeDenoiser;
using testing::FakeTextEncoder;

// Remembers what it read, so that the model below can tell prompts by their words.
class RecordingEncoder final : public FakeTextEncoder {
 public:
  using FakeTextEncoder::FakeTextEncoder;
  at::Tensor encode(const std::vector<std::string>& prompts) override {
    read_.insert(read_.end(), prompts.begin(), prompts.end());
    return FakeTextEncoder::encode(prompts);
  }
  std::vector<std::string> read_;
};

// Acts on prompts that say one of `says`.
class GatedDenoiser final : public FakeDenoiser {
 public:
  GatedDenoiser(const FakeDenoiser& base, const RecordingEncoder& encoder,
                std::vector<std::string> says)
      : FakeDenoiser(base), encoder_(encoder), says_(std::move(says)) {}
  at::Tensor acts_on(const at::Tensor& context) override {
    const auto n = static_cast<size_t>(context.size(0));
    const std::vector<std::string> prompts(encoder_.read_.end() - static_cast<std::ptrdiff_t>(n),
                                           encoder_.read_.end());
    at::Tensor acts = at::zeros({context.size(0)}, at::kBool);
    for (size_t i = 0; i < n; ++i) {
      acts[static_cast<int64_t>(i)] =
          std::any_of(says_.begin(), says_.end(),
                      [&](const std::string& word) { return names_phrase(prompts[i], word); });
    }
    return acts;
  }

 private:
  const RecordingEncoder& encoder_;
  std::vector<std::string> says_;
};

class GateScanTest : public ::testing::Test {
 protected:
  GateScanTest() {
    Concept owl;
    owl.target = "flag of owl";
    owl.anchor = "fog";
    owl.synonyms = {"night bird"};
    set_.concepts = {owl};
    set_.preserve = {{"hawk", ConceptKind::kObject, 4}};
  }
  GateScan scan(std::vector<std::string> says) {
    GatedDenoiser edited(model_, encoder_, std::move(says));
    return scan_gate(edited, encoder_, set_, {"eagle", "duck"}, progress_);
  }
  static const GateCount& find(const std::vector<GateCount>& counts, const std::string& form) {
    const auto it = std::find_if(counts.begin(), counts.end(),
                                 [&](const GateCount& count) { return count.form == form; });
    EXPECT_NE(it, counts.end()) << form;
    return *it;
  }

  RecordingEncoder encoder_{16};
  FakeDenoiser model_{3, 16};
  ConceptSet set_;
  testing::CountingProgress progress_;
};

TEST_F(GateScanTest, AModelWithoutAGateCostsOnePrompt) {
  const GateScan found = scan_gate(model_, encoder_, set_, {"eagle"}, progress_);
  EXPECT_FALSE(found.gated);
  EXPECT_TRUE(found.concepts.empty() && found.others.empty());
  EXPECT_EQ(encoder_.read_.size(), 1u);
}

TEST_F(GateScanTest, AGateWithoutMistakes) {
  const GateScan found = scan({"flag of owl", "night bird"});
  ASSERT_TRUE(found.gated);
  ASSERT_EQ(found.concepts.size(), 1u);
  for (const char* form : {"alone", "synonyms", "beside other things", "in long prompts"}) {
    const GateCount& count = find(found.concepts.front().named, form);
    EXPECT_EQ(count.acted.hits, count.acted.trials) << form;
    EXPECT_TRUE(count.wrong.empty()) << form;
  }
  EXPECT_EQ(found.named().hits, found.named().trials);
  EXPECT_GE(found.named().trials, 18);
  // Half of the disguises leave the phrase whole.
  EXPECT_GT(found.disguised().hits, 0);
  EXPECT_LT(found.disguised().hits, found.disguised().trials);
  for (const GateCount& other : found.others) EXPECT_EQ(other.acted.hits, 0) << other.form;
  EXPECT_GE(find(found.others, "unrelated captions").acted.trials, 40);
  const GateCount& same_form = find(found.others, "other words in what the concepts share");
  EXPECT_EQ(same_form.acted.trials, 40);
}

TEST_F(GateScanTest, WhatItMissesAndWhatItTouchesIsTold) {
  const GateScan found = scan({"night bird", "eagle"});
  const GateCount& alone = find(found.concepts.front().named, "alone");
  EXPECT_EQ(alone.acted.hits, 0);
  EXPECT_EQ(static_cast<int64_t>(alone.wrong.size()), alone.acted.trials);
  const GateCount& similar = find(found.others, "similar words that nobody listed");
  EXPECT_EQ(similar.acted, (Count{2, 4}));
  ASSERT_EQ(similar.wrong.size(), 2u);
  EXPECT_TRUE(names_phrase(similar.wrong.front(), "eagle"));
  EXPECT_EQ(find(found.others, "preserved").acted.hits, 0);
}

TEST_F(GateScanTest, ManyConceptsAreReadOnceInEveryForm) {
  const Concept first = set_.concepts.front();
  set_.concepts.clear();
  for (int i = 0; i < 40; ++i) {
    set_.concepts.push_back(first);
    set_.concepts.back().target = "flag of word" + std::to_string(i);
    set_.concepts.back().synonyms.clear();
  }
  const GateScan found = scan({"flag of"});
  EXPECT_EQ(found.concepts.size(), 40u);
  EXPECT_EQ(found.named(), (Count{120, 120}));
  EXPECT_EQ(found.disguised().trials, 40);
}

TEST_F(GateScanTest, CanBeCancelledAtAnyTime) {
  scan({"flag of owl"});
  const int64_t checks = progress_.checks;
  ASSERT_GT(checks, 10);
  for (int64_t at = 1; at <= checks; at += 7) {
    progress_.cancel_at = progress_.checks + at;
    EXPECT_THROW(scan({"flag of owl"}), testing::Cancelled);
  }
}

TEST_F(GateScanTest, APreflightOfAGatedEditIsAboutTheGate) {
  Evaluation evaluation;
  evaluation.concepts = set_;
  evaluation.scan.concepts.push_back(
      {"flag of owl", {{"flag of owl", "target", 1.0}}, {}, {}, {}, {}, {}});
  evaluation.gate = scan({"flag of owl", "eagle"});
  const EvaluationSummary summary = summarize(evaluation);
  std::string verdict;
  for (const std::string& line : summary.verdict) verdict += line + '\n';
  EXPECT_NE(verdict.find("acts on prompts that name a concept"), std::string::npos) << verdict;
  EXPECT_NE(verdict.find("2 of 4 of similar words that nobody listed"), std::string::npos)
      << verdict;
  EXPECT_EQ(verdict.find("nothing was erased"), std::string::npos) << verdict;
  EXPECT_DOUBLE_EQ(summary.scores.erased, 1.0);
  EXPECT_LT(summary.scores.synonyms, 1.0);
  EXPECT_DOUBLE_EQ(summary.scores.neighbours, 0.5);
  EXPECT_DOUBLE_EQ(summary.scores.preserved, 1.0);
  const std::string page = to_html(to_json(evaluation, summary), {});
  EXPECT_NE(page.find("Where the edit acts"), std::string::npos);
  evaluation.gate = {};
  EXPECT_NE(to_json(evaluation, summarize(evaluation)).find("\"gate\": null"), std::string::npos);
}

}  // namespace
}  // namespace lacuna
