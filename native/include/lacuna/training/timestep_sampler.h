// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Generator.h>

#include <cstdint>
#include <vector>

namespace lacuna {

// Concept-focal importance sampling (MACE Eq. 5): LoRA training looks mostly at the noise levels at
// which a picture gets its subject,
//   xi(t) ~ sigmoid(sharpness (t - t1)) - sigmoid(sharpness (t - t2)).
struct FocalTimesteps {
  bool enabled = true;  // false: every timestep is equally likely
  double t1 = 200.0;
  double t2 = 400.0;
  double sharpness = 0.05;

  bool operator==(const FocalTimesteps&) const = default;
};

// Throws Error unless 0 <= t1 < t2 <= 1000 and the sharpness is positive.
void check(const FocalTimesteps& focal);

// Draws timesteps 0 .. timesteps - 1. A draw uses one number of the generator.
class TimestepSampler {
 public:
  TimestepSampler(const FocalTimesteps& focal, int64_t timesteps);
  int64_t draw(at::Generator& generator) const;
  // Probability of each timestep; sums to 1.
  const std::vector<double>& density() const { return density_; }

 private:
  std::vector<double> density_;
  std::vector<double> cumulative_;
};

}  // namespace lacuna
