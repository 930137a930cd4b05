// SPDX-License-Identifier: Apache-2.0
// Patches with low-rank pairs as LoRA files and as patches for the host.
#include "lacuna/closed_form/lora_export.h"

#include <cmath>

#include "lacuna/error.h"
#include "support/fake_host.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::FakeDenoiser;
using testing::random_matrix;
using testing::relative_difference;

constexpr int64_t kWidth = 40;

class PairExportTest : public testing::DeviceTest {
 protected:
  PairExportTest() : model_(8, kWidth, device()) {
    projections_ = edited_entries(model_, EditedMatrices::kKeyAndValue, kWidth);
    rows_ = entry_rows(model_, projections_, progress_);
  }
  // Pairs of `rank` for the projections; about as large as W times a matrix of unit entries.
  ErasurePatch patch(const at::Tensor& delta, int64_t rank) {
    ErasurePatch patch;
    patch.delta = delta;
    for (const TextEntry& projection : projections_) {
      patch.pairs[projection.lora_name] = {
          random_matrix(model_.effective_weight(projection.name).size(0), rank),
          5.0 * random_matrix(kWidth, rank)};
    }
    return patch;
  }
  SharedFactorization factors(const at::Tensor& delta, int64_t max_rank = kWidth) {
    return SharedFactorization(delta, rows_, max_rank, progress_);
  }
  at::Tensor expected(const ErasurePatch& patch, const TextEntry& projection) {
    return weight_change(patch, projection,
                         model_.effective_weight(projection.name).cpu().to(at::kDouble));
  }
  static at::Tensor product(const LoraExport& lora, const TextEntry& projection) {
    const at::Tensor up = lora.tensors.at(projection.lora_name + ".lora_up.weight");
    const at::Tensor down = lora.tensors.at(projection.lora_name + ".lora_down.weight");
    EXPECT_EQ(up.scalar_type(), at::kHalf);
    EXPECT_EQ(down.scalar_type(), at::kHalf);
    EXPECT_EQ(lora.tensors.at(projection.lora_name + ".alpha").item<int64_t>(), up.size(1));
    return at::matmul(up.to(at::kDouble), down.to(at::kDouble));
  }
  // Relative distance of the LoRA to the patch over all projections.
  double distance(const LoraExport& lora, const ErasurePatch& patch) {
    double lost = 0.0, whole = 0.0;
    for (const TextEntry& projection : projections_) {
      const at::Tensor edit = expected(patch, projection);
      lost += (product(lora, projection) - edit).square().sum().item<double>();
      whole += edit.square().sum().item<double>();
    }
    return std::sqrt(lost / whole);
  }
  double norm(const ErasurePatch& patch) {
    double whole = 0.0;
    for (const TextEntry& projection : projections_) {
      whole += expected(patch, projection).square().sum().item<double>();
    }
    return std::sqrt(whole);
  }

  FakeDenoiser model_;
  std::vector<TextEntry> projections_;
  at::Tensor rows_;
  SilentProgress progress_;
};
INSTANTIATE_TEST_SUITE_P(Devices, PairExportTest, ::testing::ValuesIn(testing::devices()));

TEST_P(PairExportTest, ExactWhereTheRankAllows) {
  const at::Tensor delta = at::matmul(random_matrix(kWidth, 3), random_matrix(3, kWidth));
  const ErasurePatch edit = patch(delta, 2);
  for (const double strength : {1.0, 0.5}) {
    const LoraExport lora =
        export_lora(model_, projections_, edit, factors(delta), {5}, strength, progress_);
    EXPECT_EQ(lora.rank, 5);
    EXPECT_EQ(lora.residual, 0.0);
    EXPECT_EQ(lora.tensors.size(), 3 * projections_.size());
    EXPECT_NEAR(lora.edit_norm / (strength * norm(edit)), 1.0, 1e-6);
    for (const TextEntry& projection : projections_) {
      EXPECT_LT(
          relative_difference(product(lora, projection), strength * expected(edit, projection)),
          2e-3);
    }
  }
  // Pairs alone: nothing shared takes a place.
  const at::Tensor zero = at::zeros_like(delta);
  const LoraExport pairs_only =
      export_lora(model_, projections_, patch(zero, 2), factors(zero), {2}, 1.0, progress_);
  EXPECT_EQ(pairs_only.rank, 2);
  EXPECT_EQ(pairs_only.residual, 0.0);
}

// The printed residual is the true one, also where the shared part itself was cut.
TEST_P(PairExportTest, ReducedToTheLimitWithATrueResidual) {
  const at::Tensor low = at::matmul(random_matrix(kWidth, 3), random_matrix(3, kWidth));
  const at::Tensor spectrum = at::logspace(0, -1.5, kWidth, 10.0, at::kDouble);
  const at::Tensor full =
      at::matmul(std::get<0>(at::linalg_qr(random_matrix(kWidth, kWidth))) * spectrum * 3.0,
                 std::get<0>(at::linalg_qr(random_matrix(kWidth, kWidth))));
  for (const at::Tensor& delta : {low, full}) {
    const ErasurePatch edit = patch(delta, 4);
    for (const int64_t limit : {2, 6}) {
      const LoraExport lora =
          export_lora(model_, projections_, edit, factors(delta), {limit}, 1.0, progress_);
      EXPECT_EQ(lora.rank, limit);
      EXPECT_GT(lora.residual, 0.01);
      EXPECT_NEAR(lora.residual, distance(lora, edit), 1e-3);
      EXPECT_NEAR(lora.edit_norm / norm(edit), 1.0, 1e-5);
      // Not far from the best that any LoRA of this rank could do.
      double best = 0.0;
      for (const TextEntry& projection : projections_) {
        const at::Tensor singular = at::linalg_svdvals(expected(edit, projection));
        best += singular.narrow(0, limit, singular.size(0) - limit).square().sum().item<double>();
      }
      EXPECT_LT(lora.residual, 1.15 * std::sqrt(best) / norm(edit) + 1e-6);
    }
  }
}

// More directions than rows: the factors are wider than the matrix.
TEST_P(PairExportTest, ManyPairsOnSmallMatrices) {
  const at::Tensor delta = random_matrix(kWidth, kWidth);
  const ErasurePatch edit = patch(delta, 60);
  const LoraExport lora =
      export_lora(model_, projections_, edit, factors(delta), {39}, 1.0, progress_);
  EXPECT_LE(lora.rank, 39);
  EXPECT_NEAR(lora.residual, distance(lora, edit), 2e-3);
}

// A limit on what is left out: the smallest rank that keeps it.
TEST_P(PairExportTest, TheRankFollowsWhatMayBeLeftOut) {
  const at::Tensor delta = at::matmul(random_matrix(kWidth, 3), random_matrix(3, kWidth));
  const ErasurePatch edit = patch(delta, 4);
  int64_t rank = 8;
  for (const double left_out : {0.0, 0.3, 0.6}) {
    const LoraExport lora =
        export_lora(model_, projections_, edit, factors(delta), {20, left_out}, 1.0, progress_);
    EXPECT_LT(lora.rank, rank);
    rank = lora.rank;
    EXPECT_LE(distance(lora, edit), left_out + 2e-3);
    EXPECT_NEAR(lora.residual, distance(lora, edit), 2e-3);
  }
}

TEST_P(PairExportTest, OnTheHostThePatchIsTheEdit) {
  const at::Tensor zero = at::zeros({kWidth, kWidth}, at::kDouble);
  for (const auto& [delta, rank] : {std::pair{zero, 1}, {random_matrix(kWidth, kWidth), 40}}) {
    const ErasurePatch edit = patch(delta, rank);
    const auto patched =
        std::dynamic_pointer_cast<FakeDenoiser>(with_patch(model_, projections_, edit, 0.7));
    for (const TextEntry& projection : projections_) {
      const at::Tensor w = model_.effective_weight(projection.name).cpu().to(at::kDouble);
      EXPECT_LT(relative_difference(patched->effective_weight(projection.name),
                                    w + 0.7 * expected(edit, projection)),
                2e-6);
      EXPECT_EQ(patched->effective_weight(projection.name).device().type(), device().type());
    }
  }
}

TEST_P(PairExportTest, OnlyWhatIsEditedIsExported) {
  const at::Tensor delta = at::matmul(random_matrix(kWidth, 2), random_matrix(2, kWidth));
  ErasurePatch edit = patch(delta, 1);
  edit.matrices = EditedMatrices::kValueOnly;
  std::vector<TextEntry> values;
  for (const TextEntry& projection : projections_) {
    if (projection.role == EntryRole::kValue) values.push_back(projection);
    // Keys keep their pair, except the first.
    if (projection.name == "layer.0.to_k") edit.pairs.erase(projection.lora_name);
  }
  const SharedFactorization value_factors(delta, entry_rows(model_, values, progress_), kWidth,
                                          progress_);
  const LoraExport lora =
      export_lora(model_, projections_, edit, value_factors, {8}, 1.0, progress_);
  EXPECT_EQ(lora.tensors.size(), 3 * (projections_.size() - 1));
  const auto patched = with_patch(model_, projections_, edit, 1.0);
  for (const TextEntry& projection : projections_) {
    const at::Tensor w = model_.effective_weight(projection.name).cpu().to(at::kDouble);
    EXPECT_LT(relative_difference(patched->effective_weight(projection.name),
                                  w + expected(edit, projection)),
              2e-6);
    if (projection.name != "layer.0.to_k") {
      EXPECT_LT(relative_difference(product(lora, projection), expected(edit, projection)), 2e-3);
    }
  }
  EXPECT_NEAR(lora.edit_norm / norm(edit), 1.0, 1e-6);
}

TEST_P(PairExportTest, ForeignPairsAndCancelling) {
  const at::Tensor delta = at::matmul(random_matrix(kWidth, 2), random_matrix(2, kWidth));
  ErasurePatch edit = patch(delta, 1);
  testing::CountingProgress counter;
  export_lora(model_, projections_, edit, factors(delta), {2}, 1.0, counter);
  EXPECT_EQ(counter.checks, static_cast<int64_t>(projections_.size()));
  edit.pairs.begin()->second.b = random_matrix(5, 1);
  const std::string name = edit.pairs.begin()->first;
  EXPECT_NE(testing::message_of([&] {
              export_lora(model_, projections_, edit, factors(delta), {2}, 1.0, progress_);
            }).find("do not fit the model"),
            std::string::npos);
  EXPECT_THROW(with_patch(model_, projections_, edit, 1.0), Error);
}

}  // namespace
}  // namespace lacuna
