// SPDX-License-Identifier: Apache-2.0
#include "lacuna/training/attention_mask.h"

#include "lacuna/error.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::message_of;

TEST(AttentionMaskTest, N26_NearestResizeTakesEverySixtyFourthRow) {
  const at::Tensor index = at::arange(512 * 512, at::kDouble).reshape({512, 512});
  const at::Tensor small = resize_nearest(index, 8, 8);
  for (int64_t i = 0; i < 8; ++i) {
    for (int64_t j = 0; j < 8; ++j) {
      EXPECT_EQ(small[i][j].item<double>(), static_cast<double>(64 * i * 512 + 64 * j));
    }
  }
  // A checker-board of 2 x 2 cells, to sizes that do not divide.
  const at::Tensor board =
      at::tensor({0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0}, at::kFloat).reshape({4, 4});
  EXPECT_TRUE(
      at::equal(resize_nearest(board, 2, 2), at::tensor({0, 1, 1, 0}, at::kFloat).reshape({2, 2})));
  EXPECT_TRUE(at::equal(resize_nearest(board, 3, 3),
                        at::tensor({0, 0, 1, 0, 0, 1, 1, 1, 0}, at::kFloat).reshape({3, 3})));
  EXPECT_TRUE(
      at::equal(resize_nearest(board, 8, 4).narrow(0, 0, 4), board.narrow(0, 0, 1).expand({4, 4})));
}

TEST(AttentionMaskTest, MapShapesFollowTheLatent) {
  const auto shape = [](int64_t pixels, int64_t h, int64_t w) {
    const MapSize size = map_size(pixels, h, w);
    return std::pair(size.height, size.width);
  };
  EXPECT_EQ(shape(4096, 64, 64), std::pair(int64_t{64}, int64_t{64}));
  EXPECT_EQ(shape(64, 64, 64), std::pair(int64_t{8}, int64_t{8}));
  EXPECT_EQ(shape(32 * 48, 64, 96), std::pair(int64_t{32}, int64_t{48}));
  EXPECT_EQ(shape(7 * 9, 13, 17), std::pair(int64_t{7}, int64_t{9}));  // odd sizes round up
  EXPECT_NE(message_of([] { map_size(1000, 64, 64); }).find("1000"), std::string::npos);
  EXPECT_NE(message_of([] { map_size(0, 64, 64); }), "");
}

class MaskFromMapTest : public testing::DeviceTest {};
INSTANTIATE_TEST_SUITE_P(Devices, MaskFromMapTest, ::testing::ValuesIn(testing::devices()));

TEST_P(MaskFromMapTest, OtsuFindsTheBestSplitOfAll) {
  const at::Tensor values =
      at::cat({0.2 + 0.05 * at::randn({300}), 0.7 + 0.08 * at::randn({100})}).clamp(0, 1);
  const auto between = [&](double threshold) {
    const at::Tensor above = values.gt(threshold);
    const double share = above.to(at::kDouble).mean().item<double>();
    if (share == 0.0 || share == 1.0) return 0.0;
    const double difference = values.masked_select(above).mean().item<double>() -
                              values.masked_select(above.logical_not()).mean().item<double>();
    return share * (1 - share) * difference * difference;
  };
  double best = 0.0;
  for (int i = 1; i < 200; ++i) best = std::max(best, between(i / 200.0));
  // Bins of 1/256 cost a little.
  EXPECT_GT(between(otsu_threshold(values.to(device()))), 0.99 * best);
  EXPECT_LT(between(0.9), 0.5 * best);
}

TEST_P(MaskFromMapTest, KeepsTheBrightRegionWhateverTheScale) {
  at::Tensor map = 0.1 * at::rand({16, 16});
  map.narrow(0, 4, 6).narrow(1, 8, 5).add_(1.0);
  at::Tensor expected = at::zeros({16, 16});
  expected.narrow(0, 4, 6).narrow(1, 8, 5).fill_(1);
  EXPECT_TRUE(at::equal(mask_from_map(map.to(device())), expected));
  EXPECT_TRUE(at::equal(mask_from_map(1e-4 * map.to(device()) + 3e-3), expected));
}

TEST_P(MaskFromMapTest, FallsBackToTheWholePicture) {
  const at::Tensor ones = at::ones({20, 20});
  EXPECT_TRUE(at::equal(mask_from_map(at::full({20, 20}, 0.3).to(device())), ones));
  at::Tensor speck = at::zeros({20, 20});  // 7 of 400 pixels: 1.75 %
  speck[3].narrow(0, 0, 7).fill_(1);
  EXPECT_TRUE(at::equal(mask_from_map(speck.to(device())), ones));
  speck[4].narrow(0, 0, 2).fill_(1);  // 9 of 400: 2.25 %
  EXPECT_TRUE(at::equal(mask_from_map(speck.to(device())), speck));
  EXPECT_TRUE(at::equal(mask_from_map((1 - speck).to(device())), ones));  // 97.75 %
  speck[0][0] = NAN;
  EXPECT_TRUE(at::equal(mask_from_map(speck.to(device())), ones));
}

}  // namespace
}  // namespace lacuna
