// SPDX-License-Identifier: Apache-2.0
#include "lacuna/files/text.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>

namespace lacuna {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

bool is_space(char c) {
  return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f' || c == '\v';
}

bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

// Nobody sees these, and no script needs them: they come along when text is copied.
bool is_invisible(char32_t code) {
  if (code < 0x20 || code == 0x7f) return !is_space(static_cast<char>(code));  // controls
  return code == 0xad || code == 0x34f || code == 0x2800 || code == 0x3164 || code == 0x200b ||
         code == 0x200e || code == 0x200f || (code >= 0x202a && code <= 0x202e) ||
         (code >= 0x2060 && code <= 0x2069) || code == 0xfeff || code == 0x180e;
}

// Scripts and emoji join letters with these; between others they are invisible, too.
bool is_joiner(char32_t code) { return code == 0x200c || code == 0x200d; }

bool is_white_space(char32_t code) {
  if (code < 0x80) return is_space(static_cast<char>(code));
  const utf8proc_category_t category = utf8proc_category(static_cast<utf8proc_int32_t>(code));
  return code == 0x85 || category == UTF8PROC_CATEGORY_ZS || category == UTF8PROC_CATEGORY_ZL ||
         category == UTF8PROC_CATEGORY_ZP;
}

// What would break a line, or cannot be seen, as programs write it.
std::string escaped(std::string_view character, char32_t code) {
  if (code == '\n') return "\\n";
  if (code == '\r') return "\\r";
  if (code == '\t') return "\\t";
  const bool control = code < 0x20 || (code >= 0x7f && code < 0xa0);
  if (!control && code != 0x2028 && code != 0x2029 && !is_invisible(code)) {
    return std::string(character);
  }
  std::array<char, 16> text{};
  std::snprintf(text.data(), text.size(), "\\u%04x", static_cast<unsigned>(code));
  return text.data();
}

utf8proc_int32_t fold(utf8proc_int32_t code, void*) {
  std::array<utf8proc_int32_t, 4> folded{};
  int boundary = UTF8PROC_BOUNDCLASS_START;
  const utf8proc_ssize_t length =
      utf8proc_decompose_char(code, folded.data(), folded.size(), UTF8PROC_CASEFOLD, &boundary);
  // One for one only: encoders lower the case, but keep "ß" and "ss" apart.
  return length == 1 ? folded[0] : utf8proc_tolower(code);
}

// Whether so many marks stand on one character that ordering them takes minutes; no script does.
bool is_stacked(std::string_view text) {
  constexpr int kMostMarks = 100;
  int marks = 0;
  for (size_t i = 0; i < text.size();) {
    const Utf8Character character = first_character(text.substr(i));
    i += std::max<size_t>(character.bytes, 1);
    const bool mark =
        character.bytes > 1 &&
        utf8proc_get_property(static_cast<utf8proc_int32_t>(character.code))->combining_class != 0;
    marks = mark ? marks + 1 : 0;
    if (marks > kMostMarks) return true;
  }
  return false;
}

std::string composed(std::string_view text, utf8proc_custom_func custom) {
  if (is_stacked(text)) return std::string(text);
  utf8proc_uint8_t* out = nullptr;
  const utf8proc_ssize_t size = utf8proc_map_custom(
      reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
      static_cast<utf8proc_ssize_t>(text.size()), &out,
      static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE), custom, nullptr);
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(out, &std::free);
  if (size < 0) return std::string(text);
  return {reinterpret_cast<const char*>(out), static_cast<size_t>(size)};
}

}  // namespace

std::string normalize_phrase(std::string_view text) {
  std::string out;
  bool pending_space = false;
  std::string_view joiner;
  for (size_t i = 0; i < text.size();) {
    const Utf8Character character = first_character(text.substr(i));
    const std::string_view bytes = text.substr(i, std::max<size_t>(character.bytes, 1));
    i += bytes.size();
    if (character.bytes > 0) {
      if (is_white_space(character.code)) {
        pending_space = !out.empty();
        joiner = {};
        continue;
      }
      if (is_invisible(character.code)) continue;
      if (is_joiner(character.code)) {
        const bool after_letter =
            !out.empty() && !pending_space && static_cast<unsigned char>(out.back()) >= 0x80;
        joiner = after_letter ? bytes : std::string_view{};
        continue;
      }
    }
    if (pending_space) out += ' ';
    pending_space = false;
    if (bytes.size() > 1) out += joiner;
    joiner = {};
    out += bytes;
  }
  return is_ascii(out) ? out : composed(out, nullptr);
}

bool has_invisible(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const Utf8Character character = first_character(text.substr(i));
    if (character.bytes > 0 && is_invisible(character.code)) return true;
    i += std::max<size_t>(character.bytes, 1);
  }
  return false;
}

std::string fold_case(std::string_view text) {
  if (!is_ascii(text) && is_utf8(text)) return composed(text, &fold);
  std::string out(text);
  for (char& c : out) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return out;
}

bool names_phrase(std::string_view text, std::string_view phrase) {
  const auto is_letter = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') ||
           static_cast<unsigned char>(c) >= 0x80;
  };
  if (phrase.empty()) return false;
  for (size_t at = text.find(phrase); at != std::string_view::npos;
       at = text.find(phrase, at + 1)) {
    const size_t end = at + phrase.size();
    const bool starts = at == 0 || !is_letter(text[at - 1]);
    const size_t after = end < text.size() && text[end] == 's' ? end + 1 : end;
    if (starts && (after >= text.size() || !is_letter(text[after]))) return true;
  }
  return false;
}

std::vector<std::string> split_lines(std::string_view text) {
  std::vector<std::string> lines(1);
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\n' || text[i] == '\r') {
      if (text[i] == '\r' && i + 1 < text.size() && text[i + 1] == '\n') ++i;
      lines.emplace_back();
    } else {
      lines.back() += text[i];
    }
  }
  return lines;
}

std::pair<std::string_view, std::string_view> split_comment(std::string_view line) {
  for (size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '#' && (i == 0 || is_space(line[i - 1]))) {
      return {line.substr(0, i), line.substr(i + 1)};
    }
  }
  return {line, {}};
}

std::string format_numbers(const char* pattern, double a, double b) {
  char text[200];
  std::snprintf(text, sizeof text, pattern, a, b);
  return text;
}

Utf8Character first_character(std::string_view text) {
  if (text.empty()) return {0, 0};
  if (static_cast<unsigned char>(text[0]) < 0x80) return {1, static_cast<char32_t>(text[0])};
  utf8proc_int32_t code = 0;
  const auto size = static_cast<utf8proc_ssize_t>(std::min<size_t>(text.size(), 4));
  const utf8proc_ssize_t bytes =
      utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), size, &code);
  if (bytes <= 0) return {0, 0};
  return {static_cast<size_t>(bytes), static_cast<char32_t>(code)};
}

bool is_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const size_t bytes = first_character(text.substr(i)).bytes;
    if (bytes == 0) return false;
    i += bytes;
  }
  return true;
}

size_t count_characters(std::string_view text) {
  size_t count = 0;
  for (; !text.empty(); ++count) {
    text.remove_prefix(std::max<size_t>(first_character(text).bytes, 1));
  }
  return count;
}

std::string readable(std::string_view text, size_t most_characters) {
  std::string out;
  const auto append = [&out](std::string_view part) {
    while (!part.empty()) {
      const auto [bytes, code] = first_character(part);
      if (bytes == 0) {
        out += kReplacement;
      } else if ((code < 0x20 && code != '\n') || (code >= 0x7f && code < 0xa0)) {
        out += ' ';
      } else {
        out += part.substr(0, bytes);
      }
      part.remove_prefix(std::max<size_t>(bytes, 1));
    }
  };
  if (count_characters(text) <= most_characters) {
    append(text);
    return out;
  }
  // The end of a sentence says what to do.
  const auto beginning = [&](size_t characters) {
    size_t end = 0;
    for (; characters > 0; --characters) {
      end += std::max<size_t>(first_character(text.substr(end)).bytes, 1);
    }
    return end;
  };
  const size_t all = count_characters(text), tail = most_characters / 3;
  append(text.substr(0, beginning(most_characters - tail)));
  out += " ... ";
  append(text.substr(beginning(all - tail)));
  return out;
}

std::string in_quotes(std::string_view phrase, size_t most_characters) {
  size_t end = 0;
  for (size_t i = 0; i < most_characters && end < phrase.size(); ++i) {
    end += std::max<size_t>(first_character(phrase.substr(end)).bytes, 1);
  }
  std::string shown;
  for (std::string_view rest = phrase.substr(0, end); !rest.empty();) {
    const auto [bytes, code] = first_character(rest);
    const std::string_view character = rest.substr(0, std::max<size_t>(bytes, 1));
    shown += bytes > 0 ? escaped(character, code) : std::string(kReplacement);
    rest.remove_prefix(character.size());
  }
  return "'" + shown + (end < phrase.size() ? "...'" : "'");
}

}  // namespace lacuna
