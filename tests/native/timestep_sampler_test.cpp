// SPDX-License-Identifier: Apache-2.0
// The density of MACE's concept-focal sampling, against its published constants, and that draws
// follow it.
#include "lacuna/training/timestep_sampler.h"

#include "lacuna/error.h"
#include "lacuna/files/random_stream.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::message_of;

class TimestepSamplerTest : public testing::SeededTest {
 protected:
  // Pearson's statistic of draws against a density, in cells of at least five expected draws;
  // returns (statistic - degrees) / standard deviation.
  static double surprise(const TimestepSampler& drawn_from, const std::vector<double>& density,
                         at::Generator generator) {
    constexpr int kDraws = 100'000;
    std::vector<int> counts(density.size(), 0);
    for (int i = 0; i < kDraws; ++i) ++counts[static_cast<size_t>(drawn_from.draw(generator))];
    double statistic = 0.0, expected = 0.0, observed = 0.0;
    int cells = 0;
    for (size_t t = 0; t < density.size(); ++t) {
      expected += kDraws * density[t];
      observed += counts[t];
      if (expected < 5.0 && t + 1 < density.size()) continue;
      statistic += (observed - expected) * (observed - expected) / std::max(expected, 1.0);
      ++cells;
      expected = observed = 0.0;
    }
    return (statistic - (cells - 1)) / std::sqrt(2.0 * (cells - 1));
  }
};

TEST_F(TimestepSamplerTest, N22_HasThePapersConstants) {
  const std::vector<double> p = TimestepSampler(FocalTimesteps{}, 1000).density();
  double sum = 0.0, mean = 0.0, square = 0.0, inside = 0.0, low = 0.0, high = 0.0;
  for (size_t t = 0; t < p.size(); ++t) {
    const auto x = static_cast<double>(t);
    EXPECT_GE(p[t], 0.0);
    sum += p[t];
    mean += x * p[t];
    square += x * x * p[t];
    if (t >= 200 && t <= 400) inside += p[t];
    if (t < 100) low += p[t];
    if (t > 500) high += p[t];
  }
  EXPECT_NEAR(sum, 1.0, 1e-12);
  EXPECT_NEAR(p[300], 4.933093e-3, 5e-9);
  EXPECT_NEAR(p[200], 2.499784e-3, 5e-9);
  EXPECT_NEAR(p[400], p[200], 1e-12);
  EXPECT_NEAR(mean, 300.0014, 1e-3);
  EXPECT_NEAR(std::sqrt(square - mean * mean), 68.182, 1e-2);
  EXPECT_NEAR(inside, 0.86387, 1e-5);
  EXPECT_NEAR(low, 6.50e-4, 5e-6);
  EXPECT_NEAR(high, 6.55e-4, 5e-6);
  for (size_t k = 0; k <= 250; ++k) EXPECT_NEAR(p[300 - k], p[300 + k], 1e-9);
}

TEST_F(TimestepSamplerTest, N22_DrawsFollowTheDensity) {
  const auto stream = [&](const char* purpose) {
    return random_stream(static_cast<int64_t>(seed() >> 1), "timesteps", purpose);
  };
  const TimestepSampler focal(FocalTimesteps{}, 1000);
  const TimestepSampler uniform(FocalTimesteps{.enabled = false}, 1000);
  // Seven standard deviations: less than one run in a million.
  EXPECT_LT(std::abs(surprise(focal, focal.density(), stream("a"))), 7.0);
  EXPECT_LT(std::abs(surprise(uniform, uniform.density(), stream("b"))), 7.0);
  EXPECT_GT(surprise(uniform, focal.density(), stream("c")), 100.0);
}

TEST_F(TimestepSamplerTest, RefusesImpossibleRanges) {
  for (const FocalTimesteps& bad :
       {FocalTimesteps{.t1 = 400, .t2 = 400}, FocalTimesteps{.t1 = -1}, FocalTimesteps{.t2 = 1001},
        FocalTimesteps{.sharpness = 0}, FocalTimesteps{.t1 = NAN}}) {
    EXPECT_NE(message_of([&] { check(bad); }).find("focal"), std::string::npos);
  }
  EXPECT_EQ(message_of([&] { check(FocalTimesteps{.enabled = false, .t1 = 9, .t2 = 3}); }), "");
}

// Values that every platform and version must reproduce: seeds of shared bundles depend on them.
TEST(RandomStreamTest, HashesAndStreamsNeverChange) {
  EXPECT_EQ(stable_hash(""), 0xcbf29ce484222325u);
  EXPECT_EQ(stable_hash("a"), 0xaf63dc4c8601ec8cu);  // published FNV-1a test vectors
  EXPECT_EQ(stable_hash("foobar"), 0x85944171f73967e8u);
  const auto first = [](int64_t seed, const char* subject, const char* purpose) {
    at::Generator generator = random_stream(seed, subject, purpose);
    return at::randn({4}, generator, at::TensorOptions(at::kDouble));
  };
  const at::Tensor base = first(1, "cat", "training");
  EXPECT_TRUE(at::equal(base, first(1, "cat", "training")));
  EXPECT_FALSE(at::equal(base, first(2, "cat", "training")));
  EXPECT_FALSE(at::equal(base, first(1, "car", "training")));
  EXPECT_FALSE(at::equal(base, first(1, "cat", "pictures")));
}

}  // namespace
}  // namespace lacuna
