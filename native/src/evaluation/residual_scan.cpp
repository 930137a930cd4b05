// SPDX-License-Identifier: Apache-2.0
#include "lacuna/evaluation/residual_scan.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "lacuna/closed_form/general_prior.h"
#include "lacuna/closed_form/text_entry.h"
#include "lacuna/closed_form/text_statistics.h"
#include "lacuna/concepts/concept_prompts.h"
#include "lacuna/concepts/token_alignment.h"
#include "lacuna/error.h"
#include "lacuna/files/cached_tensor.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

constexpr std::string_view kPrefix = "a photo of ";
constexpr size_t kMostWords = 256;
constexpr size_t kShownWords = 10;
constexpr size_t kClosestWords = 40;
constexpr double kLeak = 0.5;  // share of the concept's content from which on a word leaks
// Raised when the word list changes, so that old cache files are not used.
constexpr std::string_view kWordsVersion = "1";
constexpr std::string_view kCommonWordsFormat = "lacuna.common_words/2";

// What the model reads of a phrase in the prompt "a photo of <phrase>".
struct ReadPhrase {
  at::Tensor tokens;   // [k, d], the phrase's own positions
  at::Tensor end;      // [1, d], end of text
  at::Tensor padding;  // [1, d], the last position
};

struct ModelForms : WeightForms {
  bool differ = false;
};

double sum_of(const at::Tensor& left, const at::Tensor& form, const at::Tensor& right) {
  return (at::matmul(left, form) * right).sum().item<double>();
}

std::vector<ReadPhrase> encode_phrases(TextEncoder& encoder,
                                       const std::vector<std::string>& phrases,
                                       Progress& progress) {
  const std::string prefix(kPrefix);
  const auto begin = static_cast<int64_t>(encoder.tokenize(prefix).size()) - 1;
  std::vector<ReadPhrase> rows;
  for (size_t first = 0; first < phrases.size(); first += kPromptsPerCall) {
    progress.check();
    const size_t last = std::min(phrases.size(), first + kPromptsPerCall);
    std::vector<std::string> prompts;
    for (size_t i = first; i < last; ++i) prompts.push_back(prefix + phrases[i]);
    const at::Tensor context = encoder.encode(prompts).detach().to(at::kCPU, at::kDouble);
    for (size_t i = first; i < last; ++i) {
      const at::Tensor prompt = context[static_cast<int64_t>(i - first)];
      const int64_t window = prompt.size(0);
      const int64_t end = std::min<int64_t>(
          window - 1, static_cast<int64_t>(encoder.tokenize(prompts[i - first]).size()) - 1);
      if (end <= begin) {
        throw Error("the text encoder reads nothing in '" + phrases[i] + "'; use other words");
      }
      rows.push_back({prompt.narrow(0, begin, end - begin).clone(),
                      prompt.narrow(0, end, 1).clone(), prompt.narrow(0, window - 1, 1).clone()});
    }
  }
  return rows;
}

// Last own token and end of text, [2, d]: where a causal encoder gathers a word's meaning.
at::Tensor summary(const ReadPhrase& rows) {
  return at::cat({rows.tokens.narrow(0, rows.tokens.size(0) - 1, 1), rows.end});
}

// Phrase and anchor position by position: tokens, then end of text and padding. [k + 2, d] each.
std::pair<at::Tensor, at::Tensor> paired(const ReadPhrase& phrase, const ReadPhrase& anchor) {
  const TokenAlignment alignment =
      align_phrases({0, phrase.tokens.size(0)}, {0, anchor.tokens.size(0)});
  std::vector<at::Tensor> from;
  std::vector<at::Tensor> to;
  for (size_t i = 0; i < alignment.target.size(); ++i) {
    from.push_back(phrase.tokens[alignment.target[i]]);
    to.push_back(anchor.tokens[alignment.anchor[i]]);
  }
  return {at::cat({at::stack(from), phrase.end, phrase.padding}),
          at::cat({at::stack(to), anchor.end, anchor.padding})};
}

// One pass over the weights: the forms, and every concept's table of layers. from, to: [n, d], the
// concepts' paired rows one below the other.
ModelForms collect_forms(Denoiser& base, Denoiser& edited,
                         const std::vector<TextEntry>& projections, const at::Tensor& from,
                         const at::Tensor& to, std::vector<ConceptResidual>& concepts,
                         Progress& progress) {
  const int64_t d = from.size(1);
  ModelForms forms;
  for (at::Tensor* form : {&forms.base, &forms.cross, &forms.edit}) {
    *form = at::zeros({d, d}, at::kDouble);
  }
  for (const TextEntry& projection : projections) {
    progress.check();
    const at::Tensor weight = base.effective_weight(projection.name).detach().to(at::kFloat);
    const at::Tensor after = edited.effective_weight(projection.name).detach().to(weight.options());
    if (!at::isfinite(after).all().item<bool>() || !at::isfinite(weight).all().item<bool>()) {
      throw Error("the weight '" + projection.name +
                  "' holds NaN or infinity; the edit, or the checkpoint, is damaged");
    }
    at::Tensor gram = at::zeros({d, d}, weight.options());
    add_gram_upper(gram, weight, 1.0);
    forms.base += gram.to(at::kCPU, at::kDouble);
    const at::Tensor change = after - weight;
    if (change.any().item<bool>()) {
      forms.differ = true;
      gram.zero_();
      add_gram_upper(gram, change, 1.0);
      forms.edit += gram.to(at::kCPU, at::kDouble);
      forms.cross += at::matmul(change.t(), weight).to(at::kCPU, at::kDouble);
    }

    const at::Tensor read = at::matmul(from.to(weight.options()), weight.t());
    const at::Tensor wanted = at::matmul(to.to(weight.options()), weight.t());
    const at::Tensor now = read + at::matmul(from.to(weight.options()), change.t());
    const auto ratio = [&](const at::Tensor& difference) {
      return (difference.norm(2, {1}) / read.norm(2, {1}).clamp_min(1e-30))
          .to(at::kCPU, at::kDouble);
    };
    const at::Tensor ratio_before = ratio(read - wanted);
    const at::Tensor ratio_after = ratio(now - wanted);
    int64_t row = 0;
    for (ConceptResidual& item : concepts) {
      LayerResidual entry{layer_of(projection), projection.role, {}, {}};
      for (size_t i = 0; i < item.positions.size(); ++i, ++row) {
        entry.before.push_back(ratio_before[row].item<double>());
        entry.after.push_back(ratio_after[row].item<double>());
      }
      item.layers.push_back(std::move(entry));
    }
  }
  mirror_upper(forms.base);
  mirror_upper(forms.edit);
  return forms;
}

double remaining_of(const ModelForms& forms, const ReadPhrase& phrase, const ReadPhrase& anchor) {
  const auto [from, to] = paired(phrase, anchor);
  const at::Tensor difference = from - to;
  const double before = sum_of(difference, forms.base, difference);
  if (before <= 0.0) return 0.0;
  const double after =
      before + 2 * sum_of(from, forms.cross, difference) + sum_of(from, forms.edit, from);
  return std::sqrt(std::max(0.0, after) / before);
}

// Content of words before and after the edit: all words of one concept at once.
class ContentScale {
 public:
  // ordinary: [2, d], the mean of the common words
  ContentScale(const ModelForms& forms, const ReadPhrase& target, const at::Tensor& ordinary)
      : ordinary_(ordinary) {
    const at::Tensor direction = summary(target) - ordinary_;
    before_ = at::matmul(direction, forms.base);
    change_ = at::matmul(direction, forms.cross.t());
    norm_ = (before_ * direction).sum().item<double>();
  }

  // words: [n, 2, d]
  at::Tensor before(const at::Tensor& words) const {
    return ((words - ordinary_) * before_).sum({1, 2}) / norm_;
  }
  at::Tensor after(const at::Tensor& words) const {
    return before(words) + (words * change_).sum({1, 2}) / norm_;
  }
  // [n] cosine of a word's and the target's distance from the ordinary, as the model reads them.
  at::Tensor similarity(const ModelForms& forms, const at::Tensor& words) const {
    const at::Tensor distance = words - ordinary_;
    const at::Tensor length =
        (at::matmul(distance, forms.base) * distance).sum({1, 2}).clamp_min(1e-30).sqrt();
    return (distance * before_).sum({1, 2}) / (length * std::sqrt(norm_));
  }
  bool valid() const { return norm_ > 0.0; }

 private:
  at::Tensor ordinary_;  // [2, d]
  at::Tensor before_;    // [2, d], (c - m) W^T W
  at::Tensor change_;    // [2, d], (c - m) W^T D
  double norm_ = 0.0;
};

// [n, 2, d] summaries of the common words, from the cache when it has them.
at::Tensor word_rows(TextEncoder& encoder, const std::vector<std::string>& words,
                     Progress& progress) {
  std::string cache;
  if (!encoder.cache_directory().empty() && !encoder.fingerprint().empty()) {
    cache = encoder.cache_directory() + "/common_words_" + encoder.fingerprint() + "_v" +
            std::string(kWordsVersion) + ".safetensors";
    const auto known = load_cached(cache, kCommonWordsFormat, at::kFloat,
                                   {static_cast<int64_t>(words.size()), 2, encoder.width()});
    if (known) return known->to(at::kDouble);
  }
  std::vector<at::Tensor> rows;
  constexpr size_t kReported = 32;
  for (size_t begin = 0; begin < words.size(); begin += kReported) {
    const size_t end = std::min(words.size(), begin + kReported);
    progress.status("Reading common words: " + std::to_string(begin) + " of " +
                    std::to_string(words.size()) + " (once for each text encoder)");
    std::vector<std::string> prompts;
    for (size_t i = begin; i < end; ++i) prompts.push_back(std::string(kPrefix) + words[i]);
    for (const at::Tensor& start : encode_starts(encoder, prompts, progress)) {
      rows.push_back(start.narrow(0, start.size(0) - 2, 2));
    }
  }
  const at::Tensor all = at::stack(rows);
  if (!cache.empty()) save_cached(all.to(at::kFloat), cache, kCommonWordsFormat);
  return all;
}

bool shares_words(const std::string& word, const std::vector<std::string>& listed) {
  return std::any_of(listed.begin(), listed.end(), [&](const std::string& phrase) {
    return phrase.find(word) != std::string::npos || word.find(phrase) != std::string::npos;
  });
}

double drift_of(const ModelForms& forms, const at::Tensor& rows) {
  const double before = sum_of(rows, forms.base, rows);
  return before <= 0.0 ? 0.0 : std::sqrt(std::max(0.0, sum_of(rows, forms.edit, rows)) / before);
}

bool has_style(const std::string& phrase) {
  return phrase.ends_with(" style") || phrase == "style";
}

std::string plural(const std::string& phrase) {
  const auto ends = [&](const char* ending) { return phrase.ends_with(ending); };
  if (ends("s") || ends("x") || ends("ch") || ends("sh")) return phrase + "es";
  const bool vowel_before_y =
      phrase.size() > 1 &&
      std::string("aeiou").find(phrase[phrase.size() - 2]) != std::string::npos;
  if (ends("y") && !vowel_before_y) return phrase.substr(0, phrase.size() - 1) + "ies";
  return phrase + "s";
}

// Two neighbouring letters in the middle of the longest word change places.
std::string typing_error(const std::string& phrase) {
  size_t best = 0, length = 0;
  for (size_t begin = 0; begin < phrase.size();) {
    const size_t end = std::min(phrase.find(' ', begin), phrase.size());
    if (end - begin > length) best = begin, length = end - begin;
    begin = end + 1;
  }
  std::string wrong = phrase;
  for (size_t i = best + length / 2; length >= 3 && i > best; --i) {
    const bool ascii = static_cast<unsigned char>(wrong[i]) < 0x80 &&
                       static_cast<unsigned char>(wrong[i - 1]) < 0x80;
    if (ascii && wrong[i] != wrong[i - 1]) {
      std::swap(wrong[i], wrong[i - 1]);
      break;
    }
  }
  return wrong;
}

}  // namespace

std::vector<PhraseResidual> phrase_variants(const std::string& phrase) {
  std::vector<PhraseResidual> variants;
  const auto add = [&](std::string text, const char* form) {
    if (text != phrase) variants.push_back({std::move(text), form});
  };
  if (!has_style(phrase)) {
    add(plural(phrase), "plural");
    add(phrase + " style", "style");
  }
  if (!phrase.starts_with("by ")) add("by " + phrase, "by");
  add(typing_error(phrase), "typo");
  return variants;
}

std::vector<std::string> common_words() {
  static const std::set<std::string> function_words{
      "about",  "above",   "after", "against", "along",   "among",   "around",  "been",
      "before", "behind",  "below", "beneath", "beside",  "between", "both",    "down",
      "during", "each",    "every", "from",    "have",    "inside",  "into",    "just",
      "like",   "looking", "made",  "near",    "next",    "onto",    "over",    "past",
      "seen",   "some",    "still", "such",    "than",    "that",    "their",   "them",
      "there",  "these",   "they",  "this",    "through", "toward",  "towards", "turned",
      "under",  "until",   "very",  "were",    "when",    "where",   "which",   "while",
      "with",   "without", "your",  "being",   "covered", "full",    "clearly"};
  std::vector<std::string> words;
  std::set<std::string> seen;
  for (const std::string_view caption : generic_captions(GeneralPriorSize::kSmall)) {
    std::string word;
    for (size_t i = 0; i <= caption.size(); ++i) {
      if (i < caption.size() && caption[i] >= 'a' && caption[i] <= 'z') {
        word += caption[i];
        continue;
      }
      if (word.size() >= 4 && !function_words.contains(word) && seen.insert(word).second) {
        words.push_back(word);
      }
      word.clear();
      if (words.size() == kMostWords) return words;
    }
  }
  return words;
}

void check_same_family(Denoiser& base, Denoiser& edited) {
  if (base.family() != edited.family()) {
    throw Error("the two models are of different families, " + base.family() + " and " +
                edited.family() + "; connect the model before and after the same edit");
  }
  const auto before = cross_attention(base);
  const auto after = cross_attention(edited);
  const auto same = [&](const TextEntry& a, const TextEntry& b) {
    return a.name == b.name &&
           base.effective_weight(a.name).sizes() == edited.effective_weight(b.name).sizes();
  };
  if (!std::equal(before.begin(), before.end(), after.begin(), after.end(), same)) {
    throw Error("the two models (" + base.family() +
                ") do not have the same layers; connect the model before and after the same edit");
  }
}

ResidualScan scan_residuals(Denoiser& base, Denoiser& edited, TextEncoder& encoder,
                            const ConceptSet& set, const std::vector<std::string>& neighbours,
                            Progress& progress) {
  const std::vector<TextEntry> projections =
      edited_entries(base, EditedMatrices::kKeyAndValue, encoder.width());
  check_same_family(base, edited);

  ResidualScan scan;
  std::vector<std::string> listed = neighbours;  // everything that has a role of its own
  for (const PreservedPhrase& item : set.preserve) listed.push_back(fold_case(item.phrase));
  for (const Concept& item : set.concepts) {
    ConceptResidual residual;
    residual.target = item.target;
    residual.phrases.push_back({item.target, "target"});
    for (const std::string& synonym : item.synonyms) {
      residual.phrases.push_back({synonym, "synonym"});
    }
    for (PhraseResidual& variant : phrase_variants(item.target)) {
      const bool known = std::any_of(residual.phrases.begin(), residual.phrases.end(),
                                     [&](const auto& p) { return p.phrase == variant.phrase; });
      if (!known) residual.phrases.push_back(std::move(variant));
    }
    for (const PhraseResidual& phrase : residual.phrases)
      listed.push_back(fold_case(phrase.phrase));
    listed.push_back(fold_case(item.anchor));
    scan.concepts.push_back(std::move(residual));
  }

  // Texts first: a hundred concepts share anchors and words.
  std::vector<std::string> texts;
  std::map<std::string, size_t> index;
  const auto want = [&](const std::string& text) {
    if (index.emplace(text, texts.size()).second) texts.push_back(text);
  };
  for (size_t i = 0; i < set.concepts.size(); ++i) {
    want(set.concepts[i].anchor);
    for (const PhraseResidual& phrase : scan.concepts[i].phrases) want(phrase.phrase);
  }
  for (const PreservedPhrase& item : set.preserve) want(item.phrase);
  for (const std::string& word : neighbours) want(word);
  const std::vector<ReadPhrase> rows = encode_phrases(encoder, texts, progress);
  const auto rows_of = [&](const std::string& text) -> const ReadPhrase& {
    return rows[index.at(text)];
  };
  const std::vector<std::string> words = common_words();
  const at::Tensor word_summaries = word_rows(encoder, words, progress);

  std::vector<at::Tensor> from;
  std::vector<at::Tensor> to;
  for (size_t i = 0; i < set.concepts.size(); ++i) {
    const auto [target, anchor] =
        paired(rows_of(set.concepts[i].target), rows_of(set.concepts[i].anchor));
    from.push_back(target);
    to.push_back(anchor);
    const int64_t tokens = target.size(0) - 2;
    for (int64_t k = 1; k <= tokens; ++k) {
      scan.concepts[i].positions.push_back("token " + std::to_string(k));
    }
    scan.concepts[i].positions.insert(scan.concepts[i].positions.end(), {"end of text", "padding"});
  }
  const ModelForms forms =
      collect_forms(base, edited, projections, at::cat(from), at::cat(to), scan.concepts, progress);
  scan.weights_differ = forms.differ;
  scan.forms = forms;

  std::set<std::string> nearest;
  for (size_t i = 0; i < set.concepts.size(); ++i) {
    progress.check();
    ConceptResidual& residual = scan.concepts[i];
    const ReadPhrase& anchor = rows_of(set.concepts[i].anchor);
    for (PhraseResidual& phrase : residual.phrases) {
      phrase.remaining = remaining_of(forms, rows_of(phrase.phrase), anchor);
    }
    const ContentScale scale(forms, rows_of(residual.target), word_summaries.mean(0));
    if (!scale.valid()) continue;

    // What could bring the concept back: common words, what the user preserves, other concepts.
    std::vector<std::string> candidates = words;
    std::vector<at::Tensor> summaries{word_summaries};
    for (const std::string& text : texts) {
      const auto own = [&](const auto& phrase) { return phrase.phrase == text; };
      if (text == set.concepts[i].anchor ||
          std::any_of(residual.phrases.begin(), residual.phrases.end(), own)) {
        continue;
      }
      candidates.push_back(text);
      summaries.push_back(summary(rows_of(text)).unsqueeze(0));
    }
    const at::Tensor all = at::cat(summaries);
    const at::Tensor before = scale.before(all);
    const at::Tensor after = scale.after(all);
    for (size_t k = 0; k < candidates.size(); ++k) {
      const auto row = static_cast<int64_t>(k);
      const double content = after[row].item<double>();
      if (content >= kLeak) {
        residual.leaks.push_back({candidates[k], before[row].item<double>(), content});
      }
    }
    std::stable_sort(residual.leaks.begin(), residual.leaks.end(),
                     [](const auto& a, const auto& b) { return a.after > b.after; });
    if (residual.leaks.size() > kShownWords) residual.leaks.resize(kShownWords);

    const at::Tensor by_content = std::get<1>(
        after.narrow(0, 0, word_summaries.size(0)).sort(/*dim=*/0, /*descending=*/true));
    for (int64_t k = 0; k < by_content.size(0) && residual.closest.size() < kClosestWords; ++k) {
      const std::string& word = words[static_cast<size_t>(by_content[k].item<int64_t>())];
      const auto own = [&](const auto& phrase) { return phrase.phrase == word; };
      if (word != set.concepts[i].anchor &&
          std::none_of(residual.phrases.begin(), residual.phrases.end(), own)) {
        residual.closest.push_back(word);
      }
    }

    const at::Tensor order =
        std::get<1>(scale.similarity(forms, word_summaries).sort(/*dim=*/0, /*descending=*/true));
    for (int64_t k = 0; k < order.size(0) && residual.neighbours.size() < kShownWords; ++k) {
      const std::string& word = words[static_cast<size_t>(order[k].item<int64_t>())];
      if (!shares_words(word, listed)) residual.neighbours.push_back(word);
    }
    for (size_t k = 0; k < std::min<size_t>(4, residual.neighbours.size()); ++k) {
      nearest.insert(residual.neighbours[k]);
    }
  }

  for (const PreservedPhrase& item : set.preserve) {
    scan.preserved.push_back({item.phrase, drift_of(forms, summary(rows_of(item.phrase)))});
  }
  for (const std::string& word : neighbours) {
    scan.neighbours.push_back({word, drift_of(forms, summary(rows_of(word)))});
  }
  if (neighbours.empty()) {
    for (size_t k = 0; k < words.size(); ++k) {
      if (nearest.contains(words[k])) {
        scan.neighbours.push_back(
            {words[k], drift_of(forms, word_summaries[static_cast<int64_t>(k)])});
      }
    }
  }
  return scan;
}

}  // namespace lacuna
