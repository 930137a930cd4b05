// SPDX-License-Identifier: Apache-2.0
// Intervals and tests: published values, definitions, coverage by simulation.
#include "lacuna/evaluation/confidence.h"

#include <cmath>

#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::SeededTest;

double percent(double share) { return std::round(1000 * share) / 10; }

TEST(WilsonInterval, AgreesWithPublishedValues) {
  struct Case {
    Count count;
    double low, high;
  };
  for (const Case& c : {Case{{0, 20}, 0.0, 16.1}, Case{{0, 50}, 0.0, 7.1}, Case{{0, 142}, 0.0, 2.6},
                        Case{{5, 100}, 2.2, 11.2}, Case{{25, 500}, 3.4, 7.3}}) {
    const Interval interval = wilson_interval(c.count);
    EXPECT_DOUBLE_EQ(percent(interval.low), c.low) << c.count.hits << " of " << c.count.trials;
    EXPECT_DOUBLE_EQ(percent(interval.high), c.high) << c.count.hits << " of " << c.count.trials;
  }
}

TEST(WilsonInterval, IsSymmetricAndKeepsItsEnds) {
  for (int64_t hits = 0; hits <= 30; ++hits) {
    const Interval interval = wilson_interval({hits, 30});
    const Interval mirrored = wilson_interval({30 - hits, 30});
    EXPECT_NEAR(interval.low, 1 - mirrored.high, 1e-12);
    EXPECT_LE(interval.low, Count({hits, 30}).share());
    EXPECT_GE(interval.high, Count({hits, 30}).share());
  }
  EXPECT_EQ(wilson_interval({0, 7}).low, 0.0);
  EXPECT_EQ(wilson_interval({7, 7}).high, 1.0);
  EXPECT_EQ(wilson_interval({0, 0}).low, 0.0);
  EXPECT_EQ(wilson_interval({0, 0}).high, 1.0);
}

class Coverage : public SeededTest {};

TEST_F(Coverage, WilsonHoldsTheTruthNineteenTimesOfTwenty) {
  constexpr int64_t kRuns = 4000;
  for (const int64_t trials : {20, 100}) {
    for (const double truth : {0.02, 0.1, 0.5, 0.8}) {
      const at::Tensor hits = at::rand({kRuns, trials}).lt(truth).sum(1);
      int64_t held = 0;
      for (int64_t run = 0; run < kRuns; ++run) {
        const Interval interval = wilson_interval({hits[run].item<int64_t>(), trials});
        held += interval.low <= truth && truth <= interval.high;
      }
      // Wilson's exact coverage lies between 0.92 and 0.99 here; 4000 runs are good to 0.01.
      EXPECT_GT(static_cast<double>(held), 0.91 * kRuns) << truth << " of " << trials;
    }
  }
}

TEST_F(Coverage, TheBootstrapHoldsTheMeanOfClusteredValues) {
  constexpr int64_t kRuns = 300, kClusters = 30, kEach = 4;
  std::vector<int64_t> clusters;
  for (int64_t i = 0; i < kClusters * kEach; ++i) clusters.push_back(i / kEach);
  std::vector<int64_t> alone(clusters.size());
  for (size_t i = 0; i < alone.size(); ++i) alone[i] = static_cast<int64_t>(i);
  int64_t held = 0, held_alone = 0;
  for (int64_t run = 0; run < kRuns; ++run) {
    // What a prompt's pictures share is most of what differs.
    const at::Tensor drawn = 0.3 + at::randn({kClusters, 1}, at::kDouble) +
                             0.3 * at::randn({kClusters, kEach}, at::kDouble);
    const double* data = drawn.const_data_ptr<double>();
    const std::vector<double> values(data, data + drawn.numel());
    const auto holds = [&](const std::vector<int64_t>& grouping) {
      const Interval interval = clustered_bootstrap(values, grouping, run, "coverage").interval;
      return interval.low <= 0.3 && 0.3 <= interval.high;
    };
    held += holds(clusters);
    held_alone += holds(alone);
  }
  EXPECT_GT(static_cast<double>(held), 0.88 * kRuns);
  EXPECT_LT(static_cast<double>(held_alone),
            0.8 * kRuns);  // why clusters matter: here it would claim far too much
}

TEST(ClusteredBootstrap, IsReproducibleAndDegenerateWhereItMustBe) {
  const std::vector<double> values{0.5, 1.0, -0.25, 2.0, 0.0, 1.5};
  const std::vector<int64_t> clusters{0, 0, 1, 1, 2, 2};
  const MeanEstimate first = clustered_bootstrap(values, clusters, 3, "dog");
  const MeanEstimate again = clustered_bootstrap(values, clusters, 3, "dog");
  EXPECT_EQ(first.interval.low, again.interval.low);
  EXPECT_EQ(first.interval.high, again.interval.high);
  EXPECT_NEAR(first.mean, 4.75 / 6, 1e-12);
  EXPECT_LT(first.interval.low, first.mean);
  EXPECT_GT(first.interval.high, first.mean);
  const MeanEstimate equal = clustered_bootstrap({2, 2, 2}, {0, 1, 2}, 3, "dog");
  EXPECT_EQ(equal.interval.low, 2.0);
  EXPECT_EQ(equal.interval.high, 2.0);
  EXPECT_EQ(clustered_bootstrap({}, {}, 3, "dog").mean, 0.0);
}

TEST(ExactMcNemar, IsTheBinomialTestOfTheDiscordantPairs) {
  EXPECT_EQ(exact_mcnemar(0, 0), 1.0);
  EXPECT_EQ(exact_mcnemar(3, 3), 1.0);
  EXPECT_NEAR(exact_mcnemar(5, 0), 2.0 / 32, 1e-12);
  EXPECT_NEAR(exact_mcnemar(0, 5), 2.0 / 32, 1e-12);
  EXPECT_NEAR(exact_mcnemar(1, 9), 2.0 * 11 / 1024, 1e-12);
  EXPECT_NEAR(exact_mcnemar(20, 0), 2.0 / 1048576, 1e-15);
  EXPECT_GT(exact_mcnemar(700, 500), 0.0);  // no overflow on the way
  EXPECT_LT(exact_mcnemar(700, 500), 1e-7);
}

TEST(Holm, MultipliesStepByStepAndStaysInOrder) {
  const std::vector<double> adjusted = holm({0.01, 0.04, 0.03, 0.005});
  EXPECT_NEAR(adjusted[0], 0.03, 1e-12);
  EXPECT_NEAR(adjusted[1], 0.06, 1e-12);
  EXPECT_NEAR(adjusted[2], 0.06, 1e-12);
  EXPECT_NEAR(adjusted[3], 0.02, 1e-12);
  EXPECT_EQ(holm({0.9, 0.8}), (std::vector<double>{1.0, 1.0}));
  EXPECT_TRUE(holm({}).empty());
}

TEST(HarmonicMean, IsNoBetterThanItsWorstPart) {
  EXPECT_NEAR(harmonic_mean({0.9, 0.9}), 0.9, 1e-12);
  EXPECT_NEAR(harmonic_mean({1.0, 0.5}), 2.0 / 3, 1e-12);
  EXPECT_EQ(harmonic_mean({1.0, 0.0}), 0.0);
  EXPECT_EQ(harmonic_mean({}), 0.0);
}

}  // namespace
}  // namespace lacuna
