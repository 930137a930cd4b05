// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/concept_recognizer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/matmul.h>

#include <algorithm>
#include <limits>

#include "lacuna/closed_form/spd_solver.h"

namespace lacuna {

ConceptRecognizer::ConceptRecognizer(const at::Tensor& words, const at::Tensor& concepts)
    : mean_(words.mean(0)) {
  const at::Tensor spread = words - mean_;
  at::Tensor covariance = at::matmul(spread.transpose(0, 1), spread) / words.size(0);
  // Words of too few kinds for d directions: what they do not show is as uncertain as the average.
  const double average = covariance.diagonal().mean().item<double>();
  covariance.diagonal().add_(std::max(average, std::numeric_limits<double>::min()));
  const at::Tensor centred = concepts - mean_;
  weights_ = SpdSolver(covariance, kNoiseFloor).solve(centred.transpose(0, 1));
  // A concept that is the words' own mean is like any of them: nothing is told from it.
  const at::Tensor own = (centred.transpose(0, 1) * weights_).sum(0);
  weights_ = weights_ * own.clamp_min(1e-12).reciprocal() * own.gt(1e-12);
}

at::Tensor ConceptRecognizer::scores(const at::Tensor& rows) const {
  return at::matmul(rows - mean_, weights_);
}

}  // namespace lacuna
