// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "lacuna/host.h"

namespace lacuna {

// Work done and left, in forward passes of one sample.
class Effort {
 public:
  Effort(Progress& progress, int64_t total) : progress_(progress), total_(total) {}

  void add(int64_t passes);
  std::string time_left() const;  // "about 40 s left"

 private:
  Progress& progress_;
  int64_t total_;
  int64_t done_ = 0;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

// Cancellation passes through; progress of inner loops would only make the bar jump.
class ChecksOnly final : public Progress {
 public:
  explicit ChecksOnly(Progress& outer) : outer_(outer) {}
  void report(int64_t, int64_t) override { outer_.check(); }
  void check() override { outer_.check(); }

 private:
  Progress& outer_;
};

}  // namespace lacuna
