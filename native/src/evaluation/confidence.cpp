// SPDX-License-Identifier: Apache-2.0
#include "lacuna/evaluation/confidence.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/randint.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "lacuna/files/random_stream.h"

namespace lacuna {
namespace {

constexpr double kZ = 1.959963984540054;  // 97.5 % point of the standard normal distribution
constexpr int64_t kResamples = 2000;

// Linear between order statistics, as numpy does it. values: sorted, not empty.
double quantile(const std::vector<double>& values, double share) {
  const double position = share * static_cast<double>(values.size() - 1);
  const auto low = static_cast<size_t>(position);
  const size_t high = std::min(low + 1, values.size() - 1);
  const double weight = position - static_cast<double>(low);
  return (1 - weight) * values[low] + weight * values[high];
}

}  // namespace

double Count::share() const {
  return trials == 0 ? 0.0 : static_cast<double>(hits) / static_cast<double>(trials);
}

Interval wilson_interval(const Count& count) {
  if (count.trials == 0) return {};
  const double share = count.share();
  const auto n = static_cast<double>(count.trials);
  const double square = kZ * kZ / n;
  const double centre = (share + square / 2) / (1 + square);
  const double half = kZ * std::sqrt(share * (1 - share) / n + square / (4 * n)) / (1 + square);
  // Rounding must not move the ends that are exact.
  return {count.hits == 0 ? 0.0 : std::max(0.0, centre - half),
          count.hits == count.trials ? 1.0 : std::min(1.0, centre + half)};
}

double exact_mcnemar(int64_t only_before, int64_t only_after) {
  const int64_t n = only_before + only_after;
  if (n == 0) return 1.0;
  const auto trials = static_cast<double>(n);
  double tail = 0.0;
  for (int64_t k = 0; k <= std::min(only_before, only_after); ++k) {
    const auto successes = static_cast<double>(k);
    tail += std::exp(std::lgamma(trials + 1) - std::lgamma(successes + 1) -
                     std::lgamma(trials - successes + 1) - trials * std::log(2.0));
  }
  return std::min(1.0, 2 * tail);
}

MeanEstimate clustered_bootstrap(const std::vector<double>& values,
                                 const std::vector<int64_t>& clusters, int64_t seed,
                                 std::string_view subject) {
  if (values.empty()) return {0.0, {0.0, 0.0}};
  struct Sum {
    double total = 0.0;
    double count = 0.0;
  };
  std::map<int64_t, Sum> by_cluster;
  for (size_t i = 0; i < values.size(); ++i) {
    Sum& sum = by_cluster[clusters.at(i)];
    sum.total += values[i];
    sum.count += 1;
  }
  std::vector<Sum> sums;
  for (const auto& [cluster, sum] : by_cluster) sums.push_back(sum);
  const auto k = static_cast<int64_t>(sums.size());
  const at::Tensor draws = at::randint(
      k, {kResamples, k}, random_stream(seed, subject, "bootstrap"), at::TensorOptions(at::kLong));
  const auto* draw = draws.const_data_ptr<int64_t>();
  std::vector<double> means;
  for (int64_t r = 0; r < kResamples; ++r) {
    Sum sum;
    for (int64_t c = 0; c < k; ++c) {
      const Sum& drawn = sums[static_cast<size_t>(draw[r * k + c])];
      sum.total += drawn.total;
      sum.count += drawn.count;
    }
    means.push_back(sum.total / sum.count);
  }
  std::sort(means.begin(), means.end());
  const double mean =
      std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
  return {mean, {quantile(means, 0.025), quantile(means, 0.975)}};
}

std::vector<double> holm(const std::vector<double>& p) {
  std::vector<size_t> order(p.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return p[a] < p[b]; });
  std::vector<double> adjusted(p.size());
  double largest = 0.0;
  for (size_t rank = 0; rank < order.size(); ++rank) {
    const auto tests = static_cast<double>(order.size() - rank);
    largest = std::max(largest, std::min(1.0, tests * p[order[rank]]));
    adjusted[order[rank]] = largest;
  }
  return adjusted;
}

double harmonic_mean(const std::vector<double>& shares) {
  double sum = 0.0;
  for (const double share : shares) {
    if (share <= 0.0) return 0.0;
    sum += 1.0 / share;
  }
  return shares.empty() ? 0.0 : static_cast<double>(shares.size()) / sum;
}

}  // namespace lacuna
