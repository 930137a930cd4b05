// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/edit_method.h"

#include <algorithm>
#include <set>

#include "lacuna/error.h"

namespace lacuna {
namespace {

TEST(EditMethod, NamesAndReadAtRoundTrip) {
  EXPECT_EQ(edit_method_names(), (std::vector<std::string>{"mace", "uce"}));
  for (const std::string& name : edit_method_names()) EXPECT_EQ(edit_method(name).name(), name);
  for (const ReadAt read_at : {ReadAt::kAll, ReadAt::kSubject, ReadAt::kEndOfText}) {
    EXPECT_EQ(read_at_from_string(to_string(read_at)), read_at);
    EXPECT_NO_THROW(edit_method("uce").check(read_at));
  }
  EXPECT_THROW(edit_method("nope"), Error);
  EXPECT_THROW(read_at_from_string("nope"), Error);
}

// Phrase and anchor share their first word: it is paired once, as part of the phrase.
TEST(EditMethod, UcePairsEveryTargetPositionOnce) {
  PromptPair pair;
  pair.target_ids = {1, 50, 7, 8, 60, 2};  // x "a church" y
  pair.anchor_ids = {1, 50, 7, 9, 60, 2};  // x "a field" y
  pair.target_phrase = {2, 4};
  pair.anchor_phrase = {2, 4};
  const TokenAlignment rows = edit_method("uce").rows(pair, ReadAt::kAll);
  std::set<int64_t> seen(rows.target.begin(), rows.target.end());
  EXPECT_EQ(seen.size(), rows.target.size());
  EXPECT_EQ(rows.target.size(), 77u);
  for (size_t k = 0; k < rows.target.size(); ++k) EXPECT_EQ(rows.target[k], rows.anchor[k]);
}

TEST(EditMethod, MaceNeverTouchesThePhrase) {
  PromptPair pair;
  pair.target_ids = {1, 50, 7, 8, 60, 2};
  pair.anchor_ids = {1, 50, 9, 60, 2};
  pair.target_phrase = {2, 4};
  pair.anchor_phrase = {2, 3};
  for (const ReadAt read_at : {ReadAt::kAll, ReadAt::kEndOfText}) {
    const TokenAlignment rows = edit_method("mace").rows(pair, read_at);
    for (int64_t position : rows.target) EXPECT_TRUE(position < 2 || position >= 4);
  }
  EXPECT_EQ(edit_method("mace").rows(pair, ReadAt::kEndOfText).target.front(), 5);
}

}  // namespace
}  // namespace lacuna
