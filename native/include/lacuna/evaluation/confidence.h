// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace lacuna {

// How sure an evaluation can be: 95 % intervals and tests for few pictures.

struct Interval {
  double low = 0.0;
  double high = 1.0;
};

// hits of trials.
struct Count {
  int64_t hits = 0;
  int64_t trials = 0;

  double share() const;  // 0 of 0 is 0
  bool operator==(const Count&) const = default;
};

// Wilson's score interval of a proportion (Wilson 1927), fit for shares of 0 and 1 and for few
// trials. No trials: [0, 1].
Interval wilson_interval(const Count& count);

// Two-sided p of McNemar's exact test: did a yes/no change between two pictures of the same seed?
// only_before, only_after: pairs in which only one of the two says yes. No such pair: 1.
double exact_mcnemar(int64_t only_before, int64_t only_after);

struct MeanEstimate {
  double mean = 0.0;
  Interval interval;  // of the mean
};

// Percentile bootstrap of the mean of paired differences (or of any values), 2000 resamples of
// whole clusters: pictures of one prompt resemble each other. clusters[i]: the prompt of values[i].
// The same values and seed give the same interval. No value: mean 0, an interval of no width.
MeanEstimate clustered_bootstrap(const std::vector<double>& values,
                                 const std::vector<int64_t>& clusters, int64_t seed,
                                 std::string_view subject);

// Holm's step-down correction of several p-values, in their order.
std::vector<double> holm(const std::vector<double>& p);

// 0 as soon as one share is 0; shares in 0..1.
double harmonic_mean(const std::vector<double>& shares);

}  // namespace lacuna
