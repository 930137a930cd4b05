// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>

#include "fuzz/targets.h"
#include "lacuna/concepts/concept_set.h"
#include "lacuna/concepts/typed_list.h"
#include "lacuna/files/text.h"

namespace lacuna::fuzz {

void preserve(std::string_view input) {
  ReadingNotes notes;
  ends_well([&] {
    for (const PreservedPhrase& item : parse_preserve_lines(input, {}, &notes)) {
      if (item.phrase.empty() || !is_utf8(item.phrase)) throw std::logic_error("an odd phrase");
    }
  });
  if (!is_utf8(notes.text())) throw std::logic_error("notes that cannot be shown");
}

}  // namespace lacuna::fuzz
