// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

namespace lacuna {

// Selects a concept's prompt templates, and its anchor where none is given.
enum class ConceptKind { kObject, kPerson, kStyle, kExplicit };
enum class GeneralPriorSize { kNone, kSmall, kFull };

std::string_view to_string(ConceptKind kind);
std::string_view to_string(GeneralPriorSize size);
// Both throw Error naming the accepted words.
ConceptKind concept_kind_from_string(std::string_view text);
GeneralPriorSize general_prior_from_string(std::string_view text);

// "scenery", "a person", "art", "a person wearing clothes".
std::string_view default_anchor(ConceptKind kind);

}  // namespace lacuna
