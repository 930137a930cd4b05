// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/text_entry.h"

#include <cmath>

#include "lacuna/error.h"
#include "support/fake_host.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::FakeDenoiser;
using testing::message_of;

class AttentionProjectionTest : public testing::DeviceTest {};
INSTANTIATE_TEST_SUITE_P(Devices, AttentionProjectionTest, ::testing::ValuesIn(testing::devices()));

TEST_P(AttentionProjectionTest, ValueOnlyLeavesKeysOut) {
  FakeDenoiser model(3, 16, device());
  EXPECT_EQ(edited_entries(model, EditedMatrices::kKeyAndValue, 16).size(), 6u);
  const auto values = edited_entries(model, EditedMatrices::kValueOnly, 16);
  ASSERT_EQ(values.size(), 3u);
  for (const auto& projection : values) EXPECT_EQ(projection.role, EntryRole::kValue);
}

TEST_P(AttentionProjectionTest, GramIsTheSumOverLayers) {
  FakeDenoiser model(3, 16, device());
  SilentProgress progress;
  at::Tensor expected = at::zeros({16, 16}, at::kDouble);
  for (const auto& [name, weight] : model.weights_) {
    const at::Tensor w = weight.cpu().to(at::kDouble);
    expected += at::matmul(w.t(), w);
  }
  const at::Tensor gram =
      entry_gram(model, edited_entries(model, EditedMatrices::kKeyAndValue, 16), progress);
  EXPECT_LT(testing::relative_difference(gram, expected), 1e-6);
  EXPECT_TRUE(at::equal(gram, gram.t()));
}

TEST_P(AttentionProjectionTest, RowsAreTheWeightsOrStandForThem) {
  SilentProgress progress;
  FakeDenoiser small(3, 16, device());
  const auto projections = edited_entries(small, EditedMatrices::kKeyAndValue, 16);
  const at::Tensor rows = entry_rows(small, projections, progress);
  EXPECT_LT(testing::relative_difference(at::matmul(rows.t(), rows),
                                         entry_gram(small, projections, progress)),
            1e-6);
  EXPECT_TRUE(at::equal(rows, entry_rows(small, projections, progress)));

  FakeDenoiser large(70, 16, device());  // 20,440 rows, folded to 4,096
  const auto many = edited_entries(large, EditedMatrices::kKeyAndValue, 16);
  const at::Tensor folded = entry_rows(large, many, progress);
  EXPECT_EQ(folded.size(0), 4096);
  EXPECT_TRUE(at::equal(folded, entry_rows(large, many, progress)));
  const at::Tensor gram = entry_gram(large, many, progress);
  for (int i = 0; i < 5; ++i) {
    const at::Tensor x = testing::random_matrix(16, 1);
    const double exact = at::matmul(x.t(), at::matmul(gram, x)).item<double>();
    EXPECT_NEAR(at::matmul(folded.to(at::kDouble), x).square().sum().item<double>() / exact, 1.0,
                0.15);  // six standard deviations of sqrt(2 / 4096)
  }
}

TEST_P(AttentionProjectionTest, RefusalsNameTheFault) {
  FakeDenoiser model(2, 16, device());
  SilentProgress progress;
  EXPECT_NE(
      message_of([&] { edited_entries(model, EditedMatrices::kKeyAndValue, 24); }).find("width 24"),
      std::string::npos);
  const auto projections = edited_entries(model, EditedMatrices::kKeyAndValue, 16);
  model.weights_["layer.1.to_v"][0][0] = NAN;
  EXPECT_NE(message_of([&] { entry_rows(model, projections, progress); }).find("layer.1.to_v"),
            std::string::npos);
  model.projections_.clear();
  model.family_ = "Flux";
  EXPECT_NE(
      message_of([&] { edited_entries(model, EditedMatrices::kKeyAndValue, 16); }).find("Flux"),
      std::string::npos);
  EXPECT_THROW(edited_matrices_from_string("key"), Error);
  for (const auto matrices : {EditedMatrices::kKeyAndValue, EditedMatrices::kValueOnly}) {
    EXPECT_EQ(edited_matrices_from_string(to_string(matrices)), matrices);
  }
}

}  // namespace
}  // namespace lacuna
