// SPDX-License-Identifier: Apache-2.0
#include "lacuna/concepts/prompt_templates.h"

#include <utility>

#include "embedded_lines.h"

namespace lacuna {

std::span<const std::string_view> prompt_templates(ConceptKind kind) {
  switch (kind) {
    case ConceptKind::kPerson:
      return embedded::templates_person();
    case ConceptKind::kStyle:
      return embedded::templates_style();
    case ConceptKind::kExplicit:
      return embedded::templates_explicit();
    case ConceptKind::kObject:
      break;
  }
  return embedded::templates_object();
}

std::string prefix_of_template(std::string_view prompt_template) {
  return std::string(prompt_template.substr(0, prompt_template.find("{}")));
}

std::string fill_template(std::string_view prompt_template, std::string_view phrase) {
  const size_t slot = prompt_template.find("{}");
  return std::string(prompt_template.substr(0, slot))
      .append(phrase)
      .append(prompt_template.substr(slot + 2));
}

std::string fill_companions(std::string_view prompt_template, std::string_view first,
                            std::string_view second) {
  std::string filled(prompt_template);
  for (const auto& [slot, word] : {std::pair<std::string_view, std::string_view>{"{1}", first},
                                   std::pair<std::string_view, std::string_view>{"{2}", second}}) {
    if (const size_t at = filled.find(slot); at != std::string::npos) {
      filled.replace(at, slot.size(), word);
    }
  }
  return filled;
}

std::vector<std::string> fill_templates(ConceptKind kind, int count, std::string_view phrase) {
  std::vector<std::string> prompts;
  for (std::string_view prompt_template : prompt_templates(kind).first(count)) {
    prompts.push_back(fill_template(prompt_template, phrase));
  }
  return prompts;
}

}  // namespace lacuna
