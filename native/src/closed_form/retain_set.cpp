// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/retain_set.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <functional>
#include <iterator>
#include <map>
#include <optional>
#include <set>

#include "lacuna/closed_form/concept_recognizer.h"
#include "lacuna/closed_form/text_statistics.h"
#include "lacuna/concepts/concept_prompts.h"
#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/error.h"
#include "lacuna/files/cached_tensor.h"
#include "lacuna/files/checksum.h"
#include "lacuna/files/random_stream.h"
#include "lacuna/files/safetensors_file.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

constexpr std::string_view kSlot = "{}";
constexpr std::array<std::string_view, 2> kPlainTemplates{"{}", "a photo of {}"};
constexpr size_t kMostFrames = 3;
// As much weight as the words of the demo model's vocabulary had when the weight was chosen.
constexpr double kCountedWords = 250.0;
// Words in what the targets share are so near to them that more weight keeps the targets, too: on
// the demo model's ten flags 1 leaves 10 of 40 drawn, 0.2 2 of 20, 0.02 none.
constexpr double kSharedFrameWeight = 0.02;
constexpr size_t kShortestWord = 3;
// Raised when words, templates or the format change, so that old cache files are not used.
constexpr std::string_view kRetainFormat = "lacuna.retain_set/4";

size_t wanted_words(RetainSetSize size) {
  return size == RetainSetSize::kFull ? 2000 : size == RetainSetSize::kSmall ? 200 : 0;
}

std::vector<std::string> words_of(const std::string& phrase) {
  std::vector<std::string> words;
  for (size_t begin = 0; begin < phrase.size();) {
    const size_t end = std::min(phrase.find(' ', begin), phrase.size());
    if (end > begin) words.push_back(phrase.substr(begin, end - begin));
    begin = end + 1;
  }
  return words;
}

bool is_plain_word(const std::string& word) {
  return word.size() >= kShortestWord &&
         std::all_of(word.begin(), word.end(), [](char c) { return c >= 'a' && c <= 'z'; });
}

std::vector<std::string> plain_words(std::vector<std::string> vocabulary, size_t wanted) {
  std::erase_if(vocabulary, [](const std::string& word) { return !is_plain_word(word); });
  vocabulary.resize(std::min(vocabulary.size(), wanted));
  return vocabulary;
}

struct RetainPrompts {
  std::vector<std::string> texts;
  std::vector<std::string> before;  // the phrase
};

// Adds those of one phrase: alone, in a photo, and in turn in one of some ways beside other words.
void add_retain_prompts(RetainPrompts& prompts, const std::string& phrase, size_t number,
                        const std::vector<std::string>& companions) {
  constexpr std::array<std::string_view, 5> kBeside{"{} and {1}", "{1} and {}",
                                                    "a picture of {1} with {}", "{1}, {2}, {}",
                                                    "a drawing of {} beside {1} in {2} style"};
  const auto add = [&](std::string_view prompt_template) {
    prompts.texts.push_back(fill_template(prompt_template, phrase));
    prompts.before.push_back(prefix_of_template(prompt_template));
  };
  for (std::string_view each : kPlainTemplates) add(each);
  const auto companion = [&](size_t which) -> const std::string& {
    return companions[(number * (4 * which + 3) + 5 * which) % companions.size()];
  };
  add(fill_companions(kBeside[number % kBeside.size()], companion(1), companion(2)));
}

// [positions] float32: how many rows of a window each sampled one stands for. Those of the padding
// differ little from one to the next, so that a pair stands for all since the pair before.
at::Tensor rows_stood_for(int64_t window) {
  const std::vector<int64_t> places = sampled_positions(window);
  std::vector<float> weights(places.size(), 1.0F);
  for (size_t i = 1; i + 1 < places.size(); ++i) {
    if (places[i] == places[i - 1] + 1) continue;
    const auto since = static_cast<float>(places[i + 1] - places[i - 1]);
    weights[i] = weights[i + 1] = since / 2;
  }
  return at::tensor(weights);
}

// Sum over whole prompts of the mean over a phrase's, from what was sampled of them: [d, d];
// rows: [prompts, positions, d]
at::Tensor sampled_gram(const at::Tensor& rows, int64_t window, Progress& progress) {
  constexpr int64_t kPromptsAtOnce = 64;
  const at::Tensor scale = rows_stood_for(window).sqrt().unsqueeze(1);
  GramSum sum(rows.size(2));
  for (const at::Tensor& block : rows.split(kPromptsAtOnce)) {
    progress.check();
    sum.add((block.to(at::kFloat) * scale).flatten(0, 1),
            1.0 / static_cast<double>(kRetainPrompts));
  }
  return sum.finish();
}

// kRetainPrompts of each phrase, in order.
RetainPrompts prompts_of(const std::vector<std::string>& phrases,
                         const std::vector<std::string>& companions) {
  RetainPrompts prompts;
  for (size_t i = 0; i < phrases.size(); ++i) {
    add_retain_prompts(prompts, phrases[i], i, companions);
  }
  return prompts;
}

// PhraseRows without the words.
struct ReadPhrases {
  at::Tensor last;
  at::Tensor rows;
};

// prompts: kRetainPrompts of each phrase; after_read: is told how many phrases were read more.
ReadPhrases read_phrases(TextEncoder& encoder, const std::vector<std::string>& prompts,
                         const std::function<void(int64_t)>& after_read, Progress& progress) {
  constexpr std::ptrdiff_t kPromptsAtOnce =
      2 * kRetainPrompts;  // a second on one core: what an interrupt waits for
  const at::Tensor places = at::tensor(sampled_positions(encoder.window()), at::kLong);
  std::vector<at::Tensor> last;
  std::vector<at::Tensor> rows;
  for (auto begin = prompts.begin(); begin != prompts.end();) {
    progress.check();
    const auto end = begin + std::min(kPromptsAtOnce, prompts.end() - begin);
    const at::Tensor read = encoder.encode({begin, end})
                                .to(at::kCPU, at::kFloat)
                                .unflatten(0, {-1, kRetainPrompts});  // [phrases, prompts, T, d]
    check_embeddings(read);
    last.push_back(read.narrow(1, 0, static_cast<int64_t>(kPlainTemplates.size()))
                       .select(2, read.size(2) - 1)
                       .to(at::kDouble)
                       .mean(1));
    rows.push_back(read.index_select(2, places).to(at::kHalf));
    after_read(read.size(0));
    begin = end;
  }
  return {at::cat(last), at::cat(rows)};
}

// What is cached of one frame.
struct FrameStatistics {
  at::Tensor gram;  // [d, d], of all phrases
  ReadPhrases phrases;
};

// The last row of the window, mean over the plain templates: [n, d] float64.
at::Tensor last_rows(TextEncoder& encoder, const std::vector<std::string>& phrases,
                     StatisticsCache* cache, Progress& progress) {
  const std::string fingerprint = encoder.fingerprint();
  std::vector<at::Tensor> last{at::zeros({0, encoder.width()}, at::kDouble)};
  for (const std::string& phrase : phrases) {
    progress.check();
    last.push_back(remembered(cache, fingerprint, "last row\n" + phrase, [&] {
                     std::vector<std::string> prompts;
                     for (std::string_view each : kPlainTemplates) {
                       prompts.push_back(fill_template(each, phrase));
                     }
                     const at::Tensor read = encoder.encode(prompts).to(at::kCPU, at::kDouble);
                     return std::vector<at::Tensor>{
                         read.select(1, read.size(1) - 1).mean(0, /*keepdim=*/true)};
                   }).front());
  }
  return at::cat(last);
}

std::string cache_path(TextEncoder& encoder, const std::string& frame, RetainSetSize size) {
  if (encoder.cache_directory().empty() || encoder.fingerprint().empty()) return {};
  return encoder.cache_directory() + "/retain_set_" + encoder.fingerprint() + "_" +
         std::string(to_string(size)) + "_" + checksum_of({{}, {{"frame", frame}}}) +
         ".safetensors";
}

std::vector<std::string> fill_all(const std::string& frame, const std::vector<std::string>& words) {
  std::vector<std::string> filled;
  for (const std::string& word : words) filled.push_back(fill_template(frame, word));
  return filled;
}

}  // namespace

std::string_view to_string(RetainSetSize size) {
  return size == RetainSetSize::kFull ? "full" : size == RetainSetSize::kSmall ? "small" : "none";
}

RetainSetSize retain_set_from_string(std::string_view text) {
  for (const RetainSetSize size :
       {RetainSetSize::kNone, RetainSetSize::kSmall, RetainSetSize::kFull}) {
    if (to_string(size) == text) return size;
  }
  throw Error("unknown retain set " + in_quotes(text) + "; use one of: none, small, full");
}

RetainSetSize retained_size(RetainSetSize asked, const std::vector<Concept>& concepts) {
  const bool style = std::any_of(concepts.begin(), concepts.end(), [](const Concept& item) {
    return item.kind == ConceptKind::kStyle;
  });
  return style ? RetainSetSize::kNone : asked;
}

std::vector<std::string> shared_frames(const std::vector<Concept>& concepts) {
  std::map<std::string, size_t> count;
  for (const Concept& item : concepts) {
    std::vector<std::string> words = words_of(item.target);
    if (words.size() < 2) continue;
    if (item.kind == ConceptKind::kStyle) {
      ++count[std::string(kSlot) + " " + words.back()];
      continue;
    }
    words.back() = kSlot;
    std::string frame = words.front();
    for (size_t i = 1; i < words.size(); ++i) frame += " " + words[i];
    ++count[frame];
  }
  // Of a few targets each has its own; of many what a fifth of them share.
  const size_t enough = concepts.size() <= 5 ? 1 : std::max<size_t>(2, concepts.size() / 5);
  std::vector<std::pair<size_t, std::string>> shared;
  for (const auto& [frame, times] : count) {
    if (times >= enough) shared.emplace_back(times, frame);
  }
  std::stable_sort(shared.begin(), shared.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second.size() < b.second.size();
  });
  std::vector<std::string> frames{std::string(kSlot)};
  const auto said = [](const std::string& frame) { return frame.substr(0, frame.find(kSlot)); };
  for (const auto& [times, frame] : shared) {
    // "flag of christmas {}" beside "flag of {}" is one target more of the same, not another frame.
    const bool known =
        std::any_of(frames.begin() + 1, frames.end(), [&](const std::string& earlier) {
          return !said(earlier).empty() && said(frame).starts_with(said(earlier));
        });
    if (!known && frames.size() < kMostFrames) frames.push_back(frame);
  }
  return frames;
}

std::vector<int64_t> sampled_positions(int64_t window) {
  constexpr int64_t kBeginning = 16;
  std::vector<int64_t> places;
  for (int64_t t = 0; t < std::min(kBeginning, window); ++t) places.push_back(t);
  for (const int64_t t : {int64_t{24}, int64_t{40}, int64_t{56}, window - 1}) {
    if (t < kBeginning + 1 || t >= window || places.back() >= t - 1) continue;
    places.push_back(t - 1);
    places.push_back(t);
  }
  return places;
}

PhraseRows read_phrase_rows(TextEncoder& encoder, const std::vector<std::string>& phrases,
                            const std::vector<std::string>& companions, Progress& progress,
                            StatisticsCache* cache) {
  const int64_t d = encoder.width();
  const std::string fingerprint = encoder.fingerprint();
  const auto positions = static_cast<int64_t>(sampled_positions(encoder.window()).size());
  PhraseRows out;
  out.phrases = phrases;
  std::vector<at::Tensor> last{at::zeros({0, d}, at::kDouble)};
  std::vector<at::Tensor> rows{at::zeros({0, kRetainPrompts, positions, d}, at::kHalf)};
  for (const std::string& phrase : phrases) {
    // What stands beside a phrase depends on the phrase, so that it is the same in every list.
    RetainPrompts prompts;
    add_retain_prompts(prompts, phrase, stable_hash(phrase), companions);
    const std::string key = "stays\n" + std::to_string(companions.size()) + '\n' + phrase;
    const auto read = remembered(cache, fingerprint, key, [&] {
      ReadPhrases made = read_phrases(encoder, prompts.texts, [](int64_t) {}, progress);
      return std::vector<at::Tensor>{std::move(made.last), std::move(made.rows)};
    });
    last.push_back(read[0]);
    rows.push_back(read[1]);
    std::move(prompts.texts.begin(), prompts.texts.end(), std::back_inserter(out.prompts));
    std::move(prompts.before.begin(), prompts.before.end(), std::back_inserter(out.before));
  }
  out.last = at::cat(last);
  out.rows = at::cat(rows);
  return out;
}

RetainSet collect_retain_set(TextEncoder& encoder, const std::vector<Concept>& concepts,
                             RetainSetSize size, Progress& progress, StatisticsCache* cache) {
  RetainSet set;
  if (size == RetainSetSize::kNone) return set;
  const int64_t d = encoder.width();
  set.frames = shared_frames(concepts);
  std::vector<std::string> erased;
  for (const Concept& item : concepts) {
    for (std::string& phrase : phrases(item)) erased.push_back(std::move(phrase));
  }

  std::vector<std::string> words;
  std::vector<FrameStatistics> read(set.frames.size());
  std::vector<std::string> paths;
  std::vector<std::string> vocabulary;
  for (size_t f = 0; f < set.frames.size(); ++f) {
    paths.push_back(cache_path(encoder, set.frames[f], size));
    if (paths.back().empty()) continue;
    const auto known = load_cached_tensors(paths.back(), kRetainFormat);
    if (!known || !known->contains("gram") || !known->contains("last") ||
        !known->contains("rows") || !known->contains("places")) {
      continue;
    }
    // The words by their places in the vocabulary.
    if (vocabulary.empty()) vocabulary = encoder.vocabulary();
    const at::Tensor& places = known->at("places");
    std::vector<std::string> listed;
    for (int64_t i = 0; i < places.numel(); ++i) {
      const int64_t place = places[i].item<int64_t>();
      if (place >= 0 && place < static_cast<int64_t>(vocabulary.size())) {
        listed.push_back(vocabulary[static_cast<size_t>(place)]);
      }
    }
    if (!words.empty() && words != listed) continue;
    words = std::move(listed);
    read[f] = {known->at("gram"), {known->at("last"), known->at("rows")}};
  }
  if (words.empty()) words = plain_words(encoder.vocabulary(), wanted_words(size));
  if (words.size() < 2) {
    throw Error(
        "the text encoder tells no words of its vocabulary, which the retain set is made of; set "
        "'retain set' to none");
  }
  int64_t missing = 0;
  for (const FrameStatistics& each : read) missing += each.gram.defined() ? 0 : 1;
  const auto total = static_cast<int64_t>(words.size());
  int64_t done = 0;
  for (size_t f = 0; f < set.frames.size(); ++f) {
    if (read[f].gram.defined()) continue;
    const std::string form = fill_template(set.frames[f], "...");
    progress.status("reading " + std::to_string(words.size()) + " words of the text encoder" +
                    (f == 0 ? "" : " as '" + form + "'") + ", once for this encoder");
    read[f].phrases = read_phrases(
        encoder, prompts_of(fill_all(set.frames[f], words), words).texts,
        [&](int64_t phrases) {
          done += phrases;
          progress.report(done, missing * total);
        },
        progress);
    read[f].gram = sampled_gram(read[f].phrases.rows.flatten(0, 1), encoder.window(), progress);
    if (paths[f].empty()) continue;
    if (vocabulary.empty()) vocabulary = encoder.vocabulary();
    std::map<std::string, int64_t> place_of;
    for (size_t i = 0; i < vocabulary.size(); ++i) {
      place_of.emplace(vocabulary[i], static_cast<int64_t>(i));
    }
    std::vector<int64_t> places;
    for (const std::string& word : words) places.push_back(place_of.at(word));
    save_cached_tensors({{"gram", read[f].gram},
                         {"last", read[f].phrases.last},
                         {"rows", read[f].phrases.rows},
                         {"places", at::tensor(places, at::kLong)}},
                        paths[f], kRetainFormat);
  }

  // What the encoder takes for a target, and what a target is called.
  const at::Tensor targets = last_rows(encoder, erased, cache, progress);
  std::set<std::string> named;
  for (const std::string& phrase : erased) {
    named.insert(fold_case(phrase));
    for (const std::string& word : words_of(fold_case(phrase))) named.insert(word);
  }
  std::vector<std::string> folded;
  for (const std::string& phrase : erased) folded.push_back(fold_case(phrase));
  const auto names_any = [&](const std::string& prompt) {
    return std::any_of(folded.begin(), folded.end(),
                       [&](const std::string& phrase) { return names_phrase(prompt, phrase); });
  };
  set.gram = at::zeros({d, d}, at::kDouble);
  std::vector<at::Tensor> last;
  std::vector<at::Tensor> rows;
  for (size_t f = 0; f < set.frames.size(); ++f) {
    const std::vector<std::string> filled = fill_all(set.frames[f], words);
    RetainPrompts prompts = prompts_of(filled, words);
    const auto& [words_last, words_rows] = read[f].phrases;
    const at::Tensor score =
        std::get<0>(ConceptRecognizer(words_last, targets).scores(words_last).max(1));
    std::vector<int64_t> kept;      // phrases
    std::vector<int64_t> unwanted;  // prompts: of what is left out, and with a target beside
    for (size_t i = 0; i < filled.size(); ++i) {
      const std::string& phrase = filled[i];
      const bool plural =
          phrase.ends_with('s') &&
          (named.contains(phrase.substr(0, phrase.size() - 1)) ||
           (phrase.ends_with("es") && named.contains(phrase.substr(0, phrase.size() - 2))));
      const auto number = static_cast<int64_t>(i);
      const bool left_out = named.contains(phrase) || plural || names_any(phrase) ||
                            score[number].item<double>() > ConceptRecognizer::kNames;
      (left_out ? set.left_out : set.kept.phrases).push_back(phrase);
      if (!left_out) kept.push_back(number);
      for (int64_t k = number * kRetainPrompts; k < (number + 1) * kRetainPrompts; ++k) {
        std::string& prompt = prompts.texts[static_cast<size_t>(k)];
        if (left_out || names_any(prompt)) unwanted.push_back(k);
        if (left_out) continue;
        set.kept.prompts.push_back(std::move(prompt));
        set.kept.before.push_back(std::move(prompts.before[static_cast<size_t>(k)]));
      }
    }
    const auto rows_of = [](const at::Tensor& from, const std::vector<int64_t>& numbers) {
      return from.index_select(0, at::tensor(numbers, at::kLong));
    };
    const at::Tensor subtracted =
        sampled_gram(rows_of(words_rows.flatten(0, 1), unwanted), encoder.window(), progress);
    set.gram.add_(read[f].gram - subtracted, f == 0 ? 1.0 : kSharedFrameWeight);
    last.push_back(rows_of(words_last, kept));
    rows.push_back(rows_of(words_rows, kept));
  }
  if (set.kept.phrases.size() < 2) {
    throw Error(
        "the concepts are all that the retain set could keep: the text encoder takes each of its " +
        std::to_string(words.size()) +
        " words for one; set 'retain set' to full or none, and 'where' to every prompt");
  }
  set.kept.last = at::cat(last);
  set.kept.rows = at::cat(rows);
  set.words = static_cast<int64_t>(set.kept.phrases.size());
  set.vocabulary = std::move(words);
  if (static_cast<double>(set.words) > kCountedWords) {
    set.gram.mul_(kCountedWords / static_cast<double>(set.words));
  }
  return set;
}

}  // namespace lacuna
