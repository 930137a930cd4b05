// SPDX-License-Identifier: Apache-2.0
#include "lacuna/concepts/prompt_file.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <system_error>
#include <utility>

#include "lacuna/error.h"
#include "lacuna/files/file_path.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;

// Length of the UTF-8 sequence at the front; 0: none.
size_t sequence_length(std::string_view bytes) {
  const auto at = [&](size_t i) { return static_cast<unsigned char>(bytes[i]); };
  const unsigned char first = at(0);
  const size_t length = first < 0x80                    ? 1
                        : first >= 0xc2 && first < 0xe0 ? 2
                        : first >= 0xe0 && first < 0xf0 ? 3
                        : first >= 0xf0 && first < 0xf5 ? 4
                                                        : 0;
  if (length == 0 || bytes.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((at(i) & 0xc0) != 0x80) return 0;
  }
  const bool overlong = (first == 0xe0 && at(1) < 0xa0) || (first == 0xf0 && at(1) < 0x90);
  const bool surrogate = first == 0xed && at(1) >= 0xa0;
  return overlong || surrogate || (first == 0xf4 && at(1) >= 0x90) ? 0 : length;
}

class Parser {
 public:
  Parser(std::string_view bytes, std::string name) : bytes_(bytes), name_(std::move(name)) {
    if (static_cast<int64_t>(bytes.size()) > kLargestPromptFile) {
      throw Error("the prompt file " + name_ + " has " + std::to_string(bytes.size() >> 20) +
                  " MB, and " + std::to_string(kLargestPromptFile >> 20) +
                  " MB is the limit; split it");
    }
    if (bytes_.starts_with("\xff\xfe") || bytes_.starts_with("\xfe\xff")) {
      throw Error("the prompt file " + name_ +
                  " is in UTF-16; save it as UTF-8 in your text editor or spreadsheet");
    }
    if (bytes_.starts_with("\xef\xbb\xbf")) bytes_.remove_prefix(3);
    check_encoding();
  }

  std::vector<FilePrompt> lines() {
    std::vector<FilePrompt> prompts;
    int64_t number = 0;
    for (const std::string& line : split_lines(bytes_)) {
      ++number;
      std::string text = normalize_phrase(line);
      if (text.empty() || text.front() == '#') continue;
      prompts.push_back({std::move(text), "", "", number});
    }
    return checked(std::move(prompts));
  }

  std::vector<FilePrompt> csv() {
    const std::vector<std::string> head = row();
    const auto column = [&](std::initializer_list<std::string_view> names) {
      for (const std::string_view wanted : names) {
        for (size_t i = 0; i < head.size(); ++i) {
          if (fold_case(normalize_phrase(head[i])) == wanted) return std::optional<size_t>(i);
        }
      }
      return std::optional<size_t>();
    };
    const auto prompt = column({"prompt", "adv_prompt", "sensitive prompt"});
    if (!prompt) {
      throw Error("the prompt file " + name_ +
                  " has no column 'prompt'; its first line must name the columns");
    }
    const auto about = column({"concept"});
    const auto name = column({"name"});
    std::vector<FilePrompt> prompts;
    while (!at_end()) {
      const int64_t line = line_;
      const std::vector<std::string> cells = row();
      if (cells.size() == 1 && cells[0].empty()) continue;
      if (cells.size() != head.size()) {
        throw Error(where(line) + " has " + std::to_string(cells.size()) +
                    " cells, and the first line names " + std::to_string(head.size()) +
                    " columns; put prompts that hold commas in quotes");
      }
      const auto cell = [&](const std::optional<size_t>& index) {
        return index ? normalize_phrase(cells[*index]) : std::string();
      };
      prompts.push_back({cell(prompt), cell(about), cell(name), line});
    }
    return checked(std::move(prompts));
  }

 private:
  std::string where(int64_t line) const {
    return "the prompt file " + name_ + ", line " + std::to_string(line) + ",";
  }

  void check_encoding() const {
    int64_t line = 1;
    for (size_t i = 0; i < bytes_.size();) {
      const size_t length = sequence_length(bytes_.substr(i));
      if (length == 0) {
        throw Error(where(line) + " is not in UTF-8; save the file as UTF-8 in your text editor");
      }
      if (bytes_[i] == '\0') throw Error("the prompt file " + name_ + " is not a text file");
      line += bytes_[i] == '\n';
      i += length;
    }
  }

  bool at_end() const { return position_ >= bytes_.size(); }

  // The cells of one record.
  std::vector<std::string> row() {
    const int64_t begin = line_;
    std::vector<std::string> cells(1);
    bool quoted = false, closed = false;  // inside quotes; after the closing quote of a cell
    for (; !at_end(); ++position_) {
      const char c = bytes_[position_];
      if (quoted) {
        line_ += c == '\n';
        if (c != '"') {
          cells.back() += c;
        } else if (position_ + 1 < bytes_.size() && bytes_[position_ + 1] == '"') {
          cells.back() += bytes_[++position_];
        } else {
          quoted = false;
          closed = true;
        }
      } else if (c == ',') {
        cells.emplace_back();
        closed = false;
      } else if (c == '\n' || c == '\r') {
        if (c == '\r' && position_ + 1 < bytes_.size() && bytes_[position_ + 1] == '\n') {
          ++position_;
        }
        ++position_;
        ++line_;
        return cells;
      } else if (c == '"' && cells.back().empty() && !closed) {
        quoted = true;
      } else if (closed) {
        throw Error(where(begin) +
                    " goes on after a closing quote; double the quotes inside a cell");
      } else {
        cells.back() += c;
      }
    }
    if (quoted) throw Error(where(begin) + " opens a quote that is never closed");
    return cells;
  }

  std::vector<FilePrompt> checked(std::vector<FilePrompt> prompts) const {
    for (const FilePrompt& prompt : prompts) {
      if (prompt.text.empty()) throw Error(where(prompt.line) + " has an empty prompt");
      const auto characters = static_cast<int64_t>(count_characters(prompt.text));
      if (characters > kLongestPrompt) {
        throw Error(where(prompt.line) + " has a prompt of " + std::to_string(characters) +
                    " characters, and " + std::to_string(kLongestPrompt) +
                    " is the limit; is it one prompt a line?");
      }
    }
    if (prompts.empty()) throw Error("the prompt file " + name_ + " holds no prompt");
    return prompts;
  }

  std::string_view bytes_;
  std::string name_;
  size_t position_ = 0;
  int64_t line_ = 1;
};

}  // namespace

std::vector<FilePrompt> parse_prompts(std::string_view bytes, PromptFileFormat format,
                                      const std::string& name) {
  Parser parser(bytes, name);
  return format == PromptFileFormat::kCsv ? parser.csv() : parser.lines();
}

std::vector<FilePrompt> load_prompts(const std::string& path) {
  check_path(path);
  const std::string name = fs::path(path).filename().string();
  const std::string extension = fold_case(fs::path(path).extension().string());
  if (extension != ".txt" && extension != ".csv") {
    throw Error("the prompt file " + name + " must be a .txt or a .csv file");
  }
  std::error_code error;
  if (!fs::is_regular_file(path, error)) throw Error("there is no prompt file " + path);
  const auto size = fs::file_size(path, error);
  if (!error && static_cast<int64_t>(size) > kLargestPromptFile) {
    throw Error("the prompt file " + name + " has " + std::to_string(size >> 20) + " MB, and " +
                std::to_string(kLargestPromptFile >> 20) + " MB is the limit; split it");
  }
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file.good() && !file.eof()) throw Error("the prompt file " + name + " cannot be read");
  return parse_prompts(
      bytes, extension == ".csv" ? PromptFileFormat::kCsv : PromptFileFormat::kLines, name);
}

}  // namespace lacuna
