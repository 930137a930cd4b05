// SPDX-License-Identifier: Apache-2.0
#include "lacuna/concepts/prompt_file.h"

#include <gtest/gtest.h>

#include <fstream>
#include <random>

#include "lacuna/error.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::message_of;

std::vector<FilePrompt> csv(const std::string& bytes) {
  return parse_prompts(bytes, PromptFileFormat::kCsv, "p.csv");
}
std::vector<FilePrompt> lines(const std::string& bytes) {
  return parse_prompts(bytes, PromptFileFormat::kLines, "p.txt");
}

TEST(PromptFile, LinesAreOnePromptEach) {
  const auto prompts =
      lines("\xef\xbb\xbf# a set\r\n a  dog, (sleeping) \r\n\r\nchien d'\xc3\xa9t\xc3\xa9");
  ASSERT_EQ(prompts.size(), 2u);
  EXPECT_EQ(prompts[0].text, "a dog, (sleeping)");
  EXPECT_EQ(prompts[0].line, 2);
  EXPECT_EQ(prompts[1].text, "chien d'\xc3\xa9t\xc3\xa9");
  EXPECT_EQ(prompts[1].line, 4);
  EXPECT_EQ(prompts[1].about, "");
}

TEST(PromptFile, CsvHasNamedColumns) {
  const auto prompts =
      csv("case,Concept,prompt,seed,name\r\n"
          "1,dog,\"a dog, \"\"asleep\"\"\nin the sun\",7,puppy\r\n"
          "\r\n"
          "2,,wolf,8,\n");
  ASSERT_EQ(prompts.size(), 2u);
  EXPECT_EQ(prompts[0].text, "a dog, \"asleep\" in the sun");
  EXPECT_EQ(prompts[0].about, "dog");
  EXPECT_EQ(prompts[0].name, "puppy");
  EXPECT_EQ(prompts[0].line, 2);
  EXPECT_EQ(prompts[1].text, "wolf");
  EXPECT_EQ(prompts[1].line, 5);
  EXPECT_EQ(csv("adv_prompt\nx\n").at(0).text, "x");
  EXPECT_EQ(csv("id,sensitive prompt\n1,x").at(0).text, "x");
}

TEST(PromptFile, SaysWhatIsWrongAndWhere) {
  const auto expect = [](const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  expect(message_of([] { lines(""); }), "p.txt holds no prompt");
  expect(message_of([] { lines("# nothing\n\n"); }), "holds no prompt");
  expect(message_of([] { csv("prompt\n"); }), "holds no prompt");
  expect(message_of([] { csv(""); }), "no column 'prompt'");
  expect(message_of([] { csv("a dog\na cat\n"); }), "no column 'prompt'");
  expect(message_of([] { lines("a\nna\xefve\n"); }), "line 2, is not in UTF-8");
  expect(message_of([] {
           lines(
               "\xff\xfe"
               "a");
         }),
         "UTF-16");
  expect(message_of([] { lines(std::string("a\0b", 3)); }), "not a text file");
  expect(message_of([] { csv("prompt,x\na\n"); }), "line 2, has 1 cells");
  expect(message_of([] { csv("prompt\n\"a\n\nb"); }), "line 2, opens a quote");
  expect(message_of([] { csv("prompt\n\"a\"b\n"); }), "line 2, goes on after a closing quote");
  expect(message_of([] { csv("prompt,x\n\"\",1\n"); }), "line 2, has an empty prompt");
  expect(message_of([] { lines("ok\n" + std::string(4001, 'a')); }),
         "line 2, has a prompt of 4001");
  expect(message_of([] { lines(std::string(static_cast<size_t>(kLargestPromptFile) + 1, 'a')); }),
         "16 MB is the limit");
}

TEST(PromptFile, IsReadByItsExtension) {
  const testing::TemporaryFolder folder;
  const auto write = [&](const std::string& name, const std::string& bytes) {
    std::ofstream(folder.path(name), std::ios::binary) << bytes;
    return folder.path(name);
  };
  EXPECT_EQ(load_prompts(write("a.TXT", "prompt\nx")).size(), 2u);
  EXPECT_EQ(load_prompts(write("a.csv", "prompt\nx")).size(), 1u);
  EXPECT_NE(message_of([&] { load_prompts(write("a.json", "[]")); }).find("a .txt or a .csv"),
            std::string::npos);
  EXPECT_NE(message_of([&] { load_prompts(folder.path("none.txt")); }).find("there is no"),
            std::string::npos);
}

// Damaged files: an error or prompts, never a crash or a hang.
TEST(PromptFile, SurvivesMutations) {
  const std::string whole = "prompt,concept,name\n\"a dog, \"\"x\"\"\",dog,puppy\nwolf,dog,\n";
  std::mt19937 random(5);
  for (int i = 0; i < 5000; ++i) {
    std::string bytes = whole;
    for (int k = 0; k < 3; ++k) {
      const size_t at = random() % bytes.size();
      const char other = "\",\n\r\0\xc3\xff"[random() % 7];
      switch (random() % 3) {
        case 0:
          bytes[at] = other;
          break;
        case 1:
          bytes.insert(at, 1, other);
          break;
        default:
          bytes.erase(at, 1 + random() % 4);
      }
      if (bytes.empty()) bytes = "x";
    }
    for (const PromptFileFormat format : {PromptFileFormat::kCsv, PromptFileFormat::kLines}) {
      try {
        EXPECT_FALSE(parse_prompts(bytes, format, "p").empty());
      } catch (const Error& e) {
        EXPECT_NE(std::string(e.what()), "");
      }
    }
  }
}

}  // namespace
}  // namespace lacuna
