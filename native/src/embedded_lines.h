// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string_view>

// The text files of native/data, one entry per line (cmake/EmbedLines.cmake writes the source).
namespace lacuna::embedded {

std::span<const std::string_view> generic_captions();
std::span<const std::string_view> templates_object();
std::span<const std::string_view> templates_person();
std::span<const std::string_view> templates_style();
std::span<const std::string_view> templates_explicit();
std::span<const std::string_view> sheet_font();

}  // namespace lacuna::embedded
