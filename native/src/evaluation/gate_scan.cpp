// SPDX-License-Identifier: Apache-2.0
#include "lacuna/evaluation/gate_scan.h"

#include <algorithm>
#include <array>
#include <set>
#include <string_view>
#include <utility>

#include "lacuna/closed_form/general_prior.h"
#include "lacuna/closed_form/retain_set.h"
#include "lacuna/concepts/concept_prompts.h"
#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/error.h"
#include "lacuna/evaluation/attack.h"
#include "lacuna/evaluation/residual_scan.h"
#include "lacuna/files/random_stream.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

constexpr size_t kConceptsInFull = 16;  // of more, one prompt of every form
constexpr size_t kFirstTemplate = 8;    // a gate is fitted on those before
constexpr size_t kPlain = 6;
constexpr size_t kOfEachOther = 2;  // prompts of a phrase that should stay
constexpr size_t kMostOthers = 40;
constexpr size_t kOfTheClass = 20;
constexpr size_t kCaptions = 60;

constexpr std::array<std::string_view, 6> kBeside{
    "{} in front of a {1}", "a photo of a {1} and {}", "a {1} near {} at night",
    "{1}, {}, {2}",         "a {2} {1}, behind it {}", "{}, with a {1} and a {2}"};
constexpr std::array<std::string_view, 4> kLong{
    "a highly detailed oil painting of a {1} in front of a wide {2} with {} beside it, dramatic "
    "light, warm colours, sharp focus",
    "close up, soft focus, morning mist over an old town, a {1} on the left, a {2} on the right, "
    "and {} between them",
    "{} seen from below, low sun, long shadows, a {1} far away, dust in the air, wide angle, film "
    "grain, muted colours, a {2} at the edge",
    "award winning photograph, 8k, a {1} with a {2}, rain on the window, reflections, {}, neon "
    "signs, cinematic"};

using Prompts = std::vector<std::string>;

std::vector<std::string_view> plain_templates(ConceptKind kind, size_t count) {
  const auto all = prompt_templates(kind).subspan(kFirstTemplate, count);
  return {all.begin(), all.end()};
}

// Two other words for each template; which ones depends on the phrase alone.
template <size_t N>
Prompts beside_others(const std::array<std::string_view, N>& templates, const std::string& phrase,
                      const Prompts& words) {
  Prompts prompts;
  const auto first = static_cast<size_t>(stable_hash(phrase) % words.size());
  for (size_t i = 0; i < N; ++i) {
    const auto word = [&](size_t which) { return words[(first + 29 * i + which) % words.size()]; };
    prompts.push_back(fill_template(fill_companions(templates[i], word(0), word(13)), phrase));
  }
  return prompts;
}

// Words that the encoder knows and that say nothing of what is listed: common ones, or, of an
// encoder that knows few of them, any.
Prompts other_words(TextEncoder& encoder, const ConceptSet& set) {
  constexpr size_t kEnough = 50;
  Prompts listed;
  for (const Concept& item : set.concepts) {
    for (const std::string& phrase : phrases(item)) listed.push_back(fold_case(phrase));
  }
  const auto says_what_is_listed = [&](const std::string& word) {
    return std::any_of(listed.begin(), listed.end(), [&](const std::string& phrase) {
      return names_phrase(phrase, word) || names_phrase(word, phrase);
    });
  };
  Prompts known = encoder.vocabulary();
  const std::set<std::string> is_known(known.begin(), known.end());
  Prompts words = common_words();
  if (!known.empty()) {
    std::erase_if(words, [&](const std::string& word) { return !is_known.contains(word); });
    if (words.size() < kEnough) words = std::move(known);
  }
  std::erase_if(
      words, [&](const std::string& word) { return word.size() < 3 || says_what_is_listed(word); });
  return words.empty() ? Prompts{"thing"} : words;
}

class GateReader {
 public:
  GateReader(Denoiser& edited, TextEncoder& encoder, Progress& progress)
      : edited_(edited), encoder_(encoder), progress_(progress) {}

  // Undefined where no gated edit is on the model.
  at::Tensor acts_on(const Prompts& prompts) {
    const at::Tensor acts = edited_.acts_on(embed_in_batches(encoder_, prompts, progress_).context);
    if (acts.defined() && acts.numel() != static_cast<int64_t>(prompts.size())) {
      throw Error("the host did not say for every prompt whether the edit acts on it");
    }
    return acts;
  }

  GateCount count(std::string form, const Prompts& prompts, bool should_act) {
    GateCount out{std::move(form), {}, {}};
    if (prompts.empty()) return out;
    const at::Tensor acts = acts_on(prompts);
    for (size_t i = 0; i < prompts.size(); ++i) {
      const bool acted = acts[static_cast<int64_t>(i)].item<bool>();
      ++out.acted.trials;
      out.acted.hits += acted;
      if (acted != should_act) out.wrong.push_back(prompts[i]);
    }
    return out;
  }

 private:
  Denoiser& edited_;
  TextEncoder& encoder_;
  Progress& progress_;
};

Count added(Count sum, const Count& count) {
  return {sum.hits + count.hits, sum.trials + count.trials};
}

}  // namespace

Count GateScan::named() const {
  Count sum;
  for (const ConceptGate& item : concepts) {
    for (const GateCount& form : item.named) sum = added(sum, form.acted);
  }
  return sum;
}

Count GateScan::disguised() const {
  Count sum;
  for (const ConceptGate& item : concepts) sum = added(sum, item.disguised.acted);
  return sum;
}

GateScan scan_gate(Denoiser& edited, TextEncoder& encoder, const ConceptSet& set,
                   const std::vector<std::string>& neighbours, Progress& progress) {
  GateReader reader(edited, encoder, progress);
  GateScan scan;
  scan.gated = reader.acts_on({""}).defined();
  if (!scan.gated) return scan;
  progress.status("reading prompts that name a concept, and others");

  const Prompts words = other_words(encoder, set);
  for (size_t i = 0; i < set.concepts.size(); ++i) {
    const Concept& item = set.concepts[i];
    const auto some = [&](Prompts prompts) {
      if (set.concepts.size() <= kConceptsInFull || prompts.empty()) return prompts;
      return Prompts{prompts[i % prompts.size()]};
    };
    Prompts alone, synonyms, disguised;
    for (std::string_view each : plain_templates(item.kind, kPlain)) {
      alone.push_back(fill_template(each, item.target));
    }
    for (const std::string& synonym : item.synonyms) {
      for (std::string_view each : plain_templates(item.kind, kOfEachOther)) {
        synonyms.push_back(fill_template(each, synonym));
      }
    }
    for (const std::string& form : paraphrases(item.target)) {
      disguised.push_back(fill_template(prompt_templates(item.kind)[kFirstTemplate], form));
    }
    ConceptGate gate;
    gate.target = item.target;
    for (auto& [form, prompts] :
         {std::pair{"alone", alone},
          {"synonyms", synonyms},
          {"beside other things", beside_others(kBeside, item.target, words)},
          {"in long prompts", beside_others(kLong, item.target, words)}}) {
      GateCount count = reader.count(form, some(prompts), true);
      if (count.acted.trials > 0) gate.named.push_back(std::move(count));
    }
    gate.disguised = reader.count("disguised", some(disguised), true);
    scan.concepts.push_back(std::move(gate));
    progress.report(static_cast<int64_t>(i + 1), static_cast<int64_t>(set.concepts.size()));
  }

  const auto of_phrases = [&](const std::vector<std::pair<std::string, ConceptKind>>& stay) {
    Prompts prompts;
    for (const auto& [phrase, kind] : stay) {
      for (std::string_view each : plain_templates(kind, kOfEachOther)) {
        if (prompts.size() < kMostOthers) prompts.push_back(fill_template(each, phrase));
      }
    }
    return prompts;
  };
  std::vector<std::pair<std::string, ConceptKind>> preserved, similar, of_the_class;
  for (const PreservedPhrase& item : set.preserve) preserved.emplace_back(item.phrase, item.kind);
  for (const std::string& word : neighbours) similar.emplace_back(word, ConceptKind::kObject);
  const Prompts frames = shared_frames(set.concepts);
  for (size_t f = 1; f < frames.size(); ++f) {  // the first is the word alone
    for (size_t i = 0; i < kOfTheClass; ++i) {
      of_the_class.emplace_back(fill_template(frames[f], words[i * words.size() / kOfTheClass]),
                                set.concepts.front().kind);
    }
  }
  Prompts erased, captions;
  for (const Concept& item : set.concepts) {
    for (std::string& phrase : phrases(item)) erased.push_back(std::move(phrase));
  }
  const Prompts named = captions_naming(GeneralPriorSize::kSmall, erased);
  const auto all = generic_captions(GeneralPriorSize::kSmall);
  for (size_t i = 0; i < all.size(); i += std::max<size_t>(1, all.size() / kCaptions)) {
    const std::string caption(all[i]);
    if (std::find(named.begin(), named.end(), caption) == named.end()) captions.push_back(caption);
  }
  for (auto& [form, prompts] :
       {std::pair{"preserved", of_phrases(preserved)},
        {"similar words that nobody listed", of_phrases(similar)},
        {"other words in what the concepts share", of_phrases(of_the_class)},
        {"unrelated captions", captions}}) {
    GateCount count = reader.count(form, prompts, false);
    if (count.acted.trials > 0) scan.others.push_back(std::move(count));
  }
  return scan;
}

}  // namespace lacuna
