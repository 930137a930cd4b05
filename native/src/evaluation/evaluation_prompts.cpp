// SPDX-License-Identifier: Apache-2.0
#include "lacuna/evaluation/evaluation_prompts.h"

#include <algorithm>
#include <set>

#include "lacuna/closed_form/general_prior.h"
#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/error.h"
#include "lacuna/evaluation/attack.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

// Index of the concept that a prompt of the file is about.
size_t concept_of(const FilePrompt& prompt, const ConceptSet& set, const std::string& file) {
  const std::string where =
      "the prompt file " + file + ", line " + std::to_string(prompt.line) + ", ";
  if (prompt.about.empty()) {
    if (set.concepts.size() == 1) return 0;
    throw Error(where + "does not say which of the " + std::to_string(set.concepts.size()) +
                " concepts it is about; add a column 'concept' (.csv), or connect a Concept Set "
                "with one concept");
  }
  for (size_t i = 0; i < set.concepts.size(); ++i) {
    for (const std::string& phrase : phrases(set.concepts[i])) {
      if (fold_case(phrase) == fold_case(prompt.about)) return i;
    }
  }
  throw Error(where + "is about '" + prompt.about + "', which is not in the Concept Set");
}

std::vector<EvaluationPrompt> file_prompts(const ConceptSet& set,
                                           const EvaluationOptions& options) {
  std::vector<EvaluationPrompt> prompts;
  const auto n = static_cast<int64_t>(options.file.size());
  const int64_t used = std::min(n, options.file_prompts);
  for (int64_t i = 0; i < used; ++i) {
    const FilePrompt& line = options.file[static_cast<size_t>(i * n / used)];
    const size_t index = concept_of(line, set, options.file_name);
    const Concept& item = set.concepts[index];
    const std::string_view form = prompt_templates(item.kind).front();
    EvaluationPrompt prompt;
    prompt.list = PromptList::kFile;
    prompt.concept_index = static_cast<int64_t>(index);
    prompt.phrase = line.text;
    prompt.name = line.name.empty() ? item.target : line.name;
    prompt.text = line.text;
    prompt.alternative = fill_template(form, item.anchor);
    prompt.question = fill_template(form, item.target);
    prompts.push_back(std::move(prompt));
  }
  return prompts;
}

}  // namespace

void check_prompt_file(const ConceptSet& set, const EvaluationOptions& options) {
  for (const FilePrompt& prompt : options.file) concept_of(prompt, set, options.file_name);
}

std::vector<EvaluationPrompt> evaluation_prompts(
    const ConceptSet& set, const EvaluationOptions& options, const ResidualScan& scan,
    const std::vector<std::vector<std::string>>& searched) {
  std::vector<EvaluationPrompt> prompts;
  const auto add = [&](PromptList list, int64_t index, ConceptKind kind, int64_t number,
                       const std::string& phrase, const std::string& name,
                       const std::string& anchor) {
    const std::string_view form =
        prompt_templates(kind)[static_cast<size_t>(number % kTemplatesPerKind)];
    prompts.push_back(
        {list, index, phrase, name, fill_template(form, phrase), fill_template(form, anchor)});
  };

  std::vector<std::string> all_phrases;
  for (size_t i = 0; i < set.concepts.size(); ++i) {
    const Concept& item = set.concepts[i];
    const auto index = static_cast<int64_t>(i);
    for (int64_t k = 0; k < options.prompts; ++k) {
      add(PromptList::kTarget, index, item.kind, k, item.target, item.target, item.anchor);
    }
    std::vector<std::string> forms = item.synonyms;
    for (const PhraseResidual& variant : phrase_variants(item.target)) {
      if (variant.form == "plural" || variant.form == "typo") forms.push_back(variant.phrase);
    }
    for (int64_t k = 0; k < options.prompts && !forms.empty(); ++k) {
      add(PromptList::kSynonyms, index, item.kind, k, forms[static_cast<size_t>(k) % forms.size()],
          item.target, item.anchor);
    }
    for (const std::string& phrase : phrases(item)) all_phrases.push_back(phrase);
  }

  for (EvaluationPrompt& prompt : attack_prompts(set, options, scan, searched)) {
    prompts.push_back(std::move(prompt));
  }
  for (EvaluationPrompt& prompt : file_prompts(set, options)) prompts.push_back(std::move(prompt));

  // Of a list that is longer than asked for, every n-th; of a shorter one, several templates.
  const auto concepts = static_cast<int64_t>(set.concepts.size());
  const int64_t wanted = options.prompts * concepts;
  const auto add_kept = [&](PromptList list, const std::vector<PreservedPhrase>& words) {
    const auto n = static_cast<int64_t>(words.size());
    if (n == 0) return;
    const int64_t used = std::min(n, wanted);
    const int64_t each = std::max<int64_t>(1, options.prompts / used);
    for (int64_t i = 0; i < used; ++i) {
      const PreservedPhrase& word = words[static_cast<size_t>(i * n / used)];
      for (int64_t k = 0; k < each; ++k) {
        add(list, -1, word.kind, each * i + k, word.phrase, word.phrase,
            set.concepts.front().anchor);
      }
    }
  };
  add_kept(PromptList::kPreserved, set.preserve);
  std::vector<PreservedPhrase> near;
  for (const std::string& word : options.neighbours) {
    near.push_back({word, set.concepts.front().kind, 1});
  }
  if (options.neighbours.empty()) {
    std::set<std::string> known;
    for (const ConceptResidual& item : scan.concepts) {
      int64_t taken = 0;
      for (const std::string& word : item.neighbours) {
        if (taken == options.prompts) break;
        ++taken;
        if (known.insert(word).second) near.push_back({word, ConceptKind::kObject, 1});
      }
    }
  }
  add_kept(PromptList::kNeighbours, near);

  for (const PreservedPhrase& item : set.preserve) all_phrases.push_back(item.phrase);
  const std::vector<std::string> named = captions_naming(GeneralPriorSize::kFull, all_phrases);
  const std::set<std::string> left_out(named.begin(), named.end());
  const std::span<const std::string_view> captions = generic_captions(GeneralPriorSize::kFull);
  // Past the small prior, which an edit may have been told to protect.
  const size_t first = generic_captions(GeneralPriorSize::kSmall).size();
  const size_t stride = (captions.size() - first) / static_cast<size_t>(options.prompts);
  for (int64_t k = 0; k < options.prompts; ++k) {
    size_t at = first + static_cast<size_t>(k) * stride;
    while (at + 1 < captions.size() && left_out.contains(std::string(captions[at]))) ++at;
    prompts.push_back({PromptList::kUnrelated, -1, "", "", std::string(captions[at]), ""});
  }
  return prompts;
}

int64_t pairs_at(EvaluationLevel level, const ConceptSet& set, EvaluationOptions options,
                 const ResidualScan& scan) {
  options.level = level;
  auto prompts = static_cast<int64_t>(evaluation_prompts(set, options, scan).size());
  // What a search will find.
  if (level == EvaluationLevel::kThorough) {
    prompts += options.prompts * static_cast<int64_t>(set.concepts.size());
  }
  return prompts * options.images;
}

}  // namespace lacuna
