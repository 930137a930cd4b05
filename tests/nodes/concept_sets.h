// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lacuna/concepts/concept_set.h"

namespace lacuna::testing {

// Objects that become fog while the dog stays, with few prompts each and without a general prior.
inline std::shared_ptr<const ConceptSet> concepts_named(const std::vector<std::string>& targets,
                                                        int templates) {
  ConceptSet set;
  set.general_prior = GeneralPriorSize::kNone;
  for (const std::string& target : targets) {
    Concept item;
    item.target = target;
    item.anchor = "fog";
    item.templates = templates;
    set.concepts.push_back(item);
  }
  set.preserve = {{"dog", ConceptKind::kObject, templates}};
  return std::make_shared<const ConceptSet>(std::move(set));
}

}  // namespace lacuna::testing
