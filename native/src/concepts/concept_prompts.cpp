// SPDX-License-Identifier: Apache-2.0
#include "lacuna/concepts/concept_prompts.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>

#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/error.h"

namespace lacuna {
namespace {

at::Tensor on_cpu(const at::Tensor& tensor) {
  const at::Tensor moved = tensor.detach().to(at::kCPU, at::kFloat);
  return moved.is_inference() ? moved.clone() : moved;
}

void mark(at::Tensor& row, int64_t begin, int64_t end) {
  const int64_t last = std::min(end, row.size(0));
  if (begin < last) row.narrow(0, begin, last - begin).fill_(1);
}

}  // namespace

std::string_view to_string(TokenSet tokens) {
  return tokens == TokenSet::kPhrase ? "phrase" : "phrase+padding";
}

TokenSet token_set_from_string(std::string_view text) {
  if (text == "phrase") return TokenSet::kPhrase;
  if (text == "phrase+padding") return TokenSet::kPhraseAndPadding;
  throw Error("unknown tokens '" + std::string(text) + "'; use one of: phrase, phrase+padding");
}

at::Tensor ConceptPrompts::tokens(TokenSet set) const {
  return set == TokenSet::kPhrase ? phrase : (phrase + padding).clamp_max(1);
}

TextEmbedding embed_in_batches(TextEncoder& encoder, const std::vector<std::string>& prompts,
                               Progress& progress) {
  std::vector<at::Tensor> context;
  std::vector<at::Tensor> pooled;
  for (size_t begin = 0; begin < prompts.size(); begin += kPromptsPerCall) {
    progress.check();
    const size_t end = std::min(prompts.size(), begin + kPromptsPerCall);
    const TextEmbedding part = encoder.embed({prompts.begin() + begin, prompts.begin() + end});
    if (part.context.dim() != 3 || part.context.size(0) != static_cast<int64_t>(end - begin) ||
        part.context.size(1) != encoder.window() || part.context.size(2) != encoder.width()) {
      throw Error("the text encoder returned embeddings of an unexpected shape");
    }
    context.push_back(on_cpu(part.context));
    if (part.pooled.defined()) pooled.push_back(on_cpu(part.pooled));
  }
  return {at::cat(context), pooled.empty() ? at::Tensor() : at::cat(pooled)};
}

std::vector<at::Tensor> encode_starts(TextEncoder& encoder, const std::vector<std::string>& prompts,
                                      Progress& progress) {
  const int64_t window = encoder.window();
  std::vector<int64_t> lengths;
  for (const std::string& prompt : prompts) {
    lengths.push_back(std::min(window, static_cast<int64_t>(encoder.tokenize(prompt).size())));
  }
  // The short ones together, or a long one would make them long, too.
  std::vector<size_t> order(prompts.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return lengths[a] < lengths[b]; });
  std::vector<at::Tensor> starts(prompts.size());
  for (size_t begin = 0; begin < order.size();) {
    progress.check();
    // As many as cost no more than kPromptsPerCall whole windows.
    std::vector<std::string> part;
    int64_t longest = 0;
    for (size_t k = begin; k < order.size(); ++k) {
      const int64_t length = lengths[order[k]];
      const auto cost = static_cast<int64_t>(part.size() + 1) * length;
      if (!part.empty() && cost > static_cast<int64_t>(kPromptsPerCall) * window) break;
      part.push_back(prompts[order[k]]);
      longest = length;
    }
    const at::Tensor rows = encoder.encode_start(part, longest).detach().to(at::kCPU, at::kDouble);
    if (rows.dim() != 3 || rows.size(0) != static_cast<int64_t>(part.size()) ||
        rows.size(1) != longest || rows.size(2) != encoder.width()) {
      throw Error("the text encoder returned embeddings of an unexpected shape");
    }
    for (int64_t row = 0; row < rows.size(0); ++row, ++begin) {
      starts[order[begin]] = rows[row].narrow(0, 0, lengths[order[begin]]);
    }
  }
  return starts;
}

ConceptPrompts encode_prompts(TextEncoder& encoder, const Concept& item, Progress& progress) {
  ConceptPrompts out;
  const auto n = static_cast<int64_t>(phrases(item).size()) * item.templates;
  out.phrase = at::zeros({n, encoder.window()}, at::kFloat);
  out.padding = at::zeros({n, encoder.window()}, at::kFloat);
  for (const std::string& phrase : phrases(item)) {
    std::vector<int64_t> words = encoder.tokenize(phrase);
    if (words.size() <= 2) {
      throw Error("the text encoder reads nothing in '" + phrase + "'; use other words");
    }
    words = {words.begin() + 1, words.end() - 1};
    for (const std::string_view prompt_template :
         prompt_templates(item.kind).first(static_cast<size_t>(item.templates))) {
      const auto row = static_cast<int64_t>(out.texts.size());
      out.texts.push_back(fill_template(prompt_template, phrase));
      const std::vector<int64_t> ids = encoder.tokenize(out.texts.back());
      at::Tensor phrase_row = out.phrase[row];
      at::Tensor padding_row = out.padding[row];
      // Where the template puts it, and wherever else the same tokens stand. Byte-pair encoding
      // works word by word, so the tokens before the slot do not depend on the phrase.
      const std::string before = prefix_of_template(prompt_template);
      const auto begin =
          static_cast<int64_t>(before.empty() ? 1 : encoder.tokenize(before).size() - 1);
      mark(phrase_row, begin, begin + static_cast<int64_t>(words.size()));
      for (auto at = ids.begin();
           (at = std::search(at, ids.end(), words.begin(), words.end())) != ids.end(); ++at) {
        mark(phrase_row, at - ids.begin(), at - ids.begin() + static_cast<int64_t>(words.size()));
      }
      mark(padding_row, static_cast<int64_t>(ids.size()) - 1, encoder.window());
    }
  }
  out.embedding = embed_in_batches(encoder, out.texts, progress);
  return out;
}

TextEmbedding select(const TextEmbedding& text, const at::Tensor& rows) {
  return {text.context.index_select(0, rows),
          text.pooled.defined() ? text.pooled.index_select(0, rows) : at::Tensor()};
}

}  // namespace lacuna
