// SPDX-License-Identifier: Apache-2.0
#include "lacuna/concepts/concept_set.h"

#include <algorithm>
#include <array>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_map>
#include <utility>

#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/concepts/typed_list.h"
#include "lacuna/error.h"
#include "lacuna/files/json_text.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

using nlohmann::json;

constexpr std::string_view kConceptsFormat = "lacuna.concepts/1";
constexpr size_t kMaxTextBytes = 4u << 20;
constexpr size_t kMaxConcepts = 10'000;
constexpr size_t kMaxPhraseCharacters = 500;
// Ten thousand concepts of seven members and thirty synonyms, and as many preserved phrases.
constexpr JsonLimits kJsonLimits{.depth = 8, .values = 420'000, .unique = true};

// Reads one text of a JSON; the string names its place for errors.
using ReadText = std::function<std::string(const std::string&, const std::string&, PhrasePlace)>;

std::string read_anchor(const ConceptDefaults& defaults) {
  const std::string where = "the default anchor";
  ReadingNotes unused;
  const std::string typed = without_marks(defaults.anchor, 1, unused);
  if (typed.empty()) return std::string(default_anchor(defaults.kind));
  if (holds_arrow_or_bar(typed, where)) {
    throw Error(where + " " + in_quotes(typed) +
                " holds an arrow or '|'; write one phrase there, and nothing else");
  }
  return typed_phrase(typed, 1, where, unused);
}

// Between synonyms any of these can only separate.
std::vector<std::string> split_synonyms(std::string_view text) {
  constexpr std::array<std::string_view, 5> kSeparators{",", "，", "、", ";", "；"};
  std::vector<std::string> synonyms(1);
  const bool paired = std::count(text.begin(), text.end(), '"') % 2 == 0;
  bool quoted = false;
  while (!text.empty()) {
    size_t size = 0;
    if (paired && text.starts_with('"')) quoted = !quoted;
    for (const std::string_view mark : kSeparators) {
      if (!quoted && text.starts_with(mark)) size = mark.size();
    }
    if (size > 0) {
      synonyms.emplace_back();
    } else {
      size = 1;
      synonyms.back() += text.front();
    }
    text.remove_prefix(size);
  }
  return synonyms;
}

Concept read_line(const TypedLine& line, const std::string& where, const ConceptDefaults& defaults,
                  ReadingNotes& notes) {
  const auto fail = [&](const std::string& what) -> Error {
    return Error(where + ": " + what + "; write it as: target -> anchor | synonym, synonym");
  };
  const auto phrase = [&](std::string_view text, PhrasePlace place = PhrasePlace::kBesideArrow) {
    return typed_phrase(text, line.number, where, notes, place);
  };
  const std::string text = unquoted(line.text, line.number, notes);
  std::string_view body = text;
  refuse_prompt_syntax(body, where);
  const auto anchor_after = [&](std::string_view part, const ArrowPlace& arrow) {
    const std::string_view after = part.substr(arrow.begin + arrow.size);
    if (find_arrow(after, where)) throw fail("more than one '->'");
    const std::string_view typed = part.substr(arrow.begin, arrow.size);
    if (typed != "->") {
      notes.understood(line.number, in_quotes(typed, 40) + " read as '->'");
    }
    std::string anchor = phrase(after);
    if (anchor.empty()) throw fail("nothing after '->'");
    return anchor;
  };
  Concept item;
  item.kind = defaults.kind;
  item.templates = defaults.templates;
  item.comment = line.comment;
  if (const auto [bar, size] = find_bar(body); size > 0) {
    std::string_view after = body.substr(bar + size);
    if (find_bar(after).second > 0) {
      throw fail("more than one '|' (of a table, copy the column of words)");
    }
    if (const auto arrow = find_arrow(after, where)) {
      if (find_arrow(body.substr(0, bar), where)) throw fail("more than one '->'");
      item.anchor = anchor_after(after, *arrow);
      after = after.substr(0, arrow->begin);
    }
    if (size > 1) notes.understood(line.number, "'｜' read as '|'");
    if (after.find("，") != std::string_view::npos || after.find("、") != std::string_view::npos ||
        after.find(';') != std::string_view::npos || after.find("；") != std::string_view::npos) {
      notes.understood(line.number, "other separators between synonyms read as ','");
    }
    for (const std::string& part : split_synonyms(after)) {
      if (std::string synonym = phrase(part); !synonym.empty()) {
        item.synonyms.push_back(std::move(synonym));
      }
    }
    if (item.synonyms.empty()) throw fail("nothing after '|'");
    body = body.substr(0, bar);
  }
  // What stands in quotes is one phrase.
  PhrasePlace place = PhrasePlace::kBesideArrow;
  if (const auto arrow = find_arrow(body, where)) {
    item.anchor = anchor_after(body, *arrow);
    body = body.substr(0, arrow->begin);
  } else if (item.anchor.empty()) {
    item.anchor = read_anchor(defaults);
    if (text.size() == line.text.size()) place = PhrasePlace::kTarget;
  }
  item.target = phrase(body, place);
  if (item.target.empty()) throw fail("no target");
  return item;
}

// Reads members of one JSON object and says where a wrong one stands.
class ObjectReader {
 public:
  ObjectReader(const json& object, std::string where, std::vector<std::string_view> known)
      : object_(object), where_(std::move(where)) {
    if (!object.is_object()) throw Error(where_ + " must be an object");
    for (const auto& [key, value] : object.items()) {
      bool found = false;
      for (std::string_view name : known) found = found || name == key;
      if (!found) throw Error(where_ + " has an unknown member " + in_quotes(key));
    }
  }

  std::string string(const char* key, std::optional<std::string> fallback = {}) const {
    const json* value = find(key, fallback.has_value());
    if (value == nullptr) return *fallback;
    if (!value->is_string()) throw Error(where_ + ": '" + key + "' must be text");
    return value->get<std::string>();
  }

  int integer(const char* key, int fallback) const {
    const json* value = find(key, true);
    if (value == nullptr) return fallback;
    if (!value->is_number_integer()) throw Error(where_ + ": '" + key + "' must be a whole number");
    const auto number = value->get<int64_t>();
    if (number < 0 || number > 1'000'000) throw Error(where_ + ": '" + key + "' is out of range");
    return static_cast<int>(number);
  }

  const json& array(const char* key, const json& fallback) const {
    const json* value = find(key, true);
    if (value == nullptr) return fallback;
    if (!value->is_array()) throw Error(where_ + ": '" + key + "' must be a list");
    return *value;
  }

 private:
  const json* find(const char* key, bool optional) const {
    auto it = object_.find(key);
    if (it != object_.end()) return &*it;
    if (!optional) throw Error(where_ + ": '" + key + "' is missing");
    return nullptr;
  }

  const json& object_;
  std::string where_;
};

// As Lacuna wrote it.
std::string literal_text(const std::string& text, const std::string&, PhrasePlace) {
  return normalize_phrase(text);
}

// As somebody pasted it: judged like a line.
ReadText pasted_text(size_t number, ReadingNotes& notes) {
  return [number, &notes](const std::string& text, const std::string& where, PhrasePlace place) {
    const std::string typed = without_marks(text, number, notes);
    if (typed.empty()) throw Error(where + " holds an empty text; write a word, or remove it");
    if (holds_arrow_or_bar(typed, where)) {
      throw Error(where + ": " + in_quotes(typed) +
                  " holds an arrow or '|'; in this JSON, 'anchor' and 'synonyms' have members of "
                  "their own");
    }
    return typed_phrase(typed, number, where, notes, place);
  };
}

Concept concept_from_json(const json& value, const std::string& where, const ReadText& read,
                          const ConceptDefaults& defaults = {}) {
  ObjectReader reader(value, where,
                      {"target", "anchor", "kind", "synonyms", "templates", "comment"});
  Concept item;
  item.target = read(reader.string("target"), where, PhrasePlace::kAlone);
  item.kind =
      concept_kind_from_string(reader.string("kind", std::string(to_string(defaults.kind))));
  item.anchor = value.contains("anchor")
                    ? read(reader.string("anchor"), where, PhrasePlace::kBesideArrow)
                    : read_anchor({.kind = item.kind, .anchor = defaults.anchor});
  item.templates = reader.integer("templates", defaults.templates);
  item.comment = reader.string("comment", "");
  const json none = json::array();
  for (const json& synonym : reader.array("synonyms", none)) {
    if (!synonym.is_string()) throw Error(where + ": every synonym must be text");
    item.synonyms.push_back(read(synonym.get<std::string>(), where, PhrasePlace::kBesideArrow));
  }
  return item;
}

PreservedPhrase preserved_from_json(const json& value, const std::string& where,
                                    const ReadText& read) {
  PreservedPhrase item;
  if (value.is_string()) {
    item.phrase = read(value.get<std::string>(), where, PhrasePlace::kAlone);
    return item;
  }
  ObjectReader reader(value, where, {"phrase", "kind", "templates"});
  item.phrase = read(reader.string("phrase"), where, PhrasePlace::kAlone);
  item.kind = concept_kind_from_string(reader.string("kind", "object"));
  item.templates = reader.integer("templates", kTemplatesPerKind);
  return item;
}

// Literally without `notes`.
ConceptSet set_from_json(std::string_view text, ReadingNotes* notes) {
  if (text.size() > kMaxTextBytes) throw Error("the concept file is larger than 4 MiB");
  const json root = parse_json(text, "the concept JSON", kJsonLimits);
  ObjectReader reader(root, "the concept JSON",
                      {"format", "concepts", "preserve", "general_prior"});
  if (const std::string format = reader.string("format"); format != kConceptsFormat) {
    throw Error("the concept JSON has format " + in_quotes(format) + ", expected '" +
                std::string(kConceptsFormat) + "'");
  }
  ConceptSet set;
  set.general_prior = general_prior_from_string(reader.string("general_prior", "small"));
  const json none = json::array();
  const json& concepts = reader.array("concepts", none);
  const json& preserve = reader.array("preserve", none);
  if (concepts.size() > kMaxConcepts) throw Error("more than 10000 concepts in one list");
  if (preserve.size() > kMaxConcepts) throw Error("more than 10000 preserved phrases");
  const auto reading = [&](size_t i) {
    return notes == nullptr ? ReadText(literal_text) : pasted_text(i + 1, *notes);
  };
  if (notes != nullptr) notes->count("concept");
  for (size_t i = 0; i < concepts.size(); ++i) {
    set.concepts.push_back(
        concept_from_json(concepts[i], "concept " + std::to_string(i + 1), reading(i)));
  }
  if (notes != nullptr) notes->count("preserved phrase");
  for (size_t i = 0; i < preserve.size(); ++i) {
    set.preserve.push_back(
        preserved_from_json(preserve[i], "preserved phrase " + std::to_string(i + 1), reading(i)));
  }
  return set;
}

void check_phrase(const std::string& phrase, const std::string& what) {
  if (phrase.empty()) throw Error(what + " is empty");
  if (count_characters(phrase) > kMaxPhraseCharacters) {
    throw Error(what + " " + in_quotes(phrase, 40) + " is longer than " +
                std::to_string(kMaxPhraseCharacters) + " characters");
  }
}

// JSON brings its phrases as they are. An empty one is told by validate().
void check_words(const std::string& phrase) {
  if (!phrase.empty() && !has_words(phrase)) {
    throw Error(in_quotes(phrase) + " is punctuation alone; write a word");
  }
}

// Without the object around it that names the format: texts as typed in lines, or concepts.
ConceptSet concepts_from_list(std::string_view body, const ConceptDefaults& defaults,
                              ReadingNotes& notes) {
  const json list = parse_json(body, "the concept JSON", kJsonLimits);
  if (list.size() > kMaxConcepts) throw Error("more than 10000 concepts in one list");
  notes.understood(1, "a JSON list, read as one concept an entry");
  notes.count("concept");
  std::vector<std::string> texts;
  for (const json& entry : list) {
    texts.push_back(entry.is_string() ? entry.get<std::string>() : std::string());
  }
  const std::vector<TypedLine> lines = typed_items(texts, notes);
  ConceptSet set;
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string where = "concept " + std::to_string(i + 1);
    if (!list[i].is_string()) {
      set.concepts.push_back(
          concept_from_json(list[i], where, pasted_text(i + 1, notes), defaults));
      continue;
    }
    if (lines[i].text.empty()) throw Error(where + " is empty; write a word, or remove it");
    set.concepts.push_back(read_line(lines[i], where, defaults, notes));
  }
  return set;
}

void check_templates(int templates, const std::string& phrase) {
  if (templates < 1 || templates > kTemplatesPerKind) {
    throw Error("templates for " + in_quotes(phrase) + " must be 1 to " +
                std::to_string(kTemplatesPerKind) + ", not " + std::to_string(templates));
  }
}

}  // namespace

ConceptSet parse_concepts(std::string_view text, const ConceptDefaults& defaults,
                          ReadingNotes* notes) {
  ReadingNotes unused;
  ReadingNotes& told = notes == nullptr ? unused : *notes;
  const std::string body = list_body(text, "the concept list", told);
  ConceptSet set;
  if (is_json_object(body)) {
    set = set_from_json(body, &told);
  } else if (is_json_list(body)) {
    set = concepts_from_list(body, defaults, told);
  } else {
    for (const TypedLine& line : typed_lines(body, "the concept list", told)) {
      const std::string where = "concept line " + std::to_string(line.number);
      set.concepts.push_back(read_line(line, where, defaults, told));
    }
  }
  for (const Concept& item : set.concepts) {
    for (const std::string& phrase : phrases(item)) check_words(phrase);
    check_words(item.anchor);
  }
  for (const PreservedPhrase& item : set.preserve) check_words(item.phrase);
  return set;
}

std::vector<PreservedPhrase> parse_preserve_lines(std::string_view text,
                                                  const ConceptDefaults& defaults,
                                                  ReadingNotes* notes) {
  ReadingNotes unused;
  std::vector<PreservedPhrase> preserve;
  for (TypedPhrase& item :
       typed_phrases(text, "the preserve list", notes == nullptr ? unused : *notes)) {
    preserve.push_back({std::move(item.phrase), defaults.kind, defaults.templates});
  }
  return preserve;
}

ConceptSet merge(const ConceptSet& earlier, const ConceptSet& later) {
  ConceptSet set = earlier;
  set.concepts.insert(set.concepts.end(), later.concepts.begin(), later.concepts.end());
  set.preserve.insert(set.preserve.end(), later.preserve.begin(), later.preserve.end());
  set.general_prior = later.general_prior;
  return set;
}

void validate(const ConceptSet& set) {
  if (set.concepts.empty()) {
    throw Error(
        "no concept to erase: type one phrase a line into 'concepts' ('#' begins a comment)");
  }
  std::unordered_map<std::string, std::string> owner;  // folded phrase -> target it belongs to
  for (const Concept& item : set.concepts) {
    check_phrase(item.target, "a concept");
    check_phrase(item.anchor, "the anchor of " + in_quotes(item.target));
    check_templates(item.templates, item.target);
    for (const std::string& phrase : phrases(item)) {
      check_phrase(phrase, "a synonym of " + in_quotes(item.target));
      if (fold_case(phrase) == fold_case(item.anchor)) {
        throw Error(in_quotes(phrase) +
                    " is its own anchor: nothing would be erased; choose another "
                    "anchor after '->'");
      }
      auto [it, added] = owner.emplace(fold_case(phrase), item.target);
      if (!added) {
        throw Error(in_quotes(phrase) + " is listed twice" +
                    (it->second == item.target ? "" : " (also for " + in_quotes(it->second) + ")") +
                    "; remove one of them");
      }
    }
  }
  std::unordered_map<std::string, bool> preserved;
  for (const PreservedPhrase& item : set.preserve) {
    check_phrase(item.phrase, "a preserved phrase");
    check_templates(item.templates, item.phrase);
    if (owner.contains(fold_case(item.phrase))) {
      throw Error(in_quotes(item.phrase) +
                  " is both erased and preserved; remove it from one list");
    }
    if (!preserved.emplace(fold_case(item.phrase), true).second) {
      throw Error(in_quotes(item.phrase) + " is preserved twice; remove one of them");
    }
  }
}

std::vector<std::string> phrases(const Concept& item) {
  std::vector<std::string> all{item.target};
  all.insert(all.end(), item.synonyms.begin(), item.synonyms.end());
  return all;
}

std::string to_json(const ConceptSet& set) {
  nlohmann::ordered_json root;
  root["format"] = kConceptsFormat;
  root["general_prior"] = to_string(set.general_prior);
  root["concepts"] = json::array();
  for (const Concept& item : set.concepts) {
    nlohmann::ordered_json entry;
    entry["target"] = item.target;
    entry["anchor"] = item.anchor;
    entry["kind"] = to_string(item.kind);
    if (!item.synonyms.empty()) entry["synonyms"] = item.synonyms;
    entry["templates"] = item.templates;
    if (!item.comment.empty()) entry["comment"] = item.comment;
    root["concepts"].push_back(std::move(entry));
  }
  root["preserve"] = json::array();
  for (const PreservedPhrase& item : set.preserve) {
    nlohmann::ordered_json entry;
    entry["phrase"] = item.phrase;
    entry["kind"] = to_string(item.kind);
    entry["templates"] = item.templates;
    root["preserve"].push_back(std::move(entry));
  }
  try {
    return root.dump(2);
  } catch (const json::exception&) {
    throw Error("a concept holds text that is not valid UTF-8; type it again");
  }
}

ConceptSet concept_set_from_json(std::string_view text) { return set_from_json(text, nullptr); }

}  // namespace lacuna
