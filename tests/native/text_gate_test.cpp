// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/text_gate.h"

#include <algorithm>
#include <set>

#include "lacuna/closed_form/refinement.h"
#include "lacuna/concepts/written_forms.h"
#include "lacuna/files/text.h"
#include "support/fake_host.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::FakeTextEncoder;

// Wide enough that words of the vocabulary are told apart.
class TextGateTest : public ::testing::Test {
 protected:
  TextGateTest() {
    // The gate of this toy encoder, which has 19 prompts of a concept for 192 dimensions, depends
    // on which words stand beside it: with 60, 150 or 240 of them one of the tests below fails.
    for (int i = 0; i < 100; ++i) encoder_.vocabulary_.push_back(word(i));
    for (const char* target : {"owl", "red fox"}) {
      Concept item;
      item.target = target;
      item.anchor = "scenery";
      concepts_.push_back(item);
    }
    retained_ = collect_retain_set(encoder_, concepts_, RetainSetSize::kSmall, progress_);
  }
  static std::string word(int i) {
    return std::string("word") + static_cast<char>('a' + i / 26) + static_cast<char>('a' + i % 26);
  }
  std::vector<bool> opened(const FittedGate& fitted, const std::vector<std::string>& prompts) {
    const at::Tensor open = opens(*fitted.gate, encoder_.encode(prompts));
    std::vector<bool> out;
    for (int64_t i = 0; i < open.size(0); ++i) out.push_back(open[i].item<bool>());
    return out;
  }

  FakeTextEncoder encoder_{96};
  std::vector<Concept> concepts_;
  RetainSet retained_;
  SilentProgress progress_;
};

TEST_F(TextGateTest, OpensForPromptsThatNameAConceptAndForNoOthers) {
  const FittedGate fitted = fit_gate(encoder_, concepts_, {}, retained_, progress_);
  const std::vector<bool> named =
      opened(fitted, {"owl", "a painting of owl", "a photo of red fox", "red fox , outdoors"});
  EXPECT_EQ(std::count(named.begin(), named.end(), true), 4);
  std::vector<std::string> others;
  for (int i = 0; i < 60; i += 3) others.push_back("a painting of " + word(i));
  const std::vector<bool> open = opened(fitted, others);
  EXPECT_EQ(std::count(open.begin(), open.end(), true), 0);
}

TEST_F(TextGateTest, RowsOfABatchAndWindowsOfALongPromptAreJudgedApart) {
  const FittedGate fitted = fit_gate(encoder_, concepts_, {}, retained_, progress_);
  const at::Tensor context = encoder_.encode({"a photo of " + word(1), "a photo of owl"});
  const at::Tensor open = opens(*fitted.gate, context);
  EXPECT_FALSE(open[0].item<bool>());
  EXPECT_TRUE(open[1].item<bool>());
  // The concept in the second window of one prompt.
  const at::Tensor longer = at::cat({context[0], context[1]}).unsqueeze(0);
  EXPECT_TRUE(opens(*fitted.gate, longer)[0].item<bool>());
  EXPECT_FALSE(opens(*fitted.gate, at::cat({context[0], context[0]}).unsqueeze(0))[0].item<bool>());
}

// A target that is a word of the vocabulary stands beside other words in what must stay: no reason
// to take the others for it, or it for them.
TEST_F(TextGateTest, ATargetThatIsAWordOfTheVocabularyIsToldFromTheOthers) {
  concepts_[0].target = word(5);
  retained_ = collect_retain_set(encoder_, concepts_, RetainSetSize::kSmall, progress_);
  ASSERT_TRUE(std::any_of(retained_.kept.prompts.begin(), retained_.kept.prompts.end(),
                          [](const std::string& prompt) { return names_phrase(prompt, word(5)); }));
  const FittedGate fitted = fit_gate(encoder_, concepts_, {}, retained_, progress_);
  EXPECT_TRUE(fitted.confused.empty());
  EXPECT_TRUE(opened(fitted, {"an old painting of " + word(5)}).front());
  EXPECT_FALSE(opened(fitted, {"an old painting of " + word(7)}).front());
}

TEST_F(TextGateTest, FindsAConceptAfterManyOtherWords) {
  const FittedGate fitted = fit_gate(encoder_, concepts_, {}, retained_, progress_);
  std::string text = "a scene with";
  for (int i = 0; i < 20; ++i) text += " " + word(2 * i);
  const std::vector<bool> open = opened(fitted, {text + " and red fox", text + " and " + word(3)});
  EXPECT_TRUE(open[0]);
  EXPECT_FALSE(open[1]);
}

TEST(WrittenForms, ArePhrasesTheirPluralsAndWhatStylesAreCalled) {
  const auto forms_of = [](const std::string& phrase, ConceptKind kind = ConceptKind::kObject) {
    Concept item;
    item.target = phrase;
    item.kind = kind;
    const std::vector<std::string> forms = written_forms({item});
    return std::set<std::string>(forms.begin(), forms.end());
  };
  using Forms = std::set<std::string>;
  EXPECT_EQ(forms_of("owl"), (Forms{"owl", "owls"}));
  EXPECT_EQ(forms_of("CITY"), (Forms{"city", "citys", "cities"}));
  EXPECT_EQ(forms_of("a red fox"), (Forms{"red fox", "red foxs", "red foxes"}));
  EXPECT_EQ(forms_of("Flag Of Italy"),
            (Forms{"flag of italy", "flag of italys", "flag of italies", "flags of italy"}));
  EXPECT_TRUE(forms_of("person in a hat").contains("persons in a hat"));
  EXPECT_TRUE(forms_of("spider-man").contains("spiderman"));
  EXPECT_TRUE(forms_of("woman").contains("women"));
  EXPECT_TRUE(forms_of("knife").contains("knives"));
  EXPECT_FALSE(forms_of("cub").contains("cubes")) << "another word";
  EXPECT_FALSE(forms_of("green house").contains("greenhouse")) << "another word";
  EXPECT_TRUE(forms_of("Van Gogh style", ConceptKind::kStyle).contains("van gogh"));
  EXPECT_FALSE(forms_of("Van Gogh style").contains("van gogh"));
}

TEST_F(TextGateTest, TextOfAnyLengthIsJudged) {
  const FittedGate fitted = fit_gate(encoder_, concepts_, {}, retained_, progress_);
  const at::Tensor context = encoder_.encode({"a photo of " + word(1), "a photo of owl"});
  for (const int64_t rows : {int64_t{1}, int64_t{2}, int64_t{40}, int64_t{77}}) {
    const at::Tensor cut = context.narrow(1, 0, rows);
    EXPECT_FALSE(opens(*fitted.gate, cut)[0].item<bool>()) << rows;
    EXPECT_EQ(opens(*fitted.gate, cut)[1].item<bool>(), rows >= 40) << rows;
    const at::Tensor more = at::cat({context, cut}, 1);
    EXPECT_FALSE(opens(*fitted.gate, more)[0].item<bool>()) << rows;
    EXPECT_TRUE(opens(*fitted.gate, more)[1].item<bool>()) << rows;
  }
}

TEST_F(TextGateTest, SaysWhatItCannotTellApart) {
  PreservedPhrase same;
  same.phrase = "owl";
  const FittedGate fitted = fit_gate(encoder_, concepts_, {same}, retained_, progress_);
  ASSERT_EQ(fitted.confused.size(), 1u);
  EXPECT_EQ(fitted.confused.front(), "'owl' from 'owl'");
  EXPECT_TRUE(opened(fitted, {"a photo of owl"}).front());
}

TEST_F(TextGateTest, SaysThatItCannotTellWordsOfEveryPrompt) {
  concepts_[1].target = "photo";
  retained_ = collect_retain_set(encoder_, concepts_, RetainSetSize::kSmall, progress_);
  const FittedGate fitted = fit_gate(encoder_, concepts_, {}, retained_, progress_);
  ASSERT_FALSE(fitted.confused.empty());
  EXPECT_EQ(fitted.confused.front().find("'photo' from 'a photo of "), 0u)
      << fitted.confused.front();
  for (const std::string& each : fitted.confused) EXPECT_EQ(each.find("'owl' from"), each.npos);
}

// What the closed form has read is not read again, and nothing at all of a concept that is known.
TEST_F(TextGateTest, NothingIsReadTwice) {
  encoder_.fingerprint_ = "encoder";
  StatisticsCache cache(64 << 20);
  ConceptSet set;
  set.general_prior = GeneralPriorSize::kNone;
  set.concepts = concepts_;
  const auto read_prompts = [&](StatisticsCache* known) {
    encoder_.encoded_prompts = 0;
    fit_gate(encoder_, set.concepts, {}, retained_, progress_, known);
    return encoder_.encoded_prompts;
  };
  const int64_t anew = read_prompts(nullptr);
  collect_problem(encoder_, set, {}, &cache, progress_);
  EXPECT_EQ(read_prompts(&cache), anew - 2 * kPromptEnds);
  EXPECT_EQ(read_prompts(&cache), 0);
  const FittedGate known = fit_gate(encoder_, concepts_, {}, retained_, progress_, &cache);
  const FittedGate fresh = fit_gate(encoder_, concepts_, {}, retained_, progress_);
  for (size_t i = 0; i < fresh.gate->tests.size(); ++i) {
    EXPECT_LT(testing::relative_difference(known.gate->tests[i].now, fresh.gate->tests[i].now),
              1e-6);
  }
}

TEST(StatisticsCache, RoomIsMadeByWhatIsLarge) {
  StatisticsCache cache(512 * 100);
  const at::Tensor small = at::zeros({10});
  cache.insert("small", {small});
  for (int i = 0; i < 10; ++i) cache.insert(std::to_string(i), {at::zeros({5000})});
  EXPECT_NE(cache.find("small"), nullptr);
  EXPECT_EQ(cache.find("0"), nullptr);
  EXPECT_LE(cache.bytes(), 512 * 100);
}

TEST_F(TextGateTest, SameInputsGiveTheSameGate) {
  const FittedGate a = fit_gate(encoder_, concepts_, {}, retained_, progress_);
  const FittedGate b = fit_gate(encoder_, concepts_, {}, retained_, progress_);
  for (size_t i = 0; i < a.gate->tests.size(); ++i) {
    EXPECT_TRUE(at::equal(a.gate->tests[i].now, b.gate->tests[i].now));
    EXPECT_TRUE(at::equal(a.gate->tests[i].offset, b.gate->tests[i].offset));
  }
  testing::CountingProgress cancelled;
  cancelled.cancel_at = 3;
  EXPECT_THROW(fit_gate(encoder_, concepts_, {}, retained_, cancelled), testing::Cancelled);
}

}  // namespace
}  // namespace lacuna
