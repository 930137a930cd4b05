// SPDX-License-Identifier: Apache-2.0
#include "nodes/concept_set_node.h"

#include <algorithm>

#include "lacuna/concepts/concept_set.h"
#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/concepts/typed_list.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

struct ReadSet {
  ConceptSet set;
  std::string notes;  // what was understood, and what is in doubt
};

ReadSet read_set(const NodeInputs& inputs) {
  ConceptDefaults defaults;
  defaults.kind = concept_kind_from_string(inputs.string("kind"));
  defaults.anchor = inputs.string("default_anchor");
  defaults.templates = static_cast<int>(inputs.integer("templates"));
  ReadingNotes of_concepts, of_preserve;
  ConceptSet set = parse_concepts(inputs.string("concepts"), defaults, &of_concepts);
  for (PreservedPhrase& item :
       parse_preserve_lines(inputs.string("preserve"), defaults, &of_preserve)) {
    set.preserve.push_back(std::move(item));
  }
  set.general_prior = general_prior_from_string(inputs.string("general_prior"));
  std::string notes;
  for (const auto& [input, said] :
       {std::pair("concepts", of_concepts.text()), std::pair("preserve", of_preserve.text())}) {
    if (!said.empty()) notes += std::string("\nIn '") + input + "':\n" + said;
  }
  return {std::move(set), std::move(notes)};
}

std::string counted(size_t count, const std::string& what) {
  return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
}

// What was read, so that nobody has to guess.
std::string report(const ConceptSet& set, const std::string& notes) {
  constexpr size_t kShown = 8;
  std::string text = "Erases " + counted(set.concepts.size(), "concept") + ", keeps " +
                     counted(set.preserve.size(), "phrase") + ".";
  for (size_t i = 0; i < std::min(set.concepts.size(), kShown); ++i) {
    const Concept& item = set.concepts[i];
    text += "\n" + in_quotes(item.target) + " -> " + in_quotes(item.anchor);
    if (!item.synonyms.empty()) text += ", with " + in_quotes(item.synonyms.front());
    if (item.synonyms.size() > 1) {
      text += " and " + std::to_string(item.synonyms.size() - 1) + " more";
    }
  }
  if (set.concepts.size() > kShown) {
    text += "\nand " + std::to_string(set.concepts.size() - kShown) + " more";
  }
  return text + notes;
}

}  // namespace

const NodeSchema& ConceptSetNode::schema() const {
  static const NodeSchema schema{
      .id = "LacunaConceptSet",
      .display_name = "Concept Set",
      .description =
          "What the model must forget, one phrase a line, and what must stay. Connect it to "
          "Attention Refine.",
      .category = "lacuna",
      .search_aliases = {"forget", "unlearn", "erase concept", "remove concept", "concept list"},
      .inputs =
          {
              {.id = "concepts",
               .display_name = "concepts",
               .type = socket::kString,
               .tooltip =
                   "One concept a line: target -> anchor | synonym, synonym  # comment. Everything "
                   "after the target is optional. The anchor is what is drawn instead; synonyms "
                   "are erased too. A lacuna.concepts/1 JSON file, or a list from elsewhere "
                   "(bullets, "
                   "numbers, quotes, other arrows), can be pasted instead: the report says how it "
                   "was read.",
               .multiline = true,
               .default_value = std::string("church")},
              {.id = "kind",
               .display_name = "kind",
               .type = socket::kCombo,
               .tooltip = "Selects the prompts the concepts are read in, and the default anchor: "
                          "object (scenery), person (a person), style (art), explicit (a person "
                          "wearing clothes).",
               .default_value = std::string("object"),
               .options = {"object", "person", "style", "explicit"}},
              {.id = "default_anchor",
               .display_name = "default anchor",
               .type = socket::kString,
               .tooltip = "Anchor for lines without '->'. Empty: chosen by kind.",
               .default_value = std::string()},
              {.id = "preserve",
               .display_name = "preserve",
               .type = socket::kString,
               .tooltip = "What must stay as it is, one phrase a line: above all neighbours of the "
                          "erased concepts (erase 'dog', preserve 'wolf', 'cat').",
               .multiline = true,
               .default_value = std::string()},
              {.id = "general_prior",
               .display_name = "general prior",
               .type = socket::kCombo,
               .tooltip = "Generic captions that keep the rest of the model in place: none, small "
                          "(200) or full (2000). Encoded once per text encoder, then cached.",
               .default_value = std::string("small"),
               .options = {"none", "small", "full"}},
              {.id = "templates",
               .display_name = "prompts per concept",
               .type = socket::kInt,
               .tooltip =
                   "In how many different prompts each phrase is read. Fewer is faster, more "
                   "is more thorough.",
               .advanced = true,
               .default_value = int64_t{kTemplatesPerKind},
               .min = 1,
               .max = kTemplatesPerKind,
               .step = 1},
              {.id = "previous",
               .display_name = "previous",
               .type = socket::kConcepts,
               .tooltip = "Another Concept Set that this one extends, e.g. styles before objects.",
               .optional = true},
          },
      .outputs = {{"concepts", "concepts", socket::kConcepts,
                   "The whole list, for Attention Refine."},
                  {"json", "json", socket::kString,
                   "The list as a lacuna.concepts/1 file to save or share."},
                  {"report", "report", socket::kString,
                   "What was read: the concepts, how pasted text was understood, what to check."}},
  };
  return schema;
}

void ConceptSetNode::validate(const NodeInputs& constants) const {
  if (constants.has_all(
          {"concepts", "kind", "default_anchor", "preserve", "general_prior", "templates"})) {
    lacuna::validate(read_set(constants).set);
  }
}

NodeResult ConceptSetNode::run(const NodeInputs& inputs, Progress&) {
  auto [set, notes] = read_set(inputs);
  lacuna::validate(set);
  if (inputs.has("previous")) {
    set = merge(*inputs.get<std::shared_ptr<const ConceptSet>>("previous"), set);
    lacuna::validate(set);
  }
  NodeResult result;
  std::string json = to_json(set);
  std::string text = report(set, notes);
  result.text = {text};
  result.outputs = {std::make_shared<const ConceptSet>(std::move(set)), std::move(json),
                    std::move(text)};
  return result;
}

}  // namespace lacuna
