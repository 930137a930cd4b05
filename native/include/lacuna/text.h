// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lacuna {

// Small text rules shared by everything that reads what a person typed, or writes reports.

// Leading and trailing white space removed, inner runs collapsed to one space.
std::string normalize_phrase(std::string_view text);

// ASCII lower case: the text encoders we support are case-insensitive.
std::string fold_case(std::string_view text);

// Splits at any of "\n", "\r\n", "\r".
std::vector<std::string> split_lines(std::string_view text);

// What a line of a list says, and the comment behind it, both as typed. '#' starts a comment at the
// beginning or after white space, so that "c#" stays a word. The rule of every list people type.
std::pair<std::string_view, std::string_view> split_comment(std::string_view line);

// printf's pattern with one or two numbers; at most 199 bytes.
std::string format_numbers(const char* pattern, double a, double b = 0.0);

}  // namespace lacuna
