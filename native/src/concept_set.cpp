// SPDX-License-Identifier: Apache-2.0
#include "lacuna/concept_set.h"

#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_map>
#include <utility>

#include "lacuna/error.h"
#include "lacuna/prompt_templates.h"
#include "lacuna/text.h"

namespace lacuna {
namespace {

using nlohmann::json;

constexpr std::string_view kConceptsFormat = "lacuna.concepts/1";
constexpr size_t kMaxTextBytes = 4u << 20;
constexpr size_t kMaxConcepts = 10'000;
constexpr size_t kMaxPhraseBytes = 500;

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
  throw Error("unknown " + std::string(what) + " '" + std::string(name) +
              "'; use one of: " + known);
}

std::string in_quotes(std::string_view phrase) { return "'" + std::string(phrase) + "'"; }

std::vector<std::string> split_synonyms(const std::string& text) {
  std::vector<std::string> synonyms;
  size_t begin = 0;
  while (begin <= text.size()) {
    size_t end = std::min(text.find(',', begin), text.size());
    std::string phrase = normalize_phrase(std::string_view(text).substr(begin, end - begin));
    if (!phrase.empty()) synonyms.push_back(std::move(phrase));
    begin = end + 1;
  }
  return synonyms;
}

std::optional<Concept> parse_line(const std::string& line, size_t number,
                                  const ConceptDefaults& defaults) {
  const auto [text, comment] = split_comment(line);
  std::string body(text);
  if (normalize_phrase(body).empty()) return std::nullopt;
  auto fail = [&](const std::string& what) -> Error {
    return Error("concept line " + std::to_string(number) + ": " + what +
                 "; write it as: target -> anchor | synonym, synonym");
  };

  Concept item;
  item.kind = defaults.kind;
  item.templates = defaults.templates;
  item.comment = normalize_phrase(comment);
  if (size_t bar = body.find('|'); bar != std::string::npos) {
    if (body.find('|', bar + 1) != std::string::npos) throw fail("more than one '|'");
    item.synonyms = split_synonyms(body.substr(bar + 1));
    if (item.synonyms.empty()) throw fail("nothing after '|'");
    body.resize(bar);
  }
  if (size_t arrow = body.find("->"); arrow != std::string::npos) {
    if (body.find("->", arrow + 2) != std::string::npos) throw fail("more than one '->'");
    item.anchor = normalize_phrase(std::string_view(body).substr(arrow + 2));
    if (item.anchor.empty()) throw fail("nothing after '->'");
    body.resize(arrow);
  } else {
    item.anchor = defaults.anchor.empty() ? std::string(default_anchor(defaults.kind))
                                          : normalize_phrase(defaults.anchor);
  }
  item.target = normalize_phrase(body);
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
      if (!found) throw Error(where_ + " has an unknown member '" + key + "'");
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

Concept concept_from_json(const json& value, const std::string& where) {
  ObjectReader reader(value, where,
                      {"target", "anchor", "kind", "synonyms", "templates", "comment"});
  Concept item;
  item.target = normalize_phrase(reader.string("target"));
  item.kind = concept_kind_from_string(reader.string("kind", "object"));
  item.anchor = normalize_phrase(reader.string("anchor", std::string(default_anchor(item.kind))));
  item.templates = reader.integer("templates", kTemplatesPerKind);
  item.comment = reader.string("comment", "");
  const json none = json::array();
  for (const json& synonym : reader.array("synonyms", none)) {
    if (!synonym.is_string()) throw Error(where + ": every synonym must be text");
    item.synonyms.push_back(normalize_phrase(synonym.get<std::string>()));
  }
  return item;
}

PreservedPhrase preserved_from_json(const json& value, const std::string& where) {
  PreservedPhrase item;
  if (value.is_string()) {
    item.phrase = normalize_phrase(value.get<std::string>());
    return item;
  }
  ObjectReader reader(value, where, {"phrase", "kind", "templates"});
  item.phrase = normalize_phrase(reader.string("phrase"));
  item.kind = concept_kind_from_string(reader.string("kind", "object"));
  item.templates = reader.integer("templates", kTemplatesPerKind);
  return item;
}

void check_phrase(const std::string& phrase, const std::string& what) {
  if (phrase.empty()) throw Error(what + " is empty");
  if (phrase.size() > kMaxPhraseBytes) {
    throw Error(what + " " + in_quotes(phrase.substr(0, 40) + "...") + " is longer than " +
                std::to_string(kMaxPhraseBytes) + " characters");
  }
}

void check_templates(int templates, const std::string& phrase) {
  if (templates < 1 || templates > kTemplatesPerKind) {
    throw Error("templates for " + in_quotes(phrase) + " must be 1 to " +
                std::to_string(kTemplatesPerKind) + ", not " + std::to_string(templates));
  }
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

ConceptSet parse_concepts(std::string_view text, const ConceptDefaults& defaults) {
  if (text.size() > kMaxTextBytes) throw Error("the concept list is larger than 4 MiB");
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first != std::string_view::npos && text[first] == '{') return concept_set_from_json(text);

  ConceptSet set;
  size_t number = 0;
  for (const std::string& line : split_lines(text)) {
    ++number;
    if (auto item = parse_line(line, number, defaults)) set.concepts.push_back(std::move(*item));
    if (set.concepts.size() > kMaxConcepts) throw Error("more than 10000 concepts in one list");
  }
  return set;
}

std::vector<PreservedPhrase> parse_preserve_lines(std::string_view text,
                                                  const ConceptDefaults& defaults) {
  if (text.size() > kMaxTextBytes) throw Error("the preserve list is larger than 4 MiB");
  std::vector<PreservedPhrase> preserve;
  for (const std::string& line : split_lines(text)) {
    std::string phrase = normalize_phrase(split_comment(line).first);
    if (phrase.empty()) continue;
    preserve.push_back({std::move(phrase), defaults.kind, defaults.templates});
    if (preserve.size() > kMaxConcepts) throw Error("more than 10000 preserved phrases");
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
    throw Error("no concept to erase: type one phrase a line into 'concepts'");
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

ConceptSet concept_set_from_json(std::string_view text) {
  if (text.size() > kMaxTextBytes) throw Error("the concept file is larger than 4 MiB");
  json root;
  try {
    // The callback bounds nesting: deep input must not exhaust the stack.
    root = json::parse(text, [](int depth, json::parse_event_t, json&) {
      if (depth > 8) throw Error("the concept JSON is nested too deeply");
      return true;
    });
  } catch (const json::exception& e) {
    throw Error(std::string("the concept JSON cannot be read: ") + e.what());
  }
  ObjectReader reader(root, "the concept JSON",
                      {"format", "concepts", "preserve", "general_prior"});
  if (const std::string format = reader.string("format"); format != kConceptsFormat) {
    throw Error("the concept JSON has format '" + format + "', expected '" +
                std::string(kConceptsFormat) + "'");
  }
  ConceptSet set;
  set.general_prior = general_prior_from_string(reader.string("general_prior", "small"));
  const json none = json::array();
  const json& concepts = reader.array("concepts", none);
  const json& preserve = reader.array("preserve", none);
  if (concepts.size() > kMaxConcepts) throw Error("more than 10000 concepts in one list");
  if (preserve.size() > kMaxConcepts) throw Error("more than 10000 preserved phrases");
  for (size_t i = 0; i < concepts.size(); ++i) {
    set.concepts.push_back(concept_from_json(concepts[i], "concept " + std::to_string(i + 1)));
  }
  for (size_t i = 0; i < preserve.size(); ++i) {
    set.preserve.push_back(
        preserved_from_json(preserve[i], "preserved phrase " + std::to_string(i + 1)));
  }
  return set;
}

}  // namespace lacuna
