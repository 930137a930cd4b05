// SPDX-License-Identifier: Apache-2.0
#include "lacuna/training/timestep_sampler.h"

#include <ATen/ops/rand.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "lacuna/error.h"

namespace lacuna {
namespace {
double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
}  // namespace

void check(const FocalTimesteps& focal) {
  if (!focal.enabled) return;
  if (!(focal.t1 >= 0.0 && focal.t1 < focal.t2 && focal.t2 <= 1000.0)) {
    throw Error("the focal timesteps must satisfy 0 <= t1 < t2 <= 1000");
  }
  if (!(focal.sharpness > 0.0 && std::isfinite(focal.sharpness))) {
    throw Error("the focal sharpness must be above 0");
  }
}

TimestepSampler::TimestepSampler(const FocalTimesteps& focal, int64_t timesteps) {
  check(focal);
  density_.assign(static_cast<size_t>(timesteps), 1.0);
  if (focal.enabled) {
    for (size_t t = 0; t < density_.size(); ++t) {
      const auto x = static_cast<double>(t);
      density_[t] =
          sigmoid(focal.sharpness * (x - focal.t1)) - sigmoid(focal.sharpness * (x - focal.t2));
    }
  }
  const double sum = std::accumulate(density_.begin(), density_.end(), 0.0);
  for (double& value : density_) value /= sum;
  cumulative_.resize(density_.size());
  std::partial_sum(density_.begin(), density_.end(), cumulative_.begin());
}

int64_t TimestepSampler::draw(at::Generator& generator) const {
  const double u = at::rand({1}, generator, at::TensorOptions(at::kDouble)).item<double>();
  const auto it = std::upper_bound(cumulative_.begin(), cumulative_.end(), u);
  // Rounding can leave the last cumulative value a little below 1.
  return std::min<int64_t>(it - cumulative_.begin(), static_cast<int64_t>(cumulative_.size()) - 1);
}

}  // namespace lacuna
