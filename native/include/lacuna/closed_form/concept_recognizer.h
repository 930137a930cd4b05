// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace lacuna {

// How much a prompt is about one of the concepts, told from its embedding alone (linear
// discriminant against words of the vocabulary):
//   score_c(x) = w_c . (x - m) / (w_c . (c - m)),  w_c = (S + tr(S)/d I)^-1 (c - m)
// with mean m and covariance S of words put into the same templates, c the concept in them, and x
// the last row of a prompt's window, which has read all of it. 0: like any word; 1: like the
// concept itself. Words that mean the same come out above one half, others of the same class below:
// on the demo model's encoder 0.72 to 0.85 for the synonyms of ten objects, at most 0.42 for twenty
// of their neighbours.
class ConceptRecognizer {
 public:
  // Above it a prompt counts as one that names the concept.
  static constexpr double kNames = 0.5;

  // words: [n, d], n at least 2; concepts: [k, d]; float64 on the CPU.
  ConceptRecognizer(const at::Tensor& words, const at::Tensor& concepts);
  // [m, k] for rows [m, d].
  at::Tensor scores(const at::Tensor& rows) const;
  // scores = (rows - mean) weights; [d] and [d, k]
  const at::Tensor& mean() const { return mean_; }
  const at::Tensor& weights() const { return weights_; }

 private:
  at::Tensor mean_;     // [d]
  at::Tensor weights_;  // [d, k]
};

}  // namespace lacuna
