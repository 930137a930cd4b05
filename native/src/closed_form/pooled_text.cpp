// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/pooled_text.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <set>

#include "lacuna/closed_form/general_prior.h"
#include "lacuna/concepts/concept_prompts.h"
#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/error.h"

namespace lacuna {
namespace {

// [prompts, p] float32
at::Tensor pooled_of(TextEncoder& encoder, const std::vector<std::string>& prompts,
                     Progress& progress) {
  const at::Tensor pooled = embed_in_batches(encoder, prompts, progress).pooled;
  if (!pooled.defined()) {
    throw Error(
        "the model reads a pooled text vector and the CLIP gives none; connect the CLIP of the "
        "same checkpoint, or switch 'pooled text' off");
  }
  return pooled.to(at::kFloat);
}

// Weighted rows, one after the other.
class Rows {
 public:
  void add(const at::Tensor& rows, double weight) {
    if (weight == 0.0) return;
    rows_.push_back(rows);
    weights_.push_back(at::full({rows.size(0)}, weight, at::kDouble));
  }
  at::Tensor rows(int64_t width) const {
    return rows_.empty() ? at::zeros({0, width}) : at::cat(rows_);
  }
  at::Tensor weights() const {
    return weights_.empty() ? at::zeros({0}, at::kDouble) : at::cat(weights_);
  }

 private:
  std::vector<at::Tensor> rows_;
  std::vector<at::Tensor> weights_;
};

}  // namespace

StreamRows collect_pooled(TextEncoder& encoder, const ConceptSet& set,
                          const RefinementOptions& options, Progress& progress) {
  Rows from, to, kept;
  std::vector<std::string> erased;
  for (const Concept& item : set.concepts) {
    const double weight = 1.0 / item.templates;
    const at::Tensor anchor =
        pooled_of(encoder, fill_templates(item.kind, item.templates, item.anchor), progress);
    for (std::string& phrase : phrases(item)) {
      from.add(pooled_of(encoder, fill_templates(item.kind, item.templates, phrase), progress),
               weight);
      to.add(anchor, weight);
      erased.push_back(std::move(phrase));
    }
  }
  for (const PreservedPhrase& item : set.preserve) {
    if (options.preserve_weight == 0.0) break;
    kept.add(pooled_of(encoder, fill_templates(item.kind, item.templates, item.phrase), progress),
             options.preserve_weight / item.templates);
  }
  const auto captions = generic_captions(set.general_prior);
  if (!captions.empty() && options.prior_weight > 0.0) {
    const std::vector<std::string> named = captions_naming(set.general_prior, erased);
    const std::set<std::string_view> unwanted(named.begin(), named.end());
    std::vector<std::string> wanted;
    for (const std::string_view caption : captions) {
      if (!unwanted.contains(caption)) wanted.emplace_back(caption);
    }
    kept.add(pooled_of(encoder, wanted, progress),
             options.prior_weight / static_cast<double>(captions.size()));
  }
  const at::Tensor moving = from.rows(0);
  return {moving, to.rows(0), from.weights(), kept.rows(moving.size(1)), kept.weights()};
}

RowFit fit_pooled(TextEncoder& encoder, const ConceptSet& set, const RefinementOptions& options,
                  Progress& progress) {
  return fit_rows(collect_pooled(encoder, set, options, progress),
                  options.regularization / static_cast<double>(encoder.window()));
}

}  // namespace lacuna
