// SPDX-License-Identifier: Apache-2.0
#include "lacuna/concepts/concept_kind.h"

#include <array>
#include <string>
#include <utility>

#include "lacuna/error.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

constexpr std::array<std::pair<ConceptKind, std::string_view>, 4> kKinds{{
    {ConceptKind::kObject, "object"},
    {ConceptKind::kPerson, "person"},
    {ConceptKind::kStyle, "style"},
    {ConceptKind::kExplicit, "explicit"},
}};
constexpr std::array<std::pair<GeneralPriorSize, std::string_view>, 3> kPriors{{
    {GeneralPriorSize::kNone, "none"},
    {GeneralPriorSize::kSmall, "small"},
    {GeneralPriorSize::kFull, "full"},
}};

template <typename T, size_t N>
std::string_view name_of(const std::array<std::pair<T, std::string_view>, N>& table, T value) {
  for (const auto& [key, name] : table) {
    if (key == value) return name;
  }
  return "";
}

template <typename T, size_t N>
T value_of(const std::array<std::pair<T, std::string_view>, N>& table, std::string_view name,
           std::string_view what) {
  std::string known;
  for (const auto& [key, known_name] : table) {
    if (known_name == name) return key;
    known += (known.empty() ? "" : ", ") + std::string(known_name);
  }
  throw Error("unknown " + std::string(what) + " " + in_quotes(name) + "; use one of: " + known);
}

}  // namespace

std::string_view to_string(ConceptKind kind) { return name_of(kKinds, kind); }
std::string_view to_string(GeneralPriorSize size) { return name_of(kPriors, size); }
ConceptKind concept_kind_from_string(std::string_view text) {
  return value_of(kKinds, text, "concept kind");
}
GeneralPriorSize general_prior_from_string(std::string_view text) {
  return value_of(kPriors, text, "general prior");
}

std::string_view default_anchor(ConceptKind kind) {
  switch (kind) {
    case ConceptKind::kPerson:
      return "a person";
    case ConceptKind::kStyle:
      return "art";
    case ConceptKind::kExplicit:
      return "a person wearing clothes";
    case ConceptKind::kObject:
      break;
  }
  return "scenery";
}

}  // namespace lacuna
