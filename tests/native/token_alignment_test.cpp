// SPDX-License-Identifier: Apache-2.0
#include "lacuna/concepts/token_alignment.h"

#include <map>
#include <sstream>

#include "lacuna/error.h"

namespace lacuna {
namespace {

// One id per word piece.
std::vector<int64_t> ids(const std::string& pieces) {
  static std::map<std::string, int64_t> known;
  std::vector<int64_t> out{49406};
  std::istringstream stream(pieces);
  for (std::string piece; stream >> piece;) {
    out.push_back(known.emplace(piece, 1000 + static_cast<int64_t>(known.size())).first->second);
  }
  out.push_back(49407);
  return out;
}

struct Example {
  std::string target, anchor;
  std::vector<int64_t> first_target, first_anchor;
  int64_t length, last_target, last_anchor;
};

// The worked examples of the specification (token counts as the CLIP tokenizer gives them).
TEST(TokenAlignment, WorkedExamples) {
  const std::vector<Example> examples{
      {"A photo of adam driver",
       "A photo of a1 person",
       {0, 1, 2, 3, 6, 7},
       {0, 1, 2, 3, 6, 7},
       75,
       76,
       76},
      {"adam driver in a photo",
       "a1 person in a photo",
       {0, 3, 4, 5, 6},
       {0, 3, 4, 5, 6},
       75,
       76,
       76},
      {"A photo of drake",
       "A photo of a1 person",
       {0, 1, 2, 3, 5, 6},
       {0, 1, 2, 3, 6, 7},
       75,
       75,
       76},
      {"A photo of nud ity",
       "A photo of a1 person wearing clothes",
       {0, 1, 2, 3, 6},
       {0, 1, 2, 3, 8},
       73,
       74,
       76},
      {"A photo of ship", "A photo of ground", {0, 1, 2, 3, 5}, {0, 1, 2, 3, 5}, 76, 76, 76},
  };
  for (const Example& example : examples) {
    SCOPED_TRACE(example.target);
    const TokenAlignment out = align_tokens(ids(example.target), ids(example.anchor), 77);
    ASSERT_EQ(static_cast<int64_t>(out.target.size()), example.length);
    ASSERT_EQ(out.anchor.size(), out.target.size());
    for (size_t k = 0; k < example.first_target.size(); ++k) {
      EXPECT_EQ(out.target[k], example.first_target[k]);
      EXPECT_EQ(out.anchor[k], example.first_anchor[k]);
    }
    EXPECT_EQ(out.target.back(), example.last_target);
    EXPECT_EQ(out.anchor.back(), example.last_anchor);
  }
}

// '.. philip seymour hoffman during ..' (12 ids) against '.. a person ..' (11 ids).
TEST(TokenAlignment, LongerTargetInTheMiddle) {
  const TokenAlignment out =
      align_tokens(ids("an image capturing philip seymour hoffman during the b c"),
                   ids("an image capturing a1 person during the b c"), 77);
  EXPECT_EQ(out.target.size(), 74u);
  EXPECT_EQ(out.target[4], 7);
  EXPECT_EQ(out.anchor[4], 6);
  EXPECT_EQ(out.target.back(), 76);
  EXPECT_EQ(out.anchor.back(), 75);
}

TEST(TokenAlignment, LengthDependsOnReplacedTokensOnly) {
  for (const std::string before : {"", "x", "x y z"}) {
    for (const std::string after : {"", "u", "u v w"}) {
      for (const std::string phrase : {"p", "p q", "p q r s"}) {
        const auto out = align_tokens(ids(before + " " + phrase + " " + after),
                                      ids(before + " m n " + after), 77);
        const int64_t replaced = phrase == "p q r s" ? 4 : 2;
        EXPECT_EQ(static_cast<int64_t>(out.target.size()), 77 - replaced);
        EXPECT_EQ(out.prefix, before.empty() ? 1 : before == "x" ? 2 : 4);
        // The pair of the two end-of-text tokens stands where it is said to stand.
        const auto a = ids(before + " " + phrase + " " + after);
        EXPECT_EQ(out.target[out.first_end_of_text], static_cast<int64_t>(a.size()) - 1);
      }
    }
  }
}

TEST(TokenAlignment, SharedTokensJoinPrefixAndSuffix) {
  const auto prefix = align_tokens(ids("of a cat"), ids("of a person"), 77);
  EXPECT_EQ(prefix.prefix, 3);
  EXPECT_EQ(prefix.target.size(), 76u);
  const auto suffix = align_tokens(ids("red car"), ids("car"), 77);
  EXPECT_EQ(suffix.target[1], 2);  // "car" of the target with
  EXPECT_EQ(suffix.anchor[1], 1);  // "car" of the anchor
}

TEST(TokenAlignment, TooLongPromptIsAnError) {
  std::string text;
  for (int i = 0; i < 80; ++i) text += "w ";
  EXPECT_THROW(align_tokens(ids(text), ids("a"), 77), Error);
  EXPECT_THROW(align_tokens(ids("a"), ids(text), 77), Error);
}

TEST(TokenAlignment, PhrasesPairLastWithLast) {
  const auto longer = align_phrases({4, 7}, {4, 6});
  EXPECT_EQ(longer.target, (std::vector<int64_t>{4, 5, 6}));
  EXPECT_EQ(longer.anchor, (std::vector<int64_t>{4, 4, 5}));
  const auto shorter = align_phrases({4, 5}, {4, 8});
  EXPECT_EQ(shorter.target, (std::vector<int64_t>{4}));
  EXPECT_EQ(shorter.anchor, (std::vector<int64_t>{7}));
}

}  // namespace
}  // namespace lacuna
