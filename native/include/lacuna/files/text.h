// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lacuna {

// Small text rules shared by everything that reads what a person typed, or writes reports.

// As a text encoder reads it: in Unicode's composed form (NFC), white space of any kind at the ends
// removed and inside collapsed to one space, without characters that nobody sees (zero-width
// spaces, byte-order marks, directions). Bytes that are not UTF-8 stay as they are.
std::string normalize_phrase(std::string_view text);

// Whether normalize_phrase leaves out something that nobody sees, white space aside.
bool has_invisible(std::string_view text);

// Equal for texts that the text encoders we support read alike: composed form, lower case (simple
// case folding: one character for one). For comparing, not for showing.
std::string fold_case(std::string_view text);

// Whether `text` says `phrase` in words of their own, a plural s included; both of fold_case.
bool names_phrase(std::string_view text, std::string_view phrase);

// Splits at any of "\n", "\r\n", "\r".
std::vector<std::string> split_lines(std::string_view text);

// What a line of a list says, and the comment behind it, both as typed. '#' starts a comment at the
// beginning or after white space, so that "c#" stays a word. The rule of every list people type.
std::pair<std::string_view, std::string_view> split_comment(std::string_view line);

// printf's pattern with one or two numbers; at most 199 bytes.
std::string format_numbers(const char* pattern, double a, double b = 0.0);

// The first character: its bytes and its code point. No bytes: there is none, or it is not UTF-8.
struct Utf8Character {
  size_t bytes;
  char32_t code;
};
Utf8Character first_character(std::string_view text);

bool is_utf8(std::string_view text);

// In code points; a byte that is not UTF-8 counts as one.
size_t count_characters(std::string_view text);

// For messages. What cannot be shown (bytes that are not UTF-8, control characters but line feeds)
// becomes U+FFFD or a space; of a longer text the beginning and the end are kept, with " ... "
// between them.
std::string readable(std::string_view text, size_t most_characters);

// A phrase of a user inside a message: 'phrase', cut after `most_characters`. On one line: a line
// feed is shown as \n, another control or invisible character as \u0007.
std::string in_quotes(std::string_view phrase, size_t most_characters = 60);

}  // namespace lacuna
