// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace lacuna {

// Small text rules shared by everything that reads what a person typed.

// Leading and trailing white space removed, inner runs collapsed to one space.
std::string normalize_phrase(std::string_view text);

// ASCII lower case: the text encoders we support are case-insensitive.
std::string fold_case(std::string_view text);

// Splits at any of "\n", "\r\n", "\r".
std::vector<std::string> split_lines(std::string_view text);

}  // namespace lacuna
