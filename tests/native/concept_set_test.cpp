// SPDX-License-Identifier: Apache-2.0
#include "lacuna/concept_set.h"

#include <random>

#include "lacuna/error.h"
#include "lacuna/text.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::message_of;

ConceptSet parse(const std::string& text, ConceptDefaults defaults = {}) {
  return parse_concepts(text, defaults);
}

TEST(Text, Rules) {
  EXPECT_EQ(normalize_phrase("  van \t gogh\n style "), "van gogh style");
  EXPECT_EQ(normalize_phrase(" \n"), "");
  EXPECT_EQ(fold_case("Van GOGH \xC3\x89"), "van gogh \xC3\x89");
  EXPECT_EQ(split_lines("a\r\nb\rc\nd"), (std::vector<std::string>{"a", "b", "c", "d"}));
}

TEST(ConceptLines, TheWholeSyntax) {
  const ConceptSet set = parse(
      "# a list\n"
      "church\n"
      "\n"
      "  van gogh   style ->  art  | starry night style, vincent style ,  # my comment\n"
      "c# -> a note\n"
      "dog | puppy, hound");
  ASSERT_EQ(set.concepts.size(), 4u);
  EXPECT_EQ(set.concepts[0].target, "church");
  EXPECT_EQ(set.concepts[0].anchor, "scenery");
  EXPECT_EQ(set.concepts[1].target, "van gogh style");
  EXPECT_EQ(set.concepts[1].anchor, "art");
  EXPECT_EQ(set.concepts[1].synonyms,
            (std::vector<std::string>{"starry night style", "vincent style"}));
  EXPECT_EQ(set.concepts[1].comment, "my comment");
  EXPECT_EQ(set.concepts[2].target, "c#");
  EXPECT_EQ(phrases(set.concepts[3]), (std::vector<std::string>{"dog", "puppy", "hound"}));
}

TEST(ConceptLines, AnchorFollowsKindUnlessGiven) {
  for (const auto& [kind, anchor] : std::vector<std::pair<ConceptKind, std::string>>{
           {ConceptKind::kObject, "scenery"},
           {ConceptKind::kPerson, "a person"},
           {ConceptKind::kStyle, "art"},
           {ConceptKind::kExplicit, "a person wearing clothes"}}) {
    EXPECT_EQ(parse("x", {.kind = kind}).concepts[0].anchor, anchor);
    EXPECT_EQ(concept_kind_from_string(to_string(kind)), kind);
  }
  const ConceptSet set = parse("x\ny -> z", {.anchor = " the  sky ", .templates = 7});
  EXPECT_EQ(set.concepts[0].anchor, "the sky");
  EXPECT_EQ(set.concepts[1].anchor, "z");
  EXPECT_EQ(set.concepts[0].templates, 7);
}

TEST(ConceptLines, ErrorsNameTheLine) {
  for (const std::string bad : {"a -> ", "-> b", "a -> b -> c", "a | ", "a | b | c", "| b"}) {
    const std::string message = message_of([&] { parse("fine\n" + bad); });
    EXPECT_NE(message.find("line 2"), std::string::npos) << bad << ": " << message;
  }
  std::string many;
  for (int i = 0; i < 10'001; ++i) many += std::to_string(i) + "\n";
  EXPECT_NE(message_of([&] { parse(many); }), "");
  EXPECT_NE(message_of([&] { parse_preserve_lines(many, {}); }), "");
  const std::string huge(5 << 20, 'x');
  EXPECT_NE(message_of([&] { parse(huge); }), "");
  EXPECT_NE(message_of([&] { parse_preserve_lines(huge, {}); }), "");
}

TEST(ConceptSetRules, EachHasItsSentence) {
  const auto refuse = [](const std::string& concepts, const std::string& preserve,
                         const std::string& expected) {
    ConceptSet set = parse(concepts);
    set.preserve = parse_preserve_lines(preserve, {});
    const std::string message = message_of([&] { validate(set); });
    EXPECT_NE(message.find(expected), std::string::npos) << "'" << message << "'";
  };
  refuse("", "", "no concept to erase");
  refuse("cat -> Cat", "", "its own anchor");
  refuse("dog -> x | X", "", "its own anchor");
  refuse("cat\nCAT", "", "listed twice");
  refuse("cat -> a | dog\ndog -> b", "", "listed twice");
  refuse("cat", "wolf\n Cat # note", "both erased and preserved");
  refuse("cat | kitty", "kitty", "both erased and preserved");
  refuse("cat", "wolf\nwolf", "preserved twice");
  refuse(std::string(600, 'x'), "", "longer than");
  for (int templates : {0, 31}) {
    ConceptSet set = parse("cat", {.templates = templates});
    EXPECT_NE(message_of([&] { validate(set); }).find("templates"), std::string::npos);
  }
  ConceptSet empty_phrase = parse("cat");
  empty_phrase.preserve = {{"", ConceptKind::kObject, 30}};
  EXPECT_NE(message_of([&] { validate(empty_phrase); }), "");
  EXPECT_EQ(message_of([] { validate(parse("cat\ndog -> fog | hound")); }), "");
}

TEST(ConceptJson, RoundTrip) {
  ConceptSet set = parse("church -> field | chapel # why\ncaf\xC3\xA9 \"bar\"",
                         {.kind = ConceptKind::kStyle, .templates = 5});
  set.preserve =
      parse_preserve_lines("barn\nhouse", {.kind = ConceptKind::kPerson, .templates = 3});
  set.general_prior = GeneralPriorSize::kFull;
  EXPECT_EQ(concept_set_from_json(to_json(set)), set);
  EXPECT_EQ(parse("\n  " + to_json(set)), set);  // pasted into the text box
}

TEST(ConceptJson, ShortFormIsEnough) {
  const ConceptSet set = concept_set_from_json(
      R"({"format": "lacuna.concepts/1", "concepts": [{"target": "x", "kind": "person"}], "preserve": ["y"]})");
  EXPECT_EQ(set.concepts[0].anchor, "a person");
  EXPECT_EQ(set.preserve[0].phrase, "y");
  EXPECT_EQ(set.general_prior, GeneralPriorSize::kSmall);
}

TEST(ConceptJson, ErrorsNameTheMember) {
  const auto refuse = [](const std::string& json, const std::string& expected) {
    const std::string message = message_of([&] { concept_set_from_json(json); });
    EXPECT_NE(message.find(expected), std::string::npos) << json << " -> '" << message << "'";
  };
  const std::string head = R"({"format": "lacuna.concepts/1", )";
  refuse("{", "cannot be read");
  refuse("[]", "must be an object");
  refuse("{}", "'format' is missing");
  refuse(R"({"format": "other/1"})", "other/1");
  refuse(R"({"format": 1})", "must be text");
  refuse(head + R"("surprise": 1})", "surprise");
  refuse(head + R"("concepts": {}})", "must be a list");
  refuse(head + R"("concepts": [1]})", "concept 1 must be an object");
  refuse(head + R"("concepts": [{"target": "a"}, {"anchor": "b"}]})", "concept 2: 'target'");
  refuse(head + R"("concepts": [{"target": "a", "kind": "planet"}]})", "planet");
  refuse(head + R"("concepts": [{"target": "a", "templates": 1.5}]})", "whole number");
  refuse(head + R"("concepts": [{"target": "a", "templates": -4}]})", "out of range");
  refuse(head + R"("concepts": [{"target": "a", "synonyms": [1]}]})", "synonym");
  refuse(head + R"("preserve": [{}]})", "preserved phrase 1");
  refuse(head + R"("general_prior": "big"})", "big");
  refuse(std::string(100'000, '['), "nested");
  refuse("{\"format\": \"\xff\"}", "cannot be read");
  refuse(std::string(5 << 20, ' '), "4 MiB");
  std::string many = head + R"("preserve": [)";
  for (int i = 0; i < 10'001; ++i) many += (i ? ",\"a\"" : "\"a\"");
  refuse(many + "]}", "10000");
  ConceptSet broken = parse("\xff");
  EXPECT_NE(message_of([&] { to_json(broken); }).find("UTF-8"), std::string::npos);
}

TEST(ConceptSets, MergeAppendsAndKeepsOrder) {
  ConceptSet a = parse("cat");
  ConceptSet b = parse("dog");
  b.general_prior = GeneralPriorSize::kNone;
  b.preserve = {{"wolf", ConceptKind::kObject, 30}};
  const ConceptSet both = merge(a, b);
  ASSERT_EQ(both.concepts.size(), 2u);
  EXPECT_EQ(both.concepts[0].target, "cat");
  EXPECT_EQ(both.preserve.size(), 1u);
  EXPECT_EQ(both.general_prior, GeneralPriorSize::kNone);
}

class ConceptFuzz : public testing::SeededTest {};

// 10,000 damaged files: an error or a valid set, never a crash or a hang.
TEST_F(ConceptFuzz, MutatedFilesAreErrorsOrSets) {
  ConceptSet base = parse("church -> field | chapel\nvan gogh style -> art");
  base.preserve = {{"barn", ConceptKind::kObject, 30}};
  const std::string good = to_json(base);
  const std::string lines = "church -> field | chapel, abbey # x\nvan gogh style -> art\n";
  std::mt19937_64 random(seed());
  int errors = 0;
  for (int round = 0; round < 10'000; ++round) {
    std::string text = round % 4 == 0 ? lines : good;
    for (uint64_t edits = 1 + random() % 4; edits > 0; --edits) {
      const size_t at = random() % text.size();
      switch (random() % 4) {
        case 0:
          text[at] = static_cast<char>(random());
          break;
        case 1:
          text.erase(at, 1 + random() % 10);
          break;
        case 2:
          text.insert(at, text.substr(random() % text.size(), random() % 20));
          break;
        default:
          text.resize(at);
      }
      if (text.empty()) text = "{";
    }
    try {
      validate(parse(text));
    } catch (const Error&) {
      ++errors;
    }
  }
  EXPECT_GT(errors, 1000);
}

}  // namespace
}  // namespace lacuna
