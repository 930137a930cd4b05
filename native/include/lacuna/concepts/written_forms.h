// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "lacuna/concepts/concept_set.h"

namespace lacuna {

// What a prompt may call a concept by, word for word: its phrases in lower case without an article
// in front, their plurals, hyphens left out, and of "van gogh style" the name alone.
std::vector<std::string> written_forms(const std::vector<Concept>& concepts);

}  // namespace lacuna
