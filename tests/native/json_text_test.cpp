// SPDX-License-Identifier: Apache-2.0
#include "lacuna/files/json_text.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "lacuna/concepts/concept_set.h"
#include "lacuna/files/safetensors_file.h"
#include "lacuna/files/text.h"
#include "support/message_of.h"
#include "support/worst_json.h"

namespace lacuna {
namespace {

using nlohmann::json;
using testing::cost_of;
using testing::message_of;

constexpr JsonLimits kLimits{.depth = 4, .values = 10};

json parse(std::string_view text, const JsonLimits& limits = kLimits) {
  return parse_json(text, "the list", limits);
}

TEST(JsonText, ReadsWhatJsonIs) {
  const std::string text =
      R"({"a": [1, -2, 0.5, true, null], "b": {"c": "é\n\u4e2d"}, "": 18446744073709551615})";
  EXPECT_EQ(parse(text), json::parse(text));
  EXPECT_EQ(parse("\xEF\xBB\xBF[]"), json::array());
  EXPECT_EQ(parse(" 7 "), 7);
  EXPECT_EQ(parse(R"({"a": 1, "a": {"b": 2}, "a": 3})"), json({{"a", 3}}));  // the last counts
  const auto ordered = parse_ordered_json(R"({"b": 1, "a": 2, "b": 3})", "x", kLimits);
  EXPECT_EQ(ordered.dump(), R"({"b":3,"a":2})");
}

TEST(JsonText, LimitsAreExact) {
  EXPECT_EQ(parse("[[[[]]]]").size(), 1u);
  EXPECT_EQ(message_of([] { parse("[[[[[]]]]]"); }), "the list is nested too deeply");
  EXPECT_EQ(parse("[1,2,3,4,5,6,7,8,9]").size(), 9u);
  EXPECT_EQ(message_of([] { parse("[1,2,3,4,5,6,7,8,9,0]"); }), "the list has more than 10 values");
}

TEST(JsonText, ErrorsSayWhereInWordsThatCanBeShown) {
  const auto expect = [](const std::string& text, const std::string& expected) {
    const std::string message = message_of([&] { parse(text); });
    EXPECT_NE(message.find(expected), std::string::npos) << text << " -> '" << message << "'";
    EXPECT_TRUE(is_utf8(message)) << text;
    EXPECT_LE(message.size(), 200u) << text;
  };
  expect("", "line 1, column 1 is where it breaks off");
  expect("[1,", "breaks off");
  expect("[1,\n中 x]", "line 2, column 1 does not go on as JSON does, at '中 x]'");
  expect("[中", "at '中'");
  expect("{“format”: 1}", "column 2 has the quote “; JSON needs straight double ones");
  expect("{'a': 1}", "the quote '");
  expect("[1e999]", "a number that is too large");
  expect("[\"\xff\"]", "not text in UTF-8");
  expect("[\"\\ud800\"]", "line 1, column");
  expect("[" + std::string(100'000, 'x'), "...'");
  expect("[\"" + std::string(100'000, 'x'), "breaks off");
}

TEST(JsonText, MembersComeOneByOne) {
  std::vector<std::string> seen;
  const auto read = [&](const std::string& text) {
    seen.clear();
    parse_json_members(text, "the header", kLimits,
                       [&](const std::string& name, const json& value) {
                         seen.push_back(name + "=" + value.dump());
                       });
  };
  read(R"({"b": {"c": [1, 2]}, "a": 5, "b": [], "d": {"b": {}}})");
  EXPECT_EQ(seen, (std::vector<std::string>{R"(b={"c":[1,2]})", "a=5", "b=[]", R"(d={"b":{}})"}));
  read("{}");
  EXPECT_TRUE(seen.empty());
  for (const char* other : {"[]", "1", "\"a\"", "[{\"a\": 1}]"}) {
    EXPECT_EQ(message_of([&] { read(other); }), "the header is not an object") << other;
  }
  std::string many = "{\"a\":1";
  for (int i = 0; i < 100; ++i) many += ",\"a\":[1,2,3]";  // values are counted for each
  read(many + "}");
  EXPECT_EQ(seen.size(), 101u);
}

const std::map<std::string, std::string>& worst() {
  static const auto all = testing::worst_json(4u << 20);
  return all;
}

// The bar is half a second and 100 MB for 4 MiB; twice the time here, for busy machines.
TEST(JsonText, TheWorstIsCheap) {
  for (const auto& [name, text] : worst()) {
    std::string message;
    const auto cost = cost_of([&, &text = text] {
      message = message_of([&] { parse(text, {.depth = 8, .values = 420'000}); });
    });
    EXPECT_LE(cost.megabytes, 100) << name;
#ifdef NDEBUG  // sanitizers and coverage cost several times more
    EXPECT_LE(cost.seconds, 1.0) << name;
#endif
    EXPECT_LE(message.size(), 200u) << name;
    if (std::getenv("LACUNA_COSTS") != nullptr) {
      std::printf("%-22s %5.2f s %5.0f MB  %s\n", name.c_str(), cost.seconds, cost.megabytes,
                  message.c_str());
    }
  }
}

// Whatever reads JSON has its limits.
TEST(JsonText, EveryReaderIsCheap) {
  const auto folder = std::filesystem::temp_directory_path() / "lacuna_worst_json";
  std::filesystem::create_directories(folder);
  const std::string path = (folder / "file.safetensors").string();
  for (const char* kind : {"lists", "objects of one parent", "short keys"}) {
    const std::string& text = worst().at(kind);
    const uint64_t size = text.size();
    std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(&size), 8) << text;
    for (const auto& read : std::vector<std::function<void()>>{[&] { concept_set_from_json(text); },
                                                               [&] { load_safetensors(path); }}) {
      std::string message;
      const auto cost = cost_of([&] { message = message_of(read); });
      EXPECT_NE(message, "") << kind;
      EXPECT_LE(cost.megabytes, 100) << kind;
#ifdef NDEBUG
      EXPECT_LE(cost.seconds, 1.0) << kind;
#endif
    }
  }
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace lacuna
