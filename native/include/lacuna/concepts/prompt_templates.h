// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/concepts/concept_kind.h"

namespace lacuna {

// Our own prompts, each with exactly one slot "{}" at varying positions, so that closed-form
// refinement sees words before and after the concept (native/data/templates_*.txt).

inline constexpr int kTemplatesPerKind = 30;

std::span<const std::string_view> prompt_templates(ConceptKind kind);

// The text before the slot (needed to find the phrase's tokens) and the whole prompt.
std::string prefix_of_template(std::string_view prompt_template);
std::string fill_template(std::string_view prompt_template, std::string_view phrase);
// Prompts with other words beside the phrase have the slots "{1}" and "{2}" for them, once each at
// most: the template with these filled.
std::string fill_companions(std::string_view prompt_template, std::string_view first,
                            std::string_view second);
// The first `count` prompts of a kind.
std::vector<std::string> fill_templates(ConceptKind kind, int count, std::string_view phrase);

}  // namespace lacuna
