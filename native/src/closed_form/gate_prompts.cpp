// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/gate_prompts.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>
#include <utility>

#include "lacuna/concepts/concept_prompts.h"
#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/files/random_stream.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

constexpr int kPlainPrompts = 8;  // of the concept's own templates

constexpr std::array<std::string_view, 8> kBesideOthers{"{} and {1}",
                                                        "a photo of {} with {1}",
                                                        "{1} and {}",
                                                        "{1}, {2}, {}",
                                                        "a picture of {1} beside {}",
                                                        "a drawing of {1} and {} in {2} style",
                                                        "a large {1} on a {2} next to {}, sunset",
                                                        "{1} {2} {}"};

// So many other words before the phrase: its rows depend on where it stands.
constexpr std::array<size_t, 3> kWordsBefore{6, 14, 30};

// A prompt that names a phrase, and where the phrase's last token stands.
struct NamingPrompt {
  std::string text;
  int64_t last_token;
};

std::vector<NamingPrompt> naming_prompts(TextEncoder& encoder, ConceptKind kind,
                                         const std::string& phrase,
                                         const std::vector<std::string>& words) {
  std::vector<std::string> templates;
  for (std::string_view each : prompt_templates(kind).first(kPlainPrompts)) {
    templates.emplace_back(each);
  }
  const auto first = static_cast<size_t>(stable_hash(phrase) % words.size());
  const std::string folded = fold_case(phrase);
  // Another word, whatever the phrase says.
  const auto companion = [&](size_t which) -> const std::string& {
    const std::string& word = words[(first + which) % words.size()];
    return names_phrase(folded, word) ? words[(first + which + 1) % words.size()] : word;
  };
  for (size_t i = 0; i < kBesideOthers.size(); ++i) {
    templates.push_back(
        fill_companions(kBesideOthers[i], companion(i * 17 + 101), companion(i * 17 + 202)));
  }
  for (const size_t before : kWordsBefore) {
    std::string text;
    for (size_t i = 0; i < before; ++i) {
      text += companion(before * 13 + i * 7) + (i % 3 ? " " : ", ");
    }
    templates.push_back(text + "{}, " + companion(before));
  }
  const auto tokens = static_cast<int64_t>(encoder.tokenize(phrase).size()) - 2;
  std::vector<NamingPrompt> prompts;
  for (const std::string& each : templates) {
    const std::string before = prefix_of_template(each);
    const int64_t begin =
        before.empty() ? 0 : static_cast<int64_t>(encoder.tokenize(before).size()) - 2;
    const int64_t last_token = begin + tokens;
    // A window that ends before the phrase does says nothing of it.
    if (prompts.size() < static_cast<size_t>(kPlainPrompts) || last_token < encoder.window()) {
      prompts.push_back({fill_template(each, phrase), std::min(last_token, encoder.window() - 1)});
    }
  }
  return prompts;
}

// [prompts, 2 d]
at::Tensor read_tokens(TextEncoder& encoder, ConceptKind kind, const std::string& phrase,
                       const std::vector<std::string>& words, Progress& progress) {
  std::vector<std::string> texts;
  std::vector<int64_t> places;
  for (NamingPrompt& each : naming_prompts(encoder, kind, phrase, words)) {
    texts.push_back(std::move(each.text));
    places.push_back(each.last_token);
  }
  const std::vector<at::Tensor> starts = encode_starts(encoder, texts, progress);
  std::vector<at::Tensor> tokens;
  for (size_t i = 0; i < starts.size(); ++i) {
    const int64_t place = std::min(places[i], starts[i].size(0) - 1);
    tokens.push_back(at::cat({starts[i][place], starts[i][place - 1]}).to(at::kFloat));
  }
  return at::stack(tokens);
}

}  // namespace

std::vector<NamedPhrase> read_named_phrases(TextEncoder& encoder,
                                            const std::vector<Concept>& concepts,
                                            const std::vector<std::string>& words,
                                            StatisticsCache* cache, Progress& progress) {
  const std::string fingerprint = encoder.fingerprint();
  std::vector<NamedPhrase> out;
  for (size_t i = 0; i < concepts.size(); ++i) {
    const Concept& item = concepts[i];
    for (const std::string& phrase : phrases(item)) {
      progress.status("learning which prompts name " + in_quotes(phrase, 40));
      const std::string key = "naming\n" + std::string(to_string(item.kind)) + '\n' +
                              std::to_string(words.size()) + '\n' + phrase;
      const auto tokens = remembered(cache, fingerprint, key, [&] {
        return std::vector<at::Tensor>{read_tokens(encoder, item.kind, phrase, words, progress)};
      });
      const auto ends =
          remembered(cache, fingerprint, prompt_ends_key(item.kind, item.templates, phrase), [&] {
            const std::vector<std::string> plain =
                fill_templates(item.kind, std::min(item.templates, kPromptEnds), phrase);
            const at::Tensor read = embed_in_batches(encoder, plain, progress).context;
            return std::vector<at::Tensor>{read.select(1, encoder.window() - 1).clone()};
          });
      out.push_back({phrase, i, tokens.front(), ends.front()});
      progress.report(static_cast<int64_t>(i + 1), static_cast<int64_t>(concepts.size()));
    }
  }
  return out;
}

}  // namespace lacuna
