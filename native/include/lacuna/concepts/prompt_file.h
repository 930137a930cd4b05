// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace lacuna {

// A file of prompts that someone else chose, e.g. a published set of attacks.
//
//   *.txt  UTF-8, one prompt a line; blank lines and lines that begin with '#' are skipped
//   *.csv  UTF-8, comma-separated with a first line of column names (RFC 4180: a cell with commas,
//          quotes or line breaks stands in quotes, a quote inside is doubled). Columns, by name:
//          prompt            needed; "adv_prompt" and "sensitive prompt" are read as well
//          concept           optional: which concept of the set it should not show
//          name              optional: what a detector is asked for; else the concept
//          Other columns are ignored.

struct FilePrompt {
  std::string text;
  std::string about;  // concept; empty: the only one of the set
  std::string name;   // for the detector; empty: the concept
  int64_t line = 0;   // where it begins, from 1
};

inline constexpr int64_t kLargestPromptFile = 16 << 20;  // bytes
inline constexpr int64_t kLongestPrompt = 4000;          // bytes

enum class PromptFileFormat { kLines, kCsv };

// name: for messages. Throws Error that says which line is wrong and why, or that there is no
// prompt.
std::vector<FilePrompt> parse_prompts(std::string_view bytes, PromptFileFormat format,
                                      const std::string& name);

// By the file's extension. Throws Error when it cannot be read, too.
std::vector<FilePrompt> load_prompts(const std::string& path);

}  // namespace lacuna
