// SPDX-License-Identifier: Apache-2.0
#include "lacuna/training/adam_w.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>

namespace lacuna {
namespace {
constexpr double kBeta1 = 0.9;
constexpr double kBeta2 = 0.999;
constexpr double kWeightDecay = 0.01;
constexpr double kEpsilon = 1e-8;
constexpr double kLargestNorm = 1.0;
}  // namespace

AdamW::AdamW(std::vector<at::Tensor> parameters, double learning_rate)
    : parameters_(std::move(parameters)), learning_rate_(learning_rate) {
  for (const at::Tensor& parameter : parameters_) {
    const at::Tensor zero = at::zeros_like(parameter.detach());
    moments_.push_back({zero, zero.clone(), 0});
  }
}

void AdamW::step(const std::vector<at::Tensor>& gradients) {
  const at::NoGradGuard no_grad;
  double squared = 0.0;
  for (const at::Tensor& gradient : gradients) {
    if (gradient.defined()) squared += gradient.square().sum(at::kDouble).item<double>();
  }
  const double clip = std::min(1.0, kLargestNorm / (std::sqrt(squared) + 1e-6));
  for (size_t i = 0; i < parameters_.size(); ++i) {
    if (!gradients[i].defined()) continue;
    Moments& m = moments_[i];
    const at::Tensor gradient = gradients[i] * clip;
    ++m.steps;
    m.first.mul_(kBeta1).add_(gradient, 1 - kBeta1);
    m.second.mul_(kBeta2).addcmul_(gradient, gradient, 1 - kBeta2);
    const auto steps = static_cast<double>(m.steps);
    const double scale = learning_rate_ / (1 - std::pow(kBeta1, steps));
    const at::Tensor spread =
        m.second.sqrt().div_(std::sqrt(1 - std::pow(kBeta2, steps))).add_(kEpsilon);
    parameters_[i].mul_(1 - learning_rate_ * kWeightDecay).addcdiv_(m.first, spread, -scale);
  }
}

}  // namespace lacuna
