// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/concepts/concept_kind.h"

namespace lacuna {

class ReadingNotes;

// What the user wants forgotten and what must stay: the value that travels from node to node, and
// the file format `lacuna.concepts/1` that people share.

struct Concept {
  std::string target;  // the phrase that must go, e.g. "van gogh style"
  std::string anchor;  // the phrase it is mapped to, e.g. "art" (MACE: mapping concept)
  std::vector<std::string> synonyms;  // erased together with the target, with the same anchor
  std::string comment;
  ConceptKind kind = ConceptKind::kObject;  // selects the prompt templates
  int templates = 30;                       // prompts per phrase, 1..30

  bool operator==(const Concept&) const = default;
};

struct PreservedPhrase {
  std::string phrase;
  ConceptKind kind = ConceptKind::kObject;
  int templates = 30;

  bool operator==(const PreservedPhrase&) const = default;
};

struct ConceptSet {
  std::vector<Concept> concepts;
  std::vector<PreservedPhrase> preserve;
  GeneralPriorSize general_prior = GeneralPriorSize::kSmall;

  bool operator==(const ConceptSet&) const = default;
};

struct ConceptDefaults {
  ConceptKind kind = ConceptKind::kObject;
  std::string anchor;  // empty: default_anchor(kind)
  int templates = 30;
};

// Reads what the user typed or pasted, one concept a line:
//   target [-> anchor] [| synonym, synonym] [# comment]
// (see typed_list.h for what is understood besides), or a whole `lacuna.concepts/1` JSON object,
// which brings its own kinds, anchors and preserve list, or its list of concepts alone, or a JSON
// list of such lines. Blank and comment-only lines are skipped. `notes` is told what was
// understood and what is in doubt. Throws Error with the line number.
ConceptSet parse_concepts(std::string_view text, const ConceptDefaults& defaults,
                          ReadingNotes* notes = nullptr);

// One preserved phrase a line, '#' comments allowed.
std::vector<PreservedPhrase> parse_preserve_lines(std::string_view text,
                                                  const ConceptDefaults& defaults,
                                                  ReadingNotes* notes = nullptr);

// `earlier` followed by `later`; the later set's general prior wins. Not validated.
ConceptSet merge(const ConceptSet& earlier, const ConceptSet& later);

// Throws Error for: an empty list, target or synonym equal to the anchor, duplicate phrases, a
// target that is also preserved, empty or over-long phrases, template counts out of range.
void validate(const ConceptSet& set);

// `lacuna.concepts/1`. from_json reads every text as it is (parse_concepts judges it), throws Error
// that names the member at fault; it does not check the rules of validate().
std::string to_json(const ConceptSet& set);
ConceptSet concept_set_from_json(std::string_view text);

// All phrases of a concept: the target, then its synonyms.
std::vector<std::string> phrases(const Concept& item);

}  // namespace lacuna
