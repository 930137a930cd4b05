// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace lacuna {

// Of a loss, taken off its gradients again: keeps those of float16 models above what float16 can
// hold. A power of two: nothing else changes.
inline constexpr double kLossScale = 1024.0;

// AdamW (betas 0.9 and 0.999, weight decay 0.01, eps 1e-8) with gradients clipped to a common norm
// of 1. Parameters are changed in place.
class AdamW {
 public:
  AdamW(std::vector<at::Tensor> parameters, double learning_rate);
  const std::vector<at::Tensor>& parameters() const { return parameters_; }
  // One gradient for each parameter; a parameter with an undefined one is left alone, without
  // decay.
  void step(const std::vector<at::Tensor>& gradients);

 private:
  struct Moments {
    at::Tensor first;
    at::Tensor second;
    int64_t steps = 0;
  };
  std::vector<at::Tensor> parameters_;
  std::vector<Moments> moments_;
  double learning_rate_;
};

}  // namespace lacuna
