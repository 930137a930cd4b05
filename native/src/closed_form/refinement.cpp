// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/refinement.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <unordered_map>

#include "lacuna/closed_form/general_prior.h"
#include "lacuna/closed_form/spd_solver.h"
#include "lacuna/concepts/concept_prompts.h"
#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/concepts/token_alignment.h"
#include "lacuna/error.h"
#include "lacuna/files/option_range.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

// Ridge of the adversarial embeddings, relative to the mean eigenvalue of sum W^T W.
constexpr double kAdversarialRidge = 1e-2;

// Encodes in small batches; reports one unit of work per batch.
class BatchEncoder {
 public:
  BatchEncoder(TextEncoder& encoder, Progress& progress) : encoder_(encoder), progress_(progress) {}

  static int64_t batches(int64_t prompts) {
    return (prompts + kPromptsPerCall - 1) / kPromptsPerCall;
  }
  void expect(int64_t batches) { total_ += batches; }

  // Hands over [n, window, d] and the place of its first prompt, batch by batch.
  void each(const std::vector<std::string>& prompts,
            const std::function<void(const at::Tensor&, int64_t)>& take) {
    for (size_t begin = 0; begin < prompts.size(); begin += kPromptsPerCall) {
      const size_t end = std::min(prompts.size(), begin + kPromptsPerCall);
      progress_.check();
      at::Tensor part = encoder_.encode({prompts.begin() + begin, prompts.begin() + end});
      if (part.dim() != 3 || part.size(0) != static_cast<int64_t>(end - begin) ||
          part.size(1) != encoder_.window() || part.size(2) != encoder_.width()) {
        throw Error("the text encoder returned embeddings of an unexpected shape");
      }
      check_embeddings(part);
      take(part.to(at::kCPU, at::kFloat).contiguous(), static_cast<int64_t>(begin));
      progress_.report(++done_, total_);
    }
  }

  // [n, window, d]
  at::Tensor encode(const std::vector<std::string>& prompts) {
    at::Tensor all = at::empty(
        {static_cast<int64_t>(prompts.size()), encoder_.window(), encoder_.width()}, at::kFloat);
    each(prompts, [&](const at::Tensor& part, int64_t begin) {
      all.narrow(0, begin, part.size(0)).copy_(part);
    });
    return all;
  }

 private:
  TextEncoder& encoder_;
  Progress& progress_;
  int64_t done_ = 0;
  int64_t total_ = 0;
};

// Prefixes, phrases and anchor prompts come up again and again; a prompt of one concept does not.
class Tokens {
 public:
  explicit Tokens(TextEncoder& encoder) : encoder_(encoder) {}

  const std::vector<int64_t>& of(const std::string& text) {
    auto it = known_.find(text);
    if (it == known_.end()) it = known_.emplace(text, encoder_.tokenize(text)).first;
    return it->second;
  }
  std::vector<int64_t> of_once(const std::string& text) { return encoder_.tokenize(text); }

 private:
  TextEncoder& encoder_;
  std::unordered_map<std::string, std::vector<int64_t>> known_;
};

TokenSpan phrase_span(Tokens& tokens, std::string_view prompt_template, const std::string& phrase) {
  // Byte-pair encoding works word by word, so the tokens before the slot do not depend on the
  // phrase. Counts below leave out the start and end tokens.
  const std::string before = prefix_of_template(prompt_template);
  const auto count = [&](const std::string& text) {
    return static_cast<int64_t>(tokens.of(text).size()) - 2;
  };
  const int64_t begin = 1 + (before.empty() ? 0 : count(before));
  return {begin, begin + count(phrase)};
}

// Places of the rows that one prompt adds to the least-squares problem.
struct PromptRows {
  std::vector<int64_t> kept;     // in the prompt: what reads the same in the anchor's, by causality
  std::vector<int64_t> from;     // in the prompt: what should read ...
  std::vector<int64_t> sources;  // ... as this place of the anchor's prompt, pair by pair
};

// Of the index-th template with phrase and anchor.
PromptRows rows_of(Tokens& tokens, const Concept& item, const std::string& phrase, int index,
                   const RefinementOptions& options, int64_t window) {
  const std::string_view prompt_template = prompt_templates(item.kind)[index];
  PromptPair pair;
  pair.target_ids = tokens.of_once(fill_template(prompt_template, phrase));
  pair.anchor_ids = tokens.of(fill_template(prompt_template, item.anchor));
  pair.target_phrase = phrase_span(tokens, prompt_template, phrase);
  pair.anchor_phrase = phrase_span(tokens, prompt_template, item.anchor);
  pair.window = window;
  const int64_t prefix = align_tokens(pair.target_ids, pair.anchor_ids, window).prefix;
  const TokenAlignment rows = edit_method(options.method).rows(pair, options.read_at);
  PromptRows out;
  for (size_t k = 0; k < rows.target.size(); ++k) {
    if (rows.target[k] == rows.anchor[k] && rows.target[k] < prefix) {
      // What differs there is only rounding between two batches.
      out.kept.push_back(rows.target[k]);
    } else {
      out.from.push_back(rows.target[k]);
      out.sources.push_back(rows.anchor[k]);
    }
  }
  return out;
}

// One concept's rows, to be summed with those of concepts that have the same anchor, as the cache
// holds them: for each batch of prompts
//   from, [n, d] float32: what moves ...
//   sources, [n]: ... to the row at this place of the anchor's prompts, [templates * window, d],
//   kept, [m]: places there of what reads the same.
using ConceptRows = std::vector<at::Tensor>;
constexpr size_t kTensorsPerBatch = 3;

ConceptRows collect_concept(TextEncoder& encoder, Tokens& tokens, BatchEncoder& batches,
                            const at::Tensor& anchor_embeddings, const Concept& item,
                            const RefinementOptions& options, StatisticsCache* cache) {
  const int64_t d = encoder.width();
  const int64_t window = encoder.window();
  const at::Tensor anchor = anchor_embeddings.contiguous();
  const auto* wanted = anchor.const_data_ptr<float>();
  ConceptRows out;
  for (const std::string& phrase : phrases(item)) {
    std::vector<at::Tensor> ends;
    batches.each(fill_templates(item.kind, item.templates, phrase), [&](const at::Tensor& read,
                                                                        int64_t first) {
      if (first < kPromptEnds) ends.push_back(read.select(1, window - 1).clone());
      const auto* target = read.const_data_ptr<float>();
      PromptRows all;
      for (int64_t i = 0; i < read.size(0); ++i) {
        const PromptRows rows =
            rows_of(tokens, item, phrase, static_cast<int>(first + i), options, window);
        for (const int64_t place : rows.kept) all.kept.push_back((first + i) * window + place);
        for (size_t k = 0; k < rows.from.size(); ++k) {
          const int64_t place = i * window + rows.from[k];
          const int64_t source = (first + i) * window + rows.sources[k];
          const float* row = target + place * d;
          if (std::equal(row, row + d, wanted + source * d)) {
            all.kept.push_back(source);
          } else {
            all.from.push_back(place);
            all.sources.push_back(source);
          }
        }
      }
      out.push_back(read.reshape({-1, d}).index_select(0, at::tensor(all.from, at::kLong)));
      out.push_back(at::tensor(all.sources, at::kLong));
      out.push_back(at::tensor(all.kept, at::kLong));
    });
    remembered(cache, encoder.fingerprint(), prompt_ends_key(item.kind, item.templates, phrase),
               [&] { return std::vector<at::Tensor>{at::cat(ends).slice(0, 0, kPromptEnds)}; });
  }
  return out;
}

// What concepts that share one anchor move: sum g f^T = G^T H, where H adds up the rows that move
// to the same row of the anchor's prompts G. One product for all of them. What they keep are rows
// of G itself: text encoders are causal, so what stands before the phrase does not know it.
class AnchorGroup {
 public:
  AnchorGroup(const at::Tensor& anchor_embeddings, int templates)
      : anchor_(anchor_embeddings.reshape({-1, anchor_embeddings.size(2)})),
        followers_(at::zeros(anchor_.sizes(), at::kDouble)),
        kept_(static_cast<size_t>(anchor_.size(0))),
        weight_(1.0 / templates) {}

  // As ConceptRows has them, of one batch.
  void add(const at::Tensor& from, const at::Tensor& sources, const at::Tensor& kept) {
    // As index_add_, without a float64 copy of the rows.
    const int64_t d = from.size(1);
    const float* row = from.const_data_ptr<float>();
    const int64_t* source = sources.const_data_ptr<int64_t>();
    auto* sums = followers_.mutable_data_ptr<double>();
    for (int64_t i = 0; i < from.size(0); ++i, row += d) {
      double* sum = sums + source[i] * d;
      for (int64_t k = 0; k < d; ++k) sum[k] += weight_ * static_cast<double>(row[k]);
    }
    const int64_t* place = kept.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < kept.size(0); ++i) kept_[static_cast<size_t>(place[i])] += weight_;
  }

  // sum g f^T
  void add_moved(at::Tensor& sum) const { add_transposed_product(sum, anchor_, followers_); }

  // sum f f^T of what is kept
  void add_kept(GramSum& sum) const {
    const at::Tensor weights = at::tensor(kept_, at::kDouble);
    const at::Tensor places = weights.nonzero().squeeze(1);
    sum.add(anchor_.index_select(0, places).to(at::kDouble) *
            weights.index_select(0, places).sqrt().unsqueeze(1));
  }

 private:
  at::Tensor anchor_;         // G, [templates * window, d]
  at::Tensor followers_;      // H, likewise, float64
  std::vector<double> kept_;  // weight of each of G's rows
  double weight_;
};

// [d, d], mean over the prompts.
at::Tensor collect_preserved(TextEncoder& encoder, BatchEncoder& batches,
                             const PreservedPhrase& item) {
  GramSum sum(encoder.width());
  const at::Tensor embeddings =
      batches.encode(fill_templates(item.kind, item.templates, item.phrase));
  sum.add(embeddings.reshape({-1, encoder.width()}), 1.0 / item.templates);
  return sum.finish();
}

std::string anchor_key(const std::string& fingerprint, const Concept& item) {
  return fingerprint + "\nanchor\n" + std::string(to_string(item.kind)) + '\n' +
         std::to_string(item.templates) + '\n' + item.anchor;
}

std::string cache_key(const std::string& fingerprint, const Concept& item,
                      const RefinementOptions& options) {
  std::string key = fingerprint + "\nconcept\n" + options.method + '\n' +
                    std::string(to_string(options.read_at)) + '\n' +
                    std::string(to_string(item.kind)) + '\n' + std::to_string(item.templates) +
                    '\n' + item.anchor;
  for (const std::string& phrase : phrases(item)) key += '\n' + phrase;
  return key;
}

std::string cache_key(const std::string& fingerprint, const PreservedPhrase& item) {
  return fingerprint + "\npreserved\n" + std::string(to_string(item.kind)) + '\n' +
         std::to_string(item.templates) + '\n' + item.phrase;
}

// What must stay, in two steps: the constructor takes what the cache knows and announces the rest,
// prior() and preserve() encode that.
class KeptTextCollector {
 public:
  KeptTextCollector(TextEncoder& encoder, BatchEncoder& batches,
                    const std::vector<PreservedPhrase>& preserve, GeneralPriorSize general_prior,
                    const std::vector<std::string>& erased, StatisticsCache* cache)
      : encoder_(encoder),
        batches_(batches),
        cache_(cache),
        fingerprint_(encoder.fingerprint()),
        general_prior_(general_prior),
        unwanted_(captions_naming(general_prior, erased)) {
    for (const PreservedPhrase& item : preserve) {
      const std::vector<at::Tensor>* known =
          cache == nullptr ? nullptr : cache->find(cache_key(fingerprint_, item));
      if (known != nullptr) {
        add_preserved(known->front());
        continue;
      }
      to_encode_.push_back(&item);
      batches_.expect(BatchEncoder::batches(item.templates));
    }
    if (general_prior == GeneralPriorSize::kNone) return;
    prior_key_ = fingerprint_ + "\nprior\n" + std::string(to_string(general_prior));
    for (const std::string& caption : unwanted_) prior_key_ += '\n' + caption;
    const std::vector<at::Tensor>* known = cache == nullptr ? nullptr : cache->find(prior_key_);
    if (known != nullptr) {
      prior_ = known->front();
    } else {
      batches_.expect(BatchEncoder::batches(static_cast<int64_t>(unwanted_.size())));
    }
  }

  // [d, d], without the captions that name something erased; undefined for none.
  at::Tensor prior(Progress& progress) {
    if (prior_.defined() || general_prior_ == GeneralPriorSize::kNone) return prior_;
    prior_ = general_prior_gram(encoder_, general_prior_, progress);
    if (!unwanted_.empty()) {
      const int64_t d = encoder_.width();
      GramSum sum(d);
      sum.add(batches_.encode(unwanted_).reshape({-1, d}));
      prior_.sub_(sum.finish(), 1.0 / static_cast<double>(generic_captions(general_prior_).size()));
    }
    if (cache_ != nullptr) cache_->insert(prior_key_, {prior_});
    return prior_;
  }

  // [d, d]; undefined for none.
  at::Tensor preserve() {
    for (const PreservedPhrase* item : to_encode_) {
      const at::Tensor gram = collect_preserved(encoder_, batches_, *item);
      add_preserved(gram);
      if (cache_ != nullptr) cache_->insert(cache_key(fingerprint_, *item), {gram});
    }
    to_encode_.clear();
    return preserve_;
  }

 private:
  void add_preserved(const at::Tensor& gram) {
    if (!preserve_.defined()) preserve_ = at::zeros_like(gram);
    preserve_.add_(gram);
  }

  TextEncoder& encoder_;
  BatchEncoder& batches_;
  StatisticsCache* cache_;
  std::string fingerprint_;
  GeneralPriorSize general_prior_;
  std::vector<std::string> unwanted_;  // captions
  std::string prior_key_;
  std::vector<const PreservedPhrase*> to_encode_;
  at::Tensor preserve_;
  at::Tensor prior_;
};

}  // namespace

void check(const RefinementOptions& options) {
  edit_method(options.method).check(options.read_at);
  check_range(options.regularization, 0.0, 1e9, "regularization");
  check_range(options.preserve_weight, 0.0, 1e9, "preserve_weight");
  check_range(options.prior_weight, 0.0, 1e9, "prior_weight");
  check_range(options.adversarial_rounds, 0, 3, "adversarial_rounds");
}

void check_phrases(TextEncoder& encoder, const ConceptSet& set) {
  Tokens tokens(encoder);
  const auto check_fit = [&](ConceptKind kind, int templates, const std::string& phrase) {
    for (const std::string& prompt : fill_templates(kind, templates, phrase)) {
      const auto needed = static_cast<int64_t>(tokens.of_once(prompt).size());
      if (needed > encoder.window()) {
        throw Error(in_quotes(phrase) + " is too long: its prompts need " + std::to_string(needed) +
                    " tokens, the text encoder reads " + std::to_string(encoder.window()) +
                    "; shorten the phrase");
      }
    }
  };
  for (const Concept& item : set.concepts) {
    check_fit(item.kind, item.templates, item.anchor);
    for (const std::string& phrase : phrases(item)) {
      check_fit(item.kind, item.templates, phrase);
      const std::vector<int64_t>& ids = tokens.of(phrase);
      if (ids.size() <= 2) {
        throw Error("the text encoder reads nothing in " + in_quotes(phrase) + "; use other words");
      }
      if (ids == tokens.of(item.anchor)) {
        throw Error("the text encoder reads " + in_quotes(phrase) + " and its anchor " +
                    in_quotes(item.anchor) + " as the same words; choose another anchor");
      }
    }
  }
  for (const PreservedPhrase& item : set.preserve)
    check_fit(item.kind, item.templates, item.phrase);
}

RefinementProblem collect_problem(TextEncoder& encoder, const ConceptSet& set,
                                  const RefinementOptions& options, StatisticsCache* cache,
                                  Progress& progress) {
  const std::string fingerprint = encoder.fingerprint();
  if (fingerprint.empty()) cache = nullptr;
  const auto known = [&](const std::string& key) {
    return cache == nullptr ? nullptr : cache->find(key);
  };

  Tokens tokens(encoder);
  BatchEncoder batches(encoder, progress);
  std::vector<std::string> erased;
  std::string sum_key = fingerprint + "\nsum";
  // Concepts by anchor, in the order of the list; what the cache knows already.
  std::vector<std::string> anchors;
  std::map<std::string, std::vector<std::pair<const Concept*, ConceptRows>>> groups;
  std::map<std::string, at::Tensor> anchor_embeddings;
  for (const Concept& item : set.concepts) {
    for (std::string& phrase : phrases(item)) erased.push_back(std::move(phrase));
    sum_key += cache_key("\n", item, options);
    const std::string anchor = anchor_key(fingerprint, item);
    if (!groups.contains(anchor)) anchors.push_back(anchor);
    groups[anchor].emplace_back(&item, ConceptRows());
  }
  const std::vector<at::Tensor>* summed = known(sum_key);
  if (summed == nullptr) {
    for (const std::string& anchor : anchors) {
      for (auto& [item, rows] : groups[anchor]) {
        if (const auto* tensors = known(cache_key(fingerprint, *item, options))) {
          rows = *tensors;
        } else {
          batches.expect(BatchEncoder::batches(item->templates) *
                         static_cast<int64_t>(phrases(*item).size()));
        }
      }
      if (const auto* tensors = known(anchor)) {
        anchor_embeddings[anchor] = tensors->front();
      } else {
        batches.expect(BatchEncoder::batches(groups[anchor].front().first->templates));
      }
    }
  }
  KeptTextCollector kept(encoder, batches, set.preserve, set.general_prior, erased, cache);

  RefinementProblem problem;
  problem.prior = kept.prior(progress);
  if (summed != nullptr) {
    problem.concepts = {(*summed)[0], (*summed)[1], (*summed)[2]};
  } else {
    const int64_t d = encoder.width();
    at::Tensor& shift = problem.concepts.shift = at::zeros({d, d}, at::kDouble);
    GramSum edited(d);
    GramSum kept_context(d);
    for (const std::string& anchor : anchors) {
      auto& concepts = groups[anchor];
      const Concept& first = *concepts.front().first;
      at::Tensor& embeddings = anchor_embeddings[anchor];
      if (!embeddings.defined()) {
        embeddings = batches.encode(fill_templates(first.kind, first.templates, first.anchor));
        if (cache != nullptr) cache->insert(anchor, {embeddings});
      }
      AnchorGroup group(embeddings, first.templates);
      for (auto& [item, rows] : concepts) {
        progress.check();
        if (rows.empty()) {
          rows = collect_concept(encoder, tokens, batches, embeddings, *item, options, cache);
          if (cache != nullptr) cache->insert(cache_key(fingerprint, *item, options), rows);
        }
        for (size_t i = 0; i < rows.size(); i += kTensorsPerBatch) {
          group.add(rows[i], rows[i + 1], rows[i + 2]);
          edited.add(rows[i], 1.0 / item->templates);
        }
        rows.clear();
      }
      group.add_moved(shift);
      group.add_kept(kept_context);
      embeddings.reset();
    }
    problem.concepts.edited = edited.finish();
    shift.sub_(problem.concepts.edited);
    problem.concepts.kept = kept_context.finish();
    if (cache != nullptr) {
      cache->insert(sum_key,
                    {problem.concepts.edited, problem.concepts.kept, problem.concepts.shift});
    }
  }
  problem.preserve = kept.preserve();
  return problem;
}

AnchoredPrompts anchor_prompts(TextEncoder& encoder, const Concept& item, const at::Tensor& context,
                               const at::Tensor& anchor, const RefinementOptions& options) {
  Tokens tokens(encoder);
  StatisticsAccumulator sums(context.size(2));
  const double weight = 1.0 / static_cast<double>(context.size(0));
  AnchoredPrompts out;
  out.context = context.clone();
  int64_t prompt = 0;
  for (const std::string& phrase : phrases(item)) {
    for (int i = 0; i < item.templates; ++i, ++prompt) {
      const PromptRows rows = rows_of(tokens, item, phrase, i, options, context.size(1));
      const at::Tensor places = at::tensor(rows.from, at::kLong);
      const at::Tensor to = anchor[i].index_select(0, at::tensor(rows.sources, at::kLong));
      sums.add_pairs(context[prompt].index_select(0, places), to, weight);
      sums.add_kept(context[prompt].index_select(0, at::tensor(rows.kept, at::kLong)), weight);
      out.context[prompt].index_copy_(0, places, to);
    }
  }
  out.statistics = sums.finish();
  return out;
}

KeptText collect_kept_text(TextEncoder& encoder, const std::vector<PreservedPhrase>& preserve,
                           GeneralPriorSize general_prior, const std::vector<std::string>& erased,
                           StatisticsCache* cache, Progress& progress) {
  if (encoder.fingerprint().empty()) cache = nullptr;
  BatchEncoder batches(encoder, progress);
  KeptTextCollector kept(encoder, batches, preserve, general_prior, erased, cache);
  KeptText text;
  text.prior = kept.prior(progress);
  text.preserve = kept.preserve();
  return text;
}

Refinement solve_refinement(const RefinementProblem& problem, const RefinementOptions& options,
                            const at::Tensor& entry_gram) {
  check(options);
  at::Tensor gram = problem.concepts.kept + problem.concepts.edited;
  gram.diagonal().add_(options.regularization);
  if (problem.preserve.defined()) gram.add_(problem.preserve, options.preserve_weight);
  if (problem.prior.defined()) gram.add_(problem.prior, options.prior_weight);
  if (problem.retain.defined()) gram.add_(problem.retain);

  Refinement result;
  result.matrices = options.matrices;
  result.options = options;
  at::Tensor shift = problem.concepts.shift;
  const auto solve = [&] {
    const SpdSolver solver(gram, kNoiseFloor);
    result.condition = solver.condition();
    result.floor_added = solver.floor_added();
    result.delta = solver.solve_right(shift);
  };
  solve();
  if (options.adversarial_rounds == 0) return result;
  if (!entry_gram.defined()) throw Error("adversarial rounds need the model's projections");
  const at::Tensor identity = at::eye(problem.concepts.width(), at::kDouble);
  for (int round = 0; round < options.adversarial_rounds; ++round) {
    // RECE: the embedding f' = T f that the edited model reads like the original reads f,
    //   T = (N^T K N + ridge I)^-1 N^T K,  K = sum over projections of W^T W,
    // becomes another row to edit. T is linear, so the rows themselves are not needed.
    const at::Tensor n = identity + result.delta;
    const at::Tensor ntk = at::matmul(n.transpose(0, 1), entry_gram);
    const double ridge = kAdversarialRidge * entry_gram.diagonal().mean().item<double>();
    const at::Tensor t = SpdSolver(at::matmul(ntk, n) + identity * ridge).solve(ntk);
    const at::Tensor tt = t.transpose(0, 1);
    const at::Tensor second = at::matmul(at::matmul(t, problem.concepts.edited), tt);
    shift = shift + at::matmul(problem.concepts.shift + problem.concepts.edited, tt) - second;
    gram.add_(second);
    solve();
  }
  return result;
}

}  // namespace lacuna
