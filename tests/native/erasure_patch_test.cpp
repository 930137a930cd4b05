// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/erasure_patch.h"

#include "lacuna/error.h"
#include "lacuna/files/safetensors_file.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::random_matrix;
using testing::relative_difference;

const TextEntry kKey{"k.weight", "lora_unet_k", EntryRole::kKey};
const TextEntry kValue{"v.weight", "lora_unet_v", EntryRole::kValue};

class ErasurePatchTest : public testing::DeviceTest {
 protected:
  ErasurePatch random_patch() {
    ErasurePatch patch;
    patch.delta = random_matrix(12, 12);
    patch.pairs["lora_unet_k"] = {random_matrix(5, 2), random_matrix(12, 2)};
    patch.metadata = {{"concepts", "{\"a\": \"caf\xC3\xA9\"}"}};
    return patch;
  }
  testing::TemporaryFolder folder_;
};
INSTANTIATE_TEST_SUITE_P(Devices, ErasurePatchTest, ::testing::ValuesIn(testing::devices()));

TEST_P(ErasurePatchTest, ChangeIsTheFormula) {
  const ErasurePatch patch = random_patch();
  const at::Tensor w = random_matrix(5, 12);
  const at::Tensor expected =
      at::matmul(w, patch.delta) +
      at::matmul(patch.pairs.at("lora_unet_k").b, patch.pairs.at("lora_unet_k").r.t());
  const at::Tensor change = weight_change(patch, kKey, w.to(device()));
  EXPECT_EQ(change.device().type(), device().type());
  EXPECT_LT(relative_difference(change, expected), 1e-12);
  EXPECT_LT(relative_difference(weight_change(patch, kKey, w.to(device()), 0.25), 0.25 * expected),
            1e-12);
  EXPECT_EQ(weight_change(patch, kKey, w, 0.0).abs().max().item<double>(), 0.0);
  const at::Tensor half = weight_change(patch, kValue, w.to(device(), at::kHalf));
  EXPECT_EQ(half.scalar_type(), at::kFloat);
  EXPECT_LT(relative_difference(half, at::matmul(w, patch.delta)), 1e-2);
}

TEST_P(ErasurePatchTest, ValueOnlyLeavesKeysAlone) {
  ErasurePatch patch = random_patch();
  patch.pairs.clear();
  patch.matrices = EditedMatrices::kValueOnly;
  const at::Tensor w = random_matrix(5, 12);
  EXPECT_EQ(weight_change(patch, kKey, w).abs().max().item<double>(), 0.0);
  EXPECT_GT(weight_change(patch, kValue, w).abs().max().item<double>(), 0.0);
}

TEST_P(ErasurePatchTest, SurvivesTheFile) {
  ErasurePatch patch = random_patch();
  patch.matrices = EditedMatrices::kValueOnly;
  const std::string path = folder_.path("deep/er/patch.safetensors");
  save_patch(patch, path);
  const ErasurePatch loaded = load_patch(path);
  EXPECT_TRUE(at::equal(loaded.delta, patch.delta));
  EXPECT_EQ(loaded.matrices, patch.matrices);
  EXPECT_EQ(loaded.metadata, patch.metadata);
  ASSERT_EQ(loaded.pairs.size(), 1u);
  EXPECT_TRUE(at::equal(loaded.pairs.at("lora_unet_k").b, patch.pairs.at("lora_unet_k").b));
  EXPECT_TRUE(at::equal(loaded.pairs.at("lora_unet_k").r, patch.pairs.at("lora_unet_k").r));
}

TEST_P(ErasurePatchTest, OtherFilesAreRefused) {
  const auto refuse = [&](const SafetensorsFile& file) {
    const std::string path = folder_.path("x.safetensors");
    save_safetensors(file, path);
    EXPECT_THROW(load_patch(path), Error);
  };
  const std::map<std::string, std::string> good{{"format", "lacuna.patch/1"},
                                                {"matrices", "key+value"}};
  const at::Tensor square = at::eye(4, at::kDouble);
  refuse({{{"delta", square}}, {}});
  refuse({{{"delta", at::zeros({3, 4})}}, good});
  refuse({{{"delta", square}, {"other", square}}, good});
  refuse({{{"x.b", square}, {"x.r", square}}, good});
  refuse({{{"delta", square}, {"x.b", square}}, good});
  refuse({{{"delta", square}, {"x.b", square}, {"x.r", at::zeros({4, 3})}}, good});
  refuse({{{"delta", square}}, {{"format", "lacuna.patch/1"}, {"matrices", "none"}}});
}

}  // namespace
}  // namespace lacuna
