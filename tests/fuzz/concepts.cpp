// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>

#include "fuzz/targets.h"
#include "lacuna/concepts/concept_set.h"
#include "lacuna/concepts/typed_list.h"
#include "lacuna/files/text.h"

namespace lacuna::fuzz {

void concepts(std::string_view input) {
  ReadingNotes notes;
  ConceptSet set;
  const bool read = ends_well([&] {
    set = parse_concepts(input, {}, &notes);
    validate(set);
  });
  if (!is_utf8(notes.text())) throw std::logic_error("notes that cannot be shown");
  // What was accepted can be shared, and comes back the same.
  if (read && concept_set_from_json(to_json(set)) != set) throw std::logic_error("round trip");
}

}  // namespace lacuna::fuzz
