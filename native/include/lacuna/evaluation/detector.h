// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace lacuna {

// Says whether a picture shows what a name says; a classifier of the user's own.
class Detector {
 public:
  virtual ~Detector() = default;
  virtual std::string name() = 0;
  virtual std::string version() = 0;
  // images: [n, H, W, 3] in 0..1. [n, names] in 0..1: how surely each picture shows each name; NaN
  // for a name that it does not know. A throw of Error is reported for the pictures at hand, and
  // the evaluation goes on.
  virtual at::Tensor score(const at::Tensor& images, const std::vector<std::string>& names) = 0;
};

}  // namespace lacuna
