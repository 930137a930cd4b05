// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/low_rank.h"

#include "lacuna/closed_form/lora_export.h"
#include "support/fake_host.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::FakeDenoiser;
using testing::random_matrix;
using testing::relative_difference;

class LowRankTest : public testing::DeviceTest {
 protected:
  SilentProgress progress_;
};
INSTANTIATE_TEST_SUITE_P(Devices, LowRankTest, ::testing::ValuesIn(testing::devices()));

TEST_P(LowRankTest, ExactWhereTheRankAllows) {
  const at::Tensor delta = at::matmul(random_matrix(20, 3), random_matrix(3, 20));
  const at::Tensor w = random_matrix(50, 20);
  const SharedFactorization factors(delta, w, 20, progress_);
  EXPECT_EQ(factors.rank_for(1e-6), 3);
  EXPECT_LT(factors.residual(3), 1e-6);
  const at::Tensor v = factors.down(3);
  EXPECT_LT(relative_difference(at::matmul(at::matmul(at::matmul(w, delta), v.t()), v),
                                at::matmul(w, delta)),
            1e-10);
  EXPECT_NEAR(factors.edit_norm(), at::matmul(w, delta).norm().item<double>(), 1e-8);
}

// Eckart-Young: the printed residual is the true one, and the singular values' lower bound.
TEST_P(LowRankTest, TruncationIsTheBestPossibleAndItsResidualIsTrue) {
  const at::Tensor delta = random_matrix(20, 20);
  const at::Tensor w = random_matrix(50, 20);
  const at::Tensor edit = at::matmul(w, delta);
  const SharedFactorization factors(delta, w, 20, progress_);
  const at::Tensor singular = at::linalg_svdvals(edit);
  for (const int64_t rank : {1, 5, 12}) {
    const at::Tensor v = factors.down(rank);
    const double measured = relative_difference(at::matmul(at::matmul(edit, v.t()), v), edit);
    const double best =
        (singular.narrow(0, rank, 20 - rank).norm() / singular.norm()).item<double>();
    EXPECT_NEAR(factors.residual(rank), measured, 1e-9);
    EXPECT_NEAR(measured, best, 1e-9);
    EXPECT_EQ(factors.rank_for(measured * 1.0001), rank);
  }
  EXPECT_EQ(factors.residual(20), 0.0);
}

// Wide encoders (SDXL) are not decomposed whole: the leading directions come from iteration.
TEST_P(LowRankTest, WideEditsGiveTheSameLeadingDirections) {
  const int64_t d = 1100;
  const at::Tensor spectrum = at::logspace(0, -4, 40, 10.0, at::kDouble);
  const at::Tensor left = std::get<0>(at::linalg_qr(random_matrix(d, 40)));
  const at::Tensor right = std::get<0>(at::linalg_qr(random_matrix(d, 40)));
  const at::Tensor delta = at::matmul(left * spectrum, right.t());
  const at::Tensor identity = at::eye(d, at::kDouble);
  const SharedFactorization factors(delta, identity, 24, progress_);
  EXPECT_EQ(factors.max_rank(), 24);
  EXPECT_FALSE(factors.rank_for(1e-6).has_value());
  for (const int64_t rank : {1, 8, 24}) {
    const double expected =
        (spectrum.narrow(0, rank, 40 - rank).norm() / spectrum.norm()).item<double>();
    EXPECT_NEAR(factors.residual(rank) / expected, 1.0, 1e-3);
    const at::Tensor v = factors.down(rank);
    EXPECT_NEAR(relative_difference(at::matmul(at::matmul(delta, v.t()), v), delta) / expected, 1.0,
                1e-3);
  }
  const SharedFactorization exact(delta, identity, 64, progress_);
  ASSERT_TRUE(exact.rank_for(1e-6).has_value());
  EXPECT_LE(*exact.rank_for(1e-6), 40);
  testing::CountingProgress cancelled;
  cancelled.cancel_at = 1;
  EXPECT_THROW(SharedFactorization(delta, identity, 24, cancelled), testing::Cancelled);
}

TEST_P(LowRankTest, NoEditHasNoResidual) {
  const SharedFactorization factors(at::zeros({6, 6}, at::kDouble), at::eye(6, at::kDouble), 6,
                                    progress_);
  EXPECT_EQ(factors.residual(1), 0.0);
  EXPECT_EQ(factors.rank_for(1e-6), 1);
}

TEST_P(LowRankTest, LoraReproducesThePatchToHalfPrecision) {
  FakeDenoiser model(3, 16, device());
  const auto projections = edited_entries(model, EditedMatrices::kKeyAndValue, 16);
  const at::Tensor rows = entry_rows(model, projections, progress_);
  // Components of very different size: half precision must not lose the small ones.
  const at::Tensor delta =
      1e-3 * at::outer(random_matrix(16, 1).squeeze(1), random_matrix(16, 1).squeeze(1)) +
      2.0 * at::outer(random_matrix(16, 1).squeeze(1), random_matrix(16, 1).squeeze(1));
  const SharedFactorization factors(delta, rows, 16, progress_);
  for (const double strength : {1.0, 0.5}) {
    const LoraExport lora =
        export_lora(model, projections, delta, factors, {8}, strength, progress_);
    EXPECT_EQ(lora.rank, 2);
    EXPECT_LT(lora.residual, 1e-6);
    EXPECT_EQ(lora.tensors.size(), 3 * projections.size());
    for (const TextEntry& projection : projections) {
      const at::Tensor up = lora.tensors.at(projection.lora_name + ".lora_up.weight");
      const at::Tensor down = lora.tensors.at(projection.lora_name + ".lora_down.weight");
      EXPECT_EQ(lora.tensors.at(projection.lora_name + ".alpha").item<double>(), 2.0);
      EXPECT_EQ(up.scalar_type(), at::kHalf);
      EXPECT_TRUE(up.device().is_cpu());
      const at::Tensor expected =
          strength *
          at::matmul(model.effective_weight(projection.name).cpu().to(at::kDouble), delta);
      // Two factors, each rounded to 11 bits.
      EXPECT_LT(relative_difference(at::matmul(up.to(at::kDouble), down.to(at::kDouble)), expected),
                2e-3);
    }
  }
  const LoraExport truncated = export_lora(model, projections, delta, factors, {1}, 1.0, progress_);
  EXPECT_EQ(truncated.rank, 1);
  EXPECT_GT(truncated.residual, 1e-6);
}

TEST_P(LowRankTest, TheLoraIsAsSmallAsItMayBe) {
  FakeDenoiser model(3, 40, device());
  const auto projections = edited_entries(model, EditedMatrices::kKeyAndValue, 40);
  const at::Tensor rows = entry_rows(model, projections, progress_);
  const at::Tensor spectrum = at::logspace(0, -3, 40, 10.0, at::kDouble);
  const at::Tensor delta = at::matmul(std::get<0>(at::linalg_qr(random_matrix(40, 40))) * spectrum,
                                      std::get<0>(at::linalg_qr(random_matrix(40, 40))));
  const SharedFactorization factors(delta, rows, 40, progress_);
  const auto rank_with = [&](const LoraLimits& limits) {
    const LoraExport lora = export_lora(model, projections, delta, factors, limits, 1.0, progress_);
    EXPECT_TRUE(lora.residual <= limits.left_out || lora.rank == limits.rank);
    return lora.rank;
  };
  const int64_t at_one_percent = rank_with({40, 0.01});
  EXPECT_GT(factors.residual(at_one_percent - 1), 0.01);
  EXPECT_LT(rank_with({40, 0.1}), at_one_percent);
  EXPECT_EQ(rank_with({5, 0.01}), 5);
  EXPECT_EQ(rank_with({40, 0.0}), 40);
}

// A wide edit is looked at only as far as it takes to leave out what may be left out.
TEST_P(LowRankTest, WideEditsStopAtTheTolerance) {
  const int64_t d = 1100;
  const at::Tensor spectrum = at::logspace(0, -6, 300, 10.0, at::kDouble);
  const at::Tensor delta = at::matmul(std::get<0>(at::linalg_qr(random_matrix(d, 300))) * spectrum,
                                      std::get<0>(at::linalg_qr(random_matrix(d, 300))).t());
  const SharedFactorization factors(delta, at::eye(d), 256, progress_, 0.01);
  EXPECT_LT(factors.max_rank(), 256);
  EXPECT_LE(factors.residual(factors.max_rank()), 0.01);
  EXPECT_GT(*factors.rank_for(0.01), 1);
}

}  // namespace
}  // namespace lacuna
