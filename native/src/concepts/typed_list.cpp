// SPDX-License-Identifier: Apache-2.0
#include "lacuna/concepts/typed_list.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <nlohmann/json.hpp>

#include "lacuna/error.h"
#include "lacuna/files/json_text.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

constexpr size_t kMaxListBytes = 4u << 20;
constexpr size_t kMostLines = 10'000;
constexpr size_t kMostNotes = 5;   // doubts told, and lines named for each
constexpr size_t kMostKinds = 12;  // of what was understood

constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";
constexpr std::array<std::string_view, 7> kLooseBullets{"-", "*", "+", "–", "—", ">", "−"};
constexpr std::array<std::string_view, 30> kBullets{"•",  "‣",           "◦", "▪", "▫",  "●", "○",
                                                    "■",  "□",           "∙", "⁃", "►",  "▸", "▶",
                                                    "➤",  "➢",           "✓", "✔", "✅", "☐", "☑",
                                                    "・", "·",           "◆", "◇", "❖",  "⦁", "🔹",
                                                    "🔸", "\xEF\x82\xB7"};  // the last: Word's
constexpr std::array<std::string_view, 5> kSeparators{",", ";", "，", "、", "；"};
constexpr std::array<std::string_view, 3> kCommas{",", "，", "、"};
constexpr std::array<std::pair<std::string_view, std::string_view>, 20> kQuotes{{
    {"\"", "\""}, {"'", "'"},   {"“", "”"},   {"“", "“"}, {"”", "”"},   {"„", "“"}, {"„", "”"},
    {"‘", "’"},   {"’", "’"},   {"‚", "‘"},   {"«", "»"}, {"»", "«"},   {"‹", "›"}, {"「", "」"},
    {"『", "』"}, {"＂", "＂"}, {"＇", "＇"}, {"`", "`"}, {"**", "**"}, {"*", "*"},
}};
// Strokes and heads of arrows that are typed.
constexpr std::array<std::string_view, 12> kStrokes{"-", "=", "–", "—", "−",  "―",
                                                    "─", "━", "‐", "~", "－", "＝"};
constexpr std::array<std::string_view, 8> kHeads{">", "＞", "›", "»", "❯", "▶", "►", "▸"};
// What web pages write for characters, besides numbers.
constexpr std::array<std::pair<std::string_view, std::string_view>, 16> kEntities{{
    {"amp", "&"},
    {"quot", "\""},
    {"apos", "'"},
    {"lt", "<"},
    {"gt", ">"},
    {"nbsp", " "},
    {"rarr", "→"},
    {"ndash", "–"},
    {"mdash", "—"},
    {"lsquo", "‘"},
    {"rsquo", "’"},
    {"ldquo", "“"},
    {"rdquo", "”"},
    {"laquo", "«"},
    {"raquo", "»"},
    {"bull", "•"},
}};

template <size_t N>
std::string_view prefix_in(std::string_view text, const std::array<std::string_view, N>& prefixes) {
  for (const std::string_view prefix : prefixes) {
    if (text.starts_with(prefix)) return prefix;
  }
  return {};
}

std::string_view trimmed(std::string_view text) {
  while (text.starts_with(' ')) text.remove_prefix(1);
  while (text.ends_with(' ')) text.remove_suffix(1);
  return text;
}

bool is_right_arrow(char32_t c) {
  return c == 0x2192 || c == 0x21a6 || c == 0x21d2 || c == 0x21e2 || c == 0x21e8 || c == 0x2794 ||
         c == 0x219d || c == 0x21a0 || c == 0x21a3 || c == 0x21aa || c == 0x21c9 || c == 0x21db ||
         c == 0x21dd || c == 0x21fe || (c >= 0x2799 && c <= 0x27af) ||
         (c >= 0x27b1 && c <= 0x27be) || c == 0x2964 || c == 0x1f449 || c == 0x1f812 ||
         c == 0x1f816 || c == 0x1f81a || c == 0x27f6 || c == 0x27f9 || c == 0x27fc || c == 0x27fe ||
         c == 0x2b62 || c == 0x2b95 || c == 0xffeb || c == 0x1f852 || c == 0x1f87a;
}

bool is_other_arrow(char32_t c) {
  return c == 0x2190 || c == 0x2194 || c == 0x21d0 || c == 0x21d4 || c == 0x27f5 || c == 0x27f7 ||
         c == 0x27f8 || c == 0x27fa || c == 0xffe9;
}

// ①, ⑴, ⒈, ❶ and the like, and the bytes of a keycap, 1️⃣: they can only count lines.
size_t counting_sign(std::string_view text) {
  const auto [bytes, code] = first_character(text);
  if ((code >= 0x2460 && code <= 0x24b5) || (code >= 0x24ea && code <= 0x24ff) ||
      (code >= 0x2776 && code <= 0x2793) || (code >= 0x3251 && code <= 0x325f) ||
      (code >= 0x32b1 && code <= 0x32bf) || code == 0x1f51f) {
    return bytes;
  }
  if (code < '0' || code > '9') return 0;
  for (const std::string_view keycap : {"\xEF\xB8\x8F\xE2\x83\xA3", "\xE2\x83\xA3"}) {
    if (text.substr(1).starts_with(keycap)) return 1 + keycap.size();
  }
  return 0;
}

// A ruled line, "---" or "=====".
bool is_ruled(std::string_view text) {
  const size_t size = first_character(text).bytes;
  const std::string_view mark = text.substr(0, size);
  if (prefix_in(mark, std::array<std::string_view, 7>{"-", "=", "*", "_", "—", "–", "─"}).empty()) {
    return false;
  }
  size_t count = 0;
  for (; text.starts_with(mark); ++count) text.remove_prefix(size);
  return count >= 3 && text.empty();
}

bool is_fence(std::string_view line) {
  return (line.starts_with("```") || line.starts_with("~~~")) && line.size() <= 30 &&
         line.find_first_of(" `~", 3) == std::string_view::npos;
}

// "[ ] owl", with or without a dash before it.
std::string_view check_box(std::string_view text) {
  return prefix_in(text, std::array<std::string_view, 3>{"[ ] ", "[x] ", "[X] "});
}

// Without one bullet, number in a circle or check box; `text` itself where it has none, or nothing
// else.
std::string_view without_one_bullet(std::string_view text) {
  std::string_view rest = text;
  if (const std::string_view mark = prefix_in(text, kBullets); !mark.empty()) {
    rest.remove_prefix(mark.size());
    // "As emoji" or "as text", as telephones write behind them.
    for (const std::string_view style : {"\xEF\xB8\x8F", "\xEF\xB8\x8E"}) {
      if (rest.starts_with(style)) rest.remove_prefix(style.size());
    }
  } else if (const size_t sign = counting_sign(text);
             sign > 0 && counting_sign(text.substr(sign)) == 0) {
    rest.remove_prefix(sign);
  } else if (const std::string_view dash = prefix_in(text, kLooseBullets);
             !dash.empty() && text.substr(dash.size()).starts_with(' ')) {
    rest.remove_prefix(dash.size() + 1);
  } else {
    rest.remove_prefix(check_box(text).size());
  }
  rest = trimmed(rest);
  return rest.empty() ? text : rest;
}

// "- • owl", "- [ ] owl"
std::string_view without_bullet(std::string_view text) {
  for (std::string_view rest = without_one_bullet(text); rest.size() < text.size();
       rest = without_one_bullet(text)) {
    text = rest;
  }
  return text;
}

// The number before a line, as in "1. owl" or "2) owl" or "(3) owl", and its bytes.
struct LineNumber {
  int value = 0;
  size_t bytes = 0;
  bool spaced = false;
};
std::optional<LineNumber> line_number(std::string_view text) {
  const std::string_view bracket = prefix_in(text, std::array<std::string_view, 2>{"(", "（"});
  size_t at = bracket.size();
  LineNumber number;
  int digits = 0;
  for (; digits < 5; ++digits) {
    auto [bytes, code] = first_character(text.substr(at));
    if (code >= 0xff10 && code <= 0xff19) code = code - 0xff10 + '0';  // full-width
    if (bytes == 0 || code < '0' || code > '9') break;
    number.value = 10 * number.value + static_cast<int>(code - '0');
    at += bytes;
  }
  if (digits == 0) return std::nullopt;
  const std::string_view mark =
      bracket.empty() ? prefix_in(text.substr(at),
                                  std::array<std::string_view, 6>{".)", ".", ")", "．", "）", "、"})
                      : prefix_in(text.substr(at), std::array<std::string_view, 2>{")", "）"});
  if (mark.empty()) return std::nullopt;
  at += mark.size();
  number.spaced = text.substr(at).starts_with(' ');
  const std::string_view rest = trimmed(text.substr(at));
  // "3.5 mm" is not the third line.
  if (rest.empty() || (!number.spaced && rest[0] >= '0' && rest[0] <= '9')) return std::nullopt;
  number.bytes = text.size() - rest.size();
  return number;
}

// Whether a tab stands between words, and not behind a bullet or the number of a line.
bool has_columns(std::string_view line) {
  const size_t begin = line.find_first_not_of(" \t");
  const size_t end = line.find_last_not_of(" \t\r");
  if (begin == std::string_view::npos) return false;
  size_t tab = line.find('\t', begin);
  if (tab == std::string_view::npos) return false;
  const std::string head = normalize_phrase(line.substr(begin, tab - begin));
  const bool bullet = prefix_in(head, kBullets) == head || prefix_in(head, kLooseBullets) == head;
  const auto number = line_number(head + " x");
  const bool counted = (number && number->bytes == head.size() + 1) ||
                       head.find_first_not_of("0123456789") == std::string::npos;
  if (bullet || counted) tab = line.find('\t', line.find_first_not_of(" \t", tab));
  return tab < end;
}

// The index-th mark of a way to count: 1 2 3, a b c, i ii iii; empty behind the last one.
std::string counting_mark(size_t way, size_t index) {
  constexpr std::array<std::string_view, 20> kRoman{
      "i",  "ii",  "iii",  "iv",  "v",  "vi",  "vii",  "viii",  "ix",  "x",
      "xi", "xii", "xiii", "xiv", "xv", "xvi", "xvii", "xviii", "xix", "xx"};
  if (way == 0) return std::to_string(index + 1);
  if (way == 1) return index < 26 ? std::string(1, static_cast<char>('a' + index)) : "";
  return index < kRoman.size() ? std::string(kRoman[index]) : "";
}

// The bytes of a mark before a line's words, or 0: in "1 -> one" the number is the concept.
size_t mark_bytes(std::string_view line, std::string_view open, const std::string& mark,
                  std::string_view close) {
  const std::string whole = std::string(open) + mark + std::string(close) + " ";
  if (mark.empty() || !fold_case(line.substr(0, whole.size())).starts_with(whole)) return 0;
  const std::string_view rest = line.substr(whole.size());
  const auto [bytes, code] = first_character(rest);
  const bool words = rest.starts_with('"') || has_words(rest.substr(0, bytes));
  return bytes > 0 && words && !is_right_arrow(code) ? whole.size() : 0;
}

// Marks that count every line of a list from its first on, other than "1." and "1)".
bool take_marks(std::vector<TypedLine>& lines, ReadingNotes& notes) {
  constexpr std::array<std::pair<std::string_view, std::string_view>, 8> kAround{
      {{"", "."}, {"", ")"}, {"(", ")"}, {"[", "]"}, {"", ":"}, {"", " -"}, {"", " –"}, {"", ""}}};
  if (lines.size() < 2) return false;
  for (size_t way = 0; way < 3; ++way) {
    for (const auto& [open, close] : kAround) {
      if (way > 0 && open.empty() && close != "." && close != ")") continue;  // "a owl"
      std::vector<size_t> marks;
      for (const TypedLine& line : lines) {
        marks.push_back(mark_bytes(line.text, open, counting_mark(way, marks.size()), close));
        if (marks.back() == 0) break;
      }
      if (marks.back() == 0) continue;
      // Few lines may count what they name, or begin with initials: "1 girl" and "2 boys", "A.
      // Warhol", "B. Ross" and "C. Monet".
      constexpr size_t kSurelyCounted = 4;
      const bool loose = close.empty() || (way > 0 && close == "." && open.empty());
      if (loose && lines.size() < kSurelyCounted) continue;
      for (size_t i = 0; i < lines.size(); ++i) {
        lines[i].text = std::string(trimmed(std::string_view(lines[i].text).substr(marks[i])));
        notes.understood(lines[i].number, "numbers of lines left out");
      }
      return true;
    }
  }
  return false;
}

// "1 owl", "a) owl", "a. owl": a name, or the first line of a list.
bool may_be_counted(std::string_view text) {
  const bool letter = !text.empty() && ((text[0] >= 'a' && text[0] <= 'z') || text[0] == 'A');
  return mark_bytes(text, "", "1", "") > 0 || text.starts_with("a. ") ||
         (letter && text.substr(1).starts_with(") "));
}

// Only a list whose lines all count: "1. FC Union" alone is a name.
void take_numbers(std::vector<TypedLine>& lines, ReadingNotes& notes) {
  std::vector<LineNumber> numbers;
  for (const TypedLine& line : lines) {
    const auto number = line_number(line.text);
    if (number) numbers.push_back(*number);
  }
  bool counts = lines.size() >= 2 && numbers.size() == lines.size();
  bool ones = counts && lines.size() > 2;  // "1. FC Köln" and "1. FC Nürnberg" are names
  for (size_t i = 0; i < numbers.size(); ++i) {
    counts = counts && (i == 0 || numbers[i].value == numbers[i - 1].value + 1);
    ones = ones && numbers[i].value == 1;  // as Markdown allows
  }
  if (!counts && !ones && take_marks(lines, notes)) return;
  for (size_t i = 0; i < lines.size(); ++i) {
    const auto number = line_number(lines[i].text);
    if (counts || ones) {
      lines[i].text.erase(0, numbers[i].bytes);
      notes.understood(lines[i].number, "numbers of lines left out");
    } else if ((number && number->spaced) || may_be_counted(lines[i].text)) {
      notes.doubt(lines[i].number,
                  in_quotes(lines[i].text) +
                      " is read with its number; delete the number if it only counts the lines");
    }
  }
}

bool is_number(std::string_view text) {
  if (text.starts_with('-') || text.starts_with('+')) text.remove_prefix(1);
  const size_t digits = text.find_first_not_of("0123456789");
  if (digits == std::string_view::npos) return !text.empty();
  return text[digits] == '.' && digits + 1 < text.size() &&
         text.find_first_not_of("0123456789", digits + 1) == std::string_view::npos;
}

bool is_word(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
  });
}

// What an innermost pair of brackets holds, judged by `syntax`; the whole pair, or empty. Linear:
// lists are pasted by the megabyte.
template <typename Syntax>
std::string_view bracketed(std::string_view text, std::string_view brackets, Syntax syntax) {
  size_t open = std::string_view::npos;
  for (size_t i = text.find_first_of(brackets); i != std::string_view::npos;
       i = text.find_first_of(brackets, i + 1)) {
    if (text[i] == brackets[0]) {
      open = i;
    } else if (open != std::string_view::npos) {
      if (syntax(text.substr(open + 1, i - open - 1))) return text.substr(open, i + 1 - open);
      open = std::string_view::npos;
    }
  }
  return {};
}

// __animals__: a wildcard.
std::string_view wildcard(std::string_view text) {
  constexpr std::string_view kName =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/_-";
  for (size_t at = text.find("__"); at != std::string_view::npos;) {
    const size_t end = std::min(text.size(), text.find_first_not_of(kName, at));
    const size_t close = text.substr(0, end).rfind("__");
    if (close >= at + 3) return text.substr(at, close + 2 - at);
    at = text.find("__", end);
  }
  return {};
}

// "owl:1.3", a weight without its parentheses. Behind a digit it is a time or a ratio, and without
// a point the name of a part, as in "john 3:16" and "halo:2".
std::string_view bare_weight(std::string_view text) {
  for (size_t at = text.find(':'); at != std::string_view::npos; at = text.find(':', at + 1)) {
    const size_t end = std::min(text.size(), text.find_first_not_of("+-.0123456789", at + 1));
    const std::string_view number = text.substr(at + 1, end - at - 1);
    const bool bounded = end == text.size() || text[end] == ' ' || text[end] == ',';
    const char before = at == 0 ? ' ' : text[at - 1];
    if (bounded && number.find('.') != std::string_view::npos && is_number(number) &&
        before != ' ' && (before < '0' || before > '9')) {
      const size_t begin = text.substr(0, at).rfind(' ') + 1;  // npos + 1 is 0
      return text.substr(begin, end - begin);
    }
  }
  return {};
}

// The first that is found of <lora:x:1>, (owl:1.3), {owl|ship}, __animals__, [owl:ship:0.5],
// ((owl)), owl:1.3.
std::string_view prompt_syntax(std::string_view text) {
  if (const auto found = bracketed(text, "<>",
                                   [](std::string_view inside) {
                                     return is_word(inside.substr(0, inside.find(':'))) &&
                                            inside.find(':') != std::string_view::npos;
                                   });
      !found.empty()) {
    return found;
  }
  if (const auto found = bracketed(text, "()",
                                   [](std::string_view inside) {
                                     const size_t colon = inside.rfind(':');
                                     return colon != std::string_view::npos &&
                                            is_number(trimmed(inside.substr(colon + 1)));
                                   });
      !found.empty()) {
    return found;
  }
  if (const auto found = bracketed(text, "{}", [](std::string_view) { return true; });
      !found.empty()) {
    return found;
  }
  if (const auto found = wildcard(text); !found.empty()) return found;
  if (const auto found = bare_weight(text); !found.empty()) return found;
  const bool whole = (text.starts_with('[') && text.ends_with(']')) ||
                     (text.size() > 3 && text.starts_with("((") && text.ends_with("))"));
  return whole ? text : std::string_view{};
}

// Words that mean something to programs that read prompts, and that may still be names.
std::string_view prompt_word(std::string_view phrase) {
  const bool small =
      std::any_of(phrase.begin(), phrase.end(), [](char c) { return c >= 'a' && c <= 'z'; });
  for (size_t at = 0; at < phrase.size();) {
    const size_t end = std::min(phrase.size(), phrase.find(' ', at));
    const std::string_view word = phrase.substr(at, end - at);
    // "DUNGEONS AND DRAGONS"
    const bool joins = word == "AND" && (small || word == phrase);
    const bool option = word.size() > 2 && word.starts_with("--") && is_word(word.substr(2));
    if (joins || option || word == "BREAK" || word.find("::") != std::string_view::npos) {
      return word;
    }
    at = end + 1;
  }
  return {};
}

// A mark between two words that may be meant as an arrow or as the end of a phrase, in
// "owl - star", "owl = star", "owl: star", "owl;star"; its place and bytes, or 0 bytes.
struct Mark {
  size_t at = 0;
  size_t bytes = 0;
};
Mark dividing_mark(std::string_view phrase) {
  const size_t words = phrase.find_first_not_of("0123456789 ");
  const auto spaced = [&](const Mark& mark, bool before, bool after) {
    const bool left = mark.at > 0 && phrase[mark.at - 1] == ' ';
    return (before && left) || (after && phrase.substr(mark.at + mark.bytes).starts_with(' '));
  };
  for (size_t at = 0; at < phrase.size();) {
    const std::string_view rest = phrase.substr(at);
    const auto begins = [&](std::string_view mark) { return rest.starts_with(mark); };
    const size_t bytes = std::max<size_t>(first_character(rest).bytes, 1);
    const Mark mark{at, begins("--") ? 2 : bytes};
    at += mark.bytes;
    if (mark.at == 0) continue;
    const bool last = at == phrase.size();
    const bool dash = begins("-") || begins("–") || begins("—") || begins("−") || begins("/");
    const bool number = words >= mark.at;  // "2001: a space odyssey"
    if ((dash && spaced(mark, true, false) && spaced(mark, false, true)) ||
        (begins("=") && spaced(mark, true, true)) ||
        (begins(":") && (last || spaced(mark, true, true)) && !number) || begins("：") ||
        begins(";")) {
      return mark;
    }
  }
  return {};
}

void doubt_divided(const std::string& phrase, size_t line, PhrasePlace place, ReadingNotes& notes) {
  const Mark mark = dividing_mark(phrase);
  if (mark.bytes == 0) return;
  const std::string_view text = phrase, sign = text.substr(mark.at, mark.bytes);
  const std::string_view left = trimmed(text.substr(0, mark.at));
  const std::string_view right = trimmed(text.substr(mark.at + mark.bytes));
  std::string advice = "delete what does not belong to it";
  if (place == PhrasePlace::kTarget && !right.empty()) {
    advice = "write " + readable(left, 40) + " -> " + readable(right, 40) +
             " if the second is what to draw instead, or each on a line of its own";
  }
  notes.doubt(line, in_quotes(phrase) + " is read as one phrase, " + in_quotes(sign) +
                        " and all; " + advice);
}

// `text` with the characters that "&quot;", "&#39;" and the like stand for, also "&amp;quot;".
std::string without_entities(std::string_view text, const std::string& where) {
  const auto character = [](std::string_view name) -> std::string {
    for (const auto& [known, meant] : kEntities) {
      if (name == known) return std::string(meant);
    }
    if (!name.starts_with('#')) return {};
    name.remove_prefix(1);
    const bool hex = name.starts_with('x') || name.starts_with('X');
    if (hex) name.remove_prefix(1);
    utf8proc_int32_t code = 0;
    const auto [end, error] =
        std::from_chars(name.data(), name.data() + name.size(), code, hex ? 16 : 10);
    if (error != std::errc() || end != name.data() + name.size() || code < ' ' ||
        !utf8proc_codepoint_valid(code)) {
      return {};
    }
    std::array<utf8proc_uint8_t, 4> bytes{};
    const auto size = static_cast<size_t>(utf8proc_encode_char(code, bytes.data()));
    return {bytes.begin(), bytes.begin() + size};
  };
  std::string out;
  while (!text.empty()) {
    std::string meant(1, text.front());
    text.remove_prefix(1);
    while (meant == "&") {
      constexpr size_t kLongestName = 8;
      const size_t end = text.substr(0, kLongestName + 1).find(';');
      if (end == std::string_view::npos) break;
      const std::string found = character(text.substr(0, end));
      if (found.empty() && end > 2 && is_word(text.substr(0, end))) {
        throw Error(where + ": " + in_quotes("&" + std::string(text.substr(0, end + 1))) +
                    " is a sign of a web page that is not known here; type the character itself");
      }
      if (found.empty()) break;
      meant = found;
      text.remove_prefix(end + 1);
    }
    out += meant;
  }
  return out;
}

bool is_one_of(std::string_view body, size_t at, std::initializer_list<std::string_view> starts) {
  const size_t next = body.find_first_not_of(" \t\r\n", at);
  if (next == std::string_view::npos) return true;
  return std::any_of(starts.begin(), starts.end(),
                     [&](std::string_view start) { return body.substr(next).starts_with(start); });
}

}  // namespace

void ReadingNotes::count(std::string_view unit) { unit_ = unit; }

void ReadingNotes::understood(size_t line, const std::string& what) {
  const auto it = std::find_if(understood_.begin(), understood_.end(), [&](const Note& note) {
    return note.what == what && note.unit == unit_;
  });
  if (it == understood_.end()) {
    understood_.push_back({what, unit_, {line}});
  } else if (it->lines.back() != line) {
    it->lines.push_back(line);
  }
}

void ReadingNotes::doubt(size_t line, const std::string& sentence) {
  if (doubts_.size() < kMostNotes) {
    doubts_.push_back({sentence, unit_, {line}});
  } else {
    ++more_doubts_;
  }
}

std::string ReadingNotes::text() const {
  std::string out;
  for (size_t kind = 0; kind < std::min(understood_.size(), kMostKinds); ++kind) {
    const Note& note = understood_[kind];
    out += out.empty() ? "" : "\n";
    std::string unit = note.unit + (note.lines.size() == 1 ? " " : "s ");
    unit[0] = static_cast<char>(unit[0] - 'a' + 'A');
    out += unit;
    for (size_t i = 0; i < std::min(note.lines.size(), kMostNotes); ++i) {
      out += (i == 0 ? "" : ", ") + std::to_string(note.lines[i]);
    }
    if (note.lines.size() > kMostNotes) {
      out += " and " + std::to_string(note.lines.size() - kMostNotes) + " more";
    }
    out += ": " + note.what + ".";
  }
  if (understood_.size() > kMostKinds) {
    out +=
        "\nAnd " + std::to_string(understood_.size() - kMostKinds) + " more readings like these.";
  }
  for (const Note& doubt : doubts_) {
    out += out.empty() ? "" : "\n";
    out += "Check " + doubt.unit + " " + std::to_string(doubt.lines[0]) + ": " + doubt.what + ".";
  }
  if (more_doubts_ > 0) {
    out += "\nCheck " + std::to_string(more_doubts_) + " more like these.";
  }
  return out;
}

std::string list_body(std::string_view text, const std::string& list, ReadingNotes& notes) {
  if (text.size() > kMaxListBytes) throw Error(list + " is larger than 4 MiB");
  if (!is_utf8(text)) throw Error(list + " is not text in UTF-8; type it again");
  if (text.starts_with(kByteOrderMark)) {
    text.remove_prefix(kByteOrderMark.size());
    notes.understood(1, "an invisible byte-order mark left out");
  }
  std::vector<std::string> lines = split_lines(text);
  std::vector<size_t> fences;
  for (size_t i = 0; i < lines.size(); ++i) {
    if (is_fence(normalize_phrase(lines[i]))) fences.push_back(i);
  }
  if (fences.empty()) return std::string(text);
  const auto inside = [&](size_t line) {
    const auto before = std::upper_bound(fences.begin(), fences.end(), line) - fences.begin();
    return before % 2 == 1;
  };
  std::string body;
  for (size_t i = 0; i < lines.size(); ++i) {
    const bool fence = std::binary_search(fences.begin(), fences.end(), i);
    const std::string said = normalize_phrase(split_comment(lines[i]).first);
    if (fences.size() > 1 && !fence && !inside(i) && !said.empty()) {
      throw Error(list + " has text outside the fence of ``` (line " + std::to_string(i + 1) +
                  ": " + in_quotes(said, 40) + "); paste only the list");
    }
    body += (i == 0 ? "" : "\n") + (fence ? std::string() : lines[i]);
  }
  for (const size_t fence : fences) notes.understood(fence + 1, "the fence of ``` left out");
  return body;
}

bool is_json_object(std::string_view body) {
  const size_t begin = body.find_first_not_of(" \t\r\n");
  if (begin == std::string_view::npos || body[begin] != '{') return false;
  // {owl|ship} is what prompts write for "one of these".
  const std::string_view line = body.substr(begin, body.find_first_of("\r\n", begin) - begin);
  const size_t end = line.find('}');
  const std::string_view group = line.substr(0, end);
  return end == std::string_view::npos || trimmed(group.substr(1)).empty() ||
         group.find_first_of("\":'") != std::string_view::npos ||
         group.find("“") != std::string_view::npos;
}

bool is_json_list(std::string_view body) {
  const size_t begin = body.find_first_not_of(" \t\r\n");
  return begin != std::string_view::npos && body[begin] == '[' &&
         check_box(body.substr(begin)).empty() &&
         is_one_of(body, begin + 1, {"\"", "{", "]", "'", "“", "‘"});
}

std::string without_marks(std::string_view text, size_t number, ReadingNotes& notes) {
  const std::string said = without_entities(text, notes.unit() + " " + std::to_string(number));
  if (said.size() != text.size()) {
    notes.understood(number, "signs of web pages (&quot;, &amp;) read as the characters they mean");
  }
  std::string clean = normalize_phrase(said);
  if (const std::string_view rest = without_bullet(clean); rest.size() < clean.size()) {
    clean = std::string(rest);
    notes.understood(number, "bullets left out");
  }
  std::string_view end = clean;
  const auto ends_with_separator = [&] {
    return std::any_of(kSeparators.begin(), kSeparators.end(),
                       [&](std::string_view mark) { return end.ends_with(mark); });
  };
  while (ends_with_separator()) {
    end = trimmed(end.substr(0, end.size() - (end.ends_with(',') || end.ends_with(';') ? 1 : 3)));
  }
  if (end.size() < clean.size() && !end.empty()) {
    clean = std::string(end);
    notes.understood(number, "separators at the end left out");
  }
  if (has_columns(said)) {
    notes.doubt(number, in_quotes(clean) +
                            " has a tab inside, read as a space; write target -> anchor if "
                            "these are two columns");
  }
  if (said.find_first_of("\r\n") != std::string::npos) {
    notes.doubt(number, in_quotes(clean) + " has a line break inside, read as a space");
  }
  if (has_invisible(said)) notes.understood(number, "invisible characters left out");
  return clean;
}

std::vector<TypedLine> typed_lines(std::string_view body, const std::string& list,
                                   ReadingNotes& notes) {
  std::string text;
  for (size_t i = 0; i < body.size();) {
    // Soft line breaks of word processors, and Unicode's own.
    if (body.substr(i).starts_with("\xE2\x80\xA8") || body.substr(i).starts_with("\xE2\x80\xA9")) {
      text += '\n';
      i += 3;
    } else {
      text += body[i++];
    }
  }
  std::vector<TypedLine> lines;
  size_t number = 0;
  for (const std::string& line : split_lines(text)) {
    ++number;
    const auto [said, comment] = split_comment(line);
    std::string clean = normalize_phrase(said);
    const std::string left_out = normalize_phrase(comment);
    if (clean.empty() || clean.starts_with('#')) {
      if (!comment.empty() && comment.front() != ' ' && comment.front() != '\t') {
        notes.understood(number, "left out as a comment, for its '#'");
      }
      continue;
    }
    if (left_out.find("->") != std::string::npos || left_out.find('|') != std::string::npos) {
      notes.doubt(number, "what follows '#' is left out as a comment, " + in_quotes(left_out, 40) +
                              " and all");
    } else if (!left_out.empty() && comment.front() != ' ' && comment.front() != '\t') {
      notes.doubt(number, in_quotes("#" + left_out, 40) +
                              " is left out as a comment; write it without '#' if it belongs to "
                              "the phrase");  // "owl #1", unlike "owl # a bird"
    }
    if (is_ruled(clean)) {
      notes.understood(number, "a ruled line left out");
      continue;
    }
    clean = without_marks(said, number, notes);
    if (clean.empty()) continue;
    if (lines.size() >= kMostLines) {
      throw Error(list + " has more than " + std::to_string(kMostLines) + " entries");
    }
    lines.push_back({number, std::move(clean), left_out});
  }
  take_numbers(lines, notes);
  return lines;
}

std::vector<TypedLine> typed_items(const std::vector<std::string>& texts, ReadingNotes& notes) {
  std::vector<TypedLine> items;
  for (const std::string& text : texts) {
    const size_t number = items.size() + 1;
    items.push_back({number, without_marks(text, number, notes), ""});
  }
  take_numbers(items, notes);
  return items;
}

bool has_words(std::string_view phrase) {
  while (!phrase.empty()) {
    const auto [bytes, code] = first_character(phrase);
    if (bytes == 0) return true;  // told elsewhere
    switch (utf8proc_category(static_cast<utf8proc_int32_t>(code))) {
      case UTF8PROC_CATEGORY_PC:
      case UTF8PROC_CATEGORY_PD:
      case UTF8PROC_CATEGORY_PS:
      case UTF8PROC_CATEGORY_PE:
      case UTF8PROC_CATEGORY_PI:
      case UTF8PROC_CATEGORY_PF:
      case UTF8PROC_CATEGORY_PO:
      case UTF8PROC_CATEGORY_SM:
      case UTF8PROC_CATEGORY_SK:
      case UTF8PROC_CATEGORY_ZS:
      case UTF8PROC_CATEGORY_CC:
      case UTF8PROC_CATEGORY_CF:
        break;
      default:
        return true;
    }
    phrase.remove_prefix(bytes);
  }
  return false;
}

void refuse_prompt_syntax(std::string_view text, const std::string& where) {
  const std::string_view found = prompt_syntax(text);
  if (found.empty()) return;
  throw Error(where + ": " + in_quotes(found, 60) +
              " is prompt syntax (weights, choices, LoRAs) or a list in brackets, which a list of "
              "words cannot hold; write the words alone, each on a line of its own");
}

std::string unquoted(std::string phrase, size_t line, ReadingNotes& notes) {
  for (bool again = true; again;) {
    again = false;
    for (const auto& [open, close] : kQuotes) {
      if (phrase.size() <= open.size() + close.size() || !phrase.starts_with(open) ||
          !phrase.ends_with(close)) {
        continue;
      }
      const std::string_view inside =
          std::string_view(phrase).substr(open.size(), phrase.size() - open.size() - close.size());
      if (inside.find(open) != std::string_view::npos ||
          inside.find(close) != std::string_view::npos || trimmed(inside).empty()) {
        continue;
      }
      notes.understood(line, open.starts_with('*') ? "emphasis left out" : "quotes left out");
      phrase = normalize_phrase(inside);
      again = true;
      break;
    }
  }
  return phrase;
}

std::string typed_phrase(std::string_view text, size_t line, const std::string& where,
                         ReadingNotes& notes, PhrasePlace place) {
  const std::string typed = normalize_phrase(text);
  std::string phrase = unquoted(typed, line, notes);
  if (phrase.empty()) return phrase;
  refuse_prompt_syntax(phrase, where);
  if (!has_words(phrase)) {
    throw Error(where + ": " + in_quotes(phrase) + " is punctuation alone; write a word");
  }
  const auto count = [&](std::string_view mark) {
    size_t found = 0;
    for (size_t at = phrase.find(mark); at != std::string::npos; at = phrase.find(mark, at + 1)) {
      ++found;
    }
    return found;
  };
  // "steins;gate" is a name.
  if (count("; ") > 0 || count(";") > 1 || count("；") > 0) {
    throw Error(where + ": " + in_quotes(phrase) +
                " holds several phrases between semicolons; write each on a line of its own");
  }
  if (const std::string_view word = prompt_word(phrase); !word.empty()) {
    notes.doubt(line, in_quotes(phrase) + " is read with " + in_quotes(word) +
                          ", which prompts use as a command; delete it, or write each phrase on a "
                          "line of its own");
  }
  if (fold_case(phrase).find("embedding:") != std::string::npos) {
    notes.doubt(line, in_quotes(phrase) +
                          " names an embedding file, which ComfyUI puts in place of the word, and "
                          "the edit refuses that; write in words what the embedding draws");
  }
  if (std::any_of(kCommas.begin(), kCommas.end(), [&](auto mark) { return count(mark) > 0; })) {
    const bool pair = place == PhrasePlace::kTarget && count(",") == 1;
    notes.doubt(line, in_quotes(phrase) +
                          " is read as one phrase, commas and all; write each on a line of its own "
                          "if these are several" +
                          (pair ? ", or target -> anchor if these are two columns" : ""));
  } else if (phrase.starts_with('(') && phrase.ends_with(')')) {
    notes.doubt(line, in_quotes(phrase) + " is read with its parentheses");
  } else if (place != PhrasePlace::kBesideArrow && phrase.size() == typed.size()) {
    doubt_divided(phrase, line, place, notes);  // what stands in quotes is meant
  }
  return phrase;
}

std::optional<ArrowPlace> find_arrow(std::string_view text, const std::string& where) {
  const auto turned = [&](std::string_view found) {
    return Error(where + ": cannot tell what " + in_quotes(found) +
                 " means; write it as: target -> anchor");
  };
  size_t stroke = std::string_view::npos;  // where a run of strokes begins
  for (size_t i = 0; i < text.size();) {
    const std::string_view rest = text.substr(i);
    const auto [bytes, code] = first_character(rest);
    if (bytes == 0) return std::nullopt;
    if (is_other_arrow(code)) throw turned(rest.substr(0, bytes));
    if (is_right_arrow(code)) {
      size_t size = bytes;
      if (text.substr(i + size).starts_with("\xEF\xB8\x8F")) size += 3;  // "as emoji"
      return ArrowPlace{i, size};
    }
    if (!prefix_in(rest, kStrokes).empty()) {
      if (stroke == std::string_view::npos) stroke = i;
      i += bytes;
      continue;
    }
    if (const std::string_view head = prefix_in(rest, kHeads); !head.empty()) {
      if (stroke != std::string_view::npos) {
        if (stroke > 0 && text[stroke - 1] == '<') throw turned(text.substr(stroke - 1));
        size_t end = i;
        for (std::string_view more = head; !more.empty();
             more = prefix_in(text.substr(end), kHeads)) {
          end += more.size();
        }
        return ArrowPlace{stroke, end - stroke};
      }
      size_t end = i + head.size();
      for (std::string_view more; !(more = prefix_in(text.substr(end), kHeads)).empty();) {
        end += more.size();
      }
      if (i > 0 && text[i - 1] == ' ' && text.substr(end).starts_with(' ')) {
        if (end > i + head.size()) return ArrowPlace{i, end - i};  // ">>"
        if (head == "»" || head == "❯" || head == "▶" || head == "►" || head == "▸") {
          return ArrowPlace{i, head.size()};
        }
        throw turned(trimmed(head));
      }
      // No head behind this one follows a space.
      i = end;
      continue;
    }
    if (stroke != std::string_view::npos && stroke > 0 && text[stroke - 1] == '<') {
      throw turned(text.substr(stroke - 1, i - stroke + 1));
    }
    stroke = std::string_view::npos;
    i += bytes;
  }
  return std::nullopt;
}

std::pair<size_t, size_t> find_bar(std::string_view text) {
  constexpr std::string_view kWide = "｜";
  const size_t plain = text.find('|'), wide = text.find(kWide);
  if (plain == wide) return {text.size(), 0};
  return plain < wide ? std::pair(plain, size_t{1}) : std::pair(wide, kWide.size());
}

bool holds_arrow_or_bar(std::string_view text, const std::string& where) {
  return find_arrow(text, where) || find_bar(text).second > 0;
}

std::vector<TypedPhrase> typed_phrases(std::string_view text, const std::string& list,
                                       ReadingNotes& notes) {
  const std::string body = list_body(text, list, notes);
  std::vector<TypedPhrase> phrases;
  const auto add = [&](const std::string& said, size_t number, const std::string& where) {
    refuse_prompt_syntax(said, where);
    if (holds_arrow_or_bar(said, where)) {
      throw Error(where + ": " + in_quotes(said) +
                  " holds an arrow or '|'; write one phrase a line, and nothing else");
    }
    std::string phrase = typed_phrase(said, number, where, notes, PhrasePlace::kAlone);
    if (phrase.empty()) throw Error(where + " is empty; write a phrase, or remove it");
    phrases.push_back({number, std::move(phrase)});
  };
  if (is_json_object(body)) {
    throw Error(list + " is a JSON object; write one phrase a line, or paste it into 'concepts'");
  }
  if (!is_json_list(body)) {
    for (const TypedLine& line : typed_lines(body, list, notes)) {
      add(line.text, line.number, list + ", line " + std::to_string(line.number));
    }
    return phrases;
  }
  const nlohmann::json values = parse_json(body, list, {.depth = 2, .values = 20'000});
  notes.understood(1, "a JSON list, read as phrases");
  notes.count("item");
  std::vector<std::string> texts;
  for (const nlohmann::json& value : values) {
    if (!value.is_string()) {
      throw Error(list + ", item " + std::to_string(texts.size() + 1) +
                  " of the JSON must be text");
    }
    texts.push_back(value.get<std::string>());
  }
  for (const TypedLine& item : typed_items(texts, notes)) {
    add(item.text, item.number, list + ", item " + std::to_string(item.number));
  }
  return phrases;
}

}  // namespace lacuna
