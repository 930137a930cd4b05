// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lacuna {

// Lists that people type, or paste from a chat, a document, a spreadsheet, a program. What can only
// mean one thing is read as that and noted; what is a guess is noted as a doubt, or refused.

// What was understood and what is in doubt, for the report.
class ReadingNotes {
 public:
  // What the numbers count from here on, e.g. "concept" of a JSON list; at first "line".
  void count(std::string_view unit);
  const std::string& unit() const { return unit_; }
  void understood(size_t line, const std::string& what);  // e.g. "bullets left out"
  void doubt(size_t line, const std::string& sentence);
  // One sentence a line: equal ones are told once with the numbers of their lines, doubts last.
  std::string text() const;

 private:
  struct Note {
    std::string what;
    std::string unit;
    std::vector<size_t> lines;
  };
  std::vector<Note> understood_;
  std::vector<Note> doubts_;  // the first ones
  size_t more_doubts_ = 0;
  std::string unit_ = "line";
};

struct TypedLine {
  size_t number;        // from 1, as an editor counts
  std::string text;     // normalized (see normalize_phrase), never empty
  std::string comment;  // normalized
};

// `text` without what is around a list: a byte-order mark, lines of a code fence (they become empty
// lines). `list` names it in errors, e.g. "the concept list": text that is not UTF-8, text outside
// a fence, more than 4 MiB.
std::string list_body(std::string_view text, const std::string& list, ReadingNotes& notes);

// Whether a body is JSON, an object or a list, rather than lines.
bool is_json_object(std::string_view body);
bool is_json_list(std::string_view body);

// The lines that say something, without comments, bullets, numbers of a numbered list, ruled lines
// and separators at the end. More than 10,000 are an Error.
std::vector<TypedLine> typed_lines(std::string_view body, const std::string& list,
                                   ReadingNotes& notes);

// What one line or one text of a JSON list says, normalized: what web pages write for characters
// ("&quot;") is read, bullets and separators at the end are left out.
std::string without_marks(std::string_view text, size_t number, ReadingNotes& notes);

// The texts of a JSON list, read as lines are, but for comments.
std::vector<TypedLine> typed_items(const std::vector<std::string>& texts, ReadingNotes& notes);

// Where a phrase stands, for what to advise where "owl - star" may be two.
enum class PhrasePlace { kTarget, kBesideArrow, kAlone };

// One phrase without quotes and emphasis around it. `where` begins errors, e.g. "concept line 3":
// prompt syntax (weights, wildcards, LoRAs), punctuation alone, several phrases split by ';'.
// Commas are a doubt, and so are other marks that may divide it unless it stands in quotes, words
// that are commands in prompts, and names of embeddings. Empty text stays empty.
std::string typed_phrase(std::string_view text, size_t line, const std::string& where,
                         ReadingNotes& notes, PhrasePlace place = PhrasePlace::kBesideArrow);
// `phrase` without the quotes and the emphasis that stand around all of it, which are noted.
std::string unquoted(std::string phrase, size_t line, ReadingNotes& notes);
// The same refusal for a whole line, before it is split.
void refuse_prompt_syntax(std::string_view text, const std::string& where);

// Whether there is anything in it but punctuation.
bool has_words(std::string_view phrase);

// Where an arrow stands in a line: "->" and all that can only mean it ("=>", "-->", "→", ...).
// Throws Error for one that points left, and for a bare " > ".
struct ArrowPlace {
  size_t begin;
  size_t size;
};
std::optional<ArrowPlace> find_arrow(std::string_view text, const std::string& where);
// Where the first of '|' and its full-width form stands, and its size; size 0: nowhere.
std::pair<size_t, size_t> find_bar(std::string_view text);
// Whether there is anything in it that parts a phrase from something else. Throws as find_arrow.
bool holds_arrow_or_bar(std::string_view text, const std::string& where);

// A list of phrases and nothing else, one a line or as a JSON list of texts: what to preserve,
// neighbours. `list` names it as above. Throws Error for arrows and '|', too.
struct TypedPhrase {
  size_t line;
  std::string phrase;
};
std::vector<TypedPhrase> typed_phrases(std::string_view text, const std::string& list,
                                       ReadingNotes& notes);

}  // namespace lacuna
