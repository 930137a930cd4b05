// SPDX-License-Identifier: Apache-2.0
#include "training/training_progress.h"

#include <algorithm>
#include <cmath>

namespace lacuna {

void Effort::add(int64_t passes) {
  done_ = std::min(done_ + passes, total_);
  progress_.report(done_, total_);
}

std::string Effort::time_left() const {
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  const double left = seconds / static_cast<double>(std::max<int64_t>(1, done_)) *
                      static_cast<double>(total_ - done_);
  if (left < 90.0) return "about " + std::to_string(std::lround(left)) + " s left";
  return "about " + std::to_string(std::lround(left / 60.0)) + " min left";
}

}  // namespace lacuna
