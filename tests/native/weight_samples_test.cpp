// SPDX-License-Identifier: Apache-2.0
#include "lacuna/files/weight_samples.h"

#include "lacuna/error.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::message_of;

// Of a file on its way to a running host: through these types, one after the other.
struct Route {
  const char* name;
  std::vector<at::ScalarType> types;
};
const std::vector<Route> kRoutes{
    {"fp32", {}},
    {"fp16", {at::kHalf}},
    {"bf16", {at::kBFloat16}},
    {"fp16 file, bf16 host", {at::kHalf, at::kBFloat16}},
    {"bf16 file, fp16 host", {at::kBFloat16, at::kHalf}},
    {"fp8_e4m3", {at::kFloat8_e4m3fn}},
    {"fp16 file, fp8_e4m3 host", {at::kHalf, at::kFloat8_e4m3fn}},
    {"bf16 file, fp8_e4m3 host", {at::kBFloat16, at::kFloat8_e4m3fn}},
    {"fp16 file, fp8_e5m2 host", {at::kHalf, at::kFloat8_e5m2}},
    {"bf16 file, fp8_e5m2 host", {at::kBFloat16, at::kFloat8_e5m2}},
};

class WeightSamplesTest : public testing::SeededTest {
 protected:
  // Matrices as in a small model, with weights of the sizes that SD1.x has.
  WeightSamplesTest() {
    for (const double deviation : {0.02, 0.03, 0.05, 0.1}) {
      for (int i = 0; i < 4; ++i) {
        weights_["layer_" + std::to_string(weights_.size())] = at::randn({128}) * deviation;
      }
    }
  }
  WeightSamples stored(const Route& route, double tuned = 0.0) const {
    WeightSamples samples;
    for (const auto& [name, original] : weights_) {
      at::Tensor t = original;
      // A fine-tune moves weights by a share of their usual size, whatever their own.
      if (tuned > 0.0) t = t + at::randn_like(t) * t.std() * tuned;
      for (const at::ScalarType type : route.types) t = t.to(type);
      t = t.to(at::kFloat).contiguous();
      samples[name] = {t.const_data_ptr<float>(), t.const_data_ptr<float>() + t.numel()};
    }
    return samples;
  }

  std::map<std::string, at::Tensor> weights_;
};

TEST_F(WeightSamplesTest, TheTypeIsSeenInTheValues) {
  const auto type = [&](size_t route) { return weight_type_of(stored(kRoutes[route])); };
  EXPECT_EQ(type(0), "fp32");
  EXPECT_EQ(type(1), "fp16");
  EXPECT_EQ(type(3), "bf16");
  EXPECT_EQ(type(4), "bf16");  // a wider type adds nothing
  EXPECT_EQ(type(6), "fp8_e4m3");
  EXPECT_EQ(type(9), "fp8_e5m2");
}

TEST_F(WeightSamplesTest, ConversionsOfOneFileAreOneModel) {
  for (const Route& a : kRoutes) {
    for (const Route& b : kRoutes) {
      const WeightDistance distance = distance_between(stored(a), stored(b));
      EXPECT_TRUE(distance.same()) << a.name << " and " << b.name << ": " << distance.difference
                                   << " of " << distance.rounding;
    }
  }
}

TEST_F(WeightSamplesTest, FineTunesAreOtherModels) {
  const auto is_fp8 = [](const Route& route) {
    return std::string_view(route.name).find("fp8") != std::string_view::npos;
  };
  for (const Route& a : kRoutes) {
    for (const Route& b : kRoutes) {
      const bool coarse = is_fp8(a) || is_fp8(b);
      const WeightDistance distance = distance_between(stored(a), stored(b, coarse ? 0.02 : 0.002));
      const bool two_grids =
          is_fp8(a) && is_fp8(b) && weight_type_of(stored(a)) != weight_type_of(stored(b));
      EXPECT_EQ(distance.same(), two_grids)  // of fp8 by fp8 of the other kind little is left
          << a.name << " and " << b.name << ": " << distance.difference << " of "
          << distance.rounding;
    }
  }
}

TEST_F(WeightSamplesTest, OtherArchitecturesAreOtherModels) {
  const WeightSamples all = stored(kRoutes[1]);
  WeightSamples fewer = all;
  fewer.erase(fewer.begin());
  EXPECT_FALSE(distance_between(all, fewer).same());
  WeightSamples shorter = all;
  shorter.begin()->second.pop_back();
  EXPECT_FALSE(distance_between(all, shorter).same());
  WeightSamples broken = all;
  broken.begin()->second[3] = NAN;
  EXPECT_FALSE(distance_between(all, broken).same());
  EXPECT_TRUE(distance_between({{"zeros", {0, 0}}}, {{"zeros", {0, 0}}}).same());
}

TEST_F(WeightSamplesTest, HashesSamplesAndStates) {
  const WeightSamples half = stored(kRoutes[1]);
  const WeightSamples fp8 = stored(kRoutes[6]);
  const WeightSamples tuned = stored(kRoutes[6], 0.02);
  const auto match = [](const WeightIdentity& a, const WeightIdentity& b) {
    return compare(a, b).match;
  };
  EXPECT_EQ(match({"a", {}}, {"a", {}}), WeightMatch::kSame);
  EXPECT_EQ(match({"a", {}}, {"", {}}), WeightMatch::kSame);
  EXPECT_EQ(match({"a", half}, {"b", fp8}), WeightMatch::kSame);
  EXPECT_EQ(match({"a", half}, {"b", tuned}), WeightMatch::kDifferent);
  EXPECT_EQ(match({"a", {}}, {"b", fp8}), WeightMatch::kUnknownType);
  EXPECT_EQ(match({"a", half}, {"a-12", half}), WeightMatch::kOtherState);
  EXPECT_EQ(match({"a-12", half}, {"b-12", fp8}), WeightMatch::kSame);
  EXPECT_EQ(match({"a-12", half}, {"b-34", fp8}), WeightMatch::kOtherState);
  EXPECT_EQ(match({"a-12", half}, {"b-34", tuned}), WeightMatch::kDifferent);

  const WeightIdentity a{"3f2a9c81d07e", half};
  const WeightIdentity b{"77d0be12aaaa", tuned};
  const std::string text = describe(a, b, compare(a, b));
  EXPECT_TRUE(text.starts_with("3f2a9c81 in fp16 and 77d0be12 in fp8_e4m3, ")) << text;
  EXPECT_NE(text.find("% apart where rounding explains 0."), std::string::npos) << text;
  const WeightIdentity same_type{"9d0be12aaaa", stored(kRoutes[1], 0.02)};
  EXPECT_TRUE(describe(a, same_type, compare(a, same_type)).ends_with("% apart"));
  EXPECT_EQ(short_name({"\xC3\xA9vil\n", {}}), "");
}

TEST_F(WeightSamplesTest, TheTextIsExactAndDamageIsSeen) {
  const WeightSamples samples = stored(kRoutes[0]);
  EXPECT_EQ(weight_samples_from_text(to_text(samples)), samples);
  EXPECT_TRUE(weight_samples_from_text("").empty());
  for (const char* text : {"name", "name 3f8", "name 3f80000g", "name +3f80000", "a 00000000\na ",
                           "name 3f800000 3f800000"}) {
    EXPECT_NE(message_of([&] { weight_samples_from_text(text); }).find("cannot be read"),
              std::string::npos)
        << text;
  }
}

}  // namespace
}  // namespace lacuna
