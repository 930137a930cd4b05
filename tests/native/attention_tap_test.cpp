// SPDX-License-Identifier: Apache-2.0
// The tap's loss and gradients, against attention written out in float64 one sample, one head at a
// time, and that samples of a batch do not see each other.
#include "lacuna/training/attention_tap.h"

#include <torch/csrc/autograd/autograd.h>
#include <algorithm>

#include "lacuna/closed_form/text_entry.h"
#include "lacuna/error.h"
#include "lacuna/training/attention_mask.h"
#include "support/fake_host.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::FakeDenoiser;
using testing::message_of;
using testing::relative_difference;

constexpr int64_t kLayers = 3, kWidth = 16, kTokens = 9, kLatent = 4;

// LoRA, loss and attention of a batch, as literally as possible.
class PlainTap final : public AttentionTap {
 public:
  PlainTap(std::vector<TapSample> samples, at::Tensor context)
      : samples_(std::move(samples)), context_(std::move(context)) {}

  at::Tensor attend(const std::string& layer, const at::Tensor& query, const at::Tensor& key,
                    const at::Tensor& value, int64_t heads) override {
    std::vector<at::Tensor> out;
    for (size_t j = 0; j < samples_.size(); ++j) {
      const auto i = static_cast<int64_t>(j);
      const LayerPairs& pairs = samples_[j].pairs->at(layer);
      const at::Tensor e = context_[i].to(key.options());
      const auto add = [&](const at::Tensor& base, const LoraPair& pair) {
        const at::Tensor delta = at::mm(pair.up, pair.down).to(key.options());
        return base[i] + at::mm(e, delta.t());
      };
      const at::Tensor k = add(key, pairs.key);
      const at::Tensor v = add(value, pairs.value);
      const int64_t size = key.size(2) / heads;
      const at::Tensor inside =
          resize_nearest(samples_[j].mask, kLatent, kLatent).flatten().nonzero().squeeze(1);
      const at::Tensor positions = samples_[j].tokens.nonzero().squeeze(1);
      std::vector<at::Tensor> by_head, seen;
      for (int64_t h = 0; h < heads; ++h) {
        const at::Tensor scores =
            at::mm(query[i].narrow(1, h * size, size), k.narrow(1, h * size, size).t()) /
            std::sqrt(static_cast<double>(size));
        const at::Tensor e_scores = (scores - scores.amax(1, true)).exp();
        const at::Tensor p = e_scores / e_scores.sum(1, true);
        by_head.push_back(at::mm(p, v.narrow(1, h * size, size)));
        seen.push_back(p.index_select(0, inside.to(p.device()))
                           .index_select(1, positions.to(p.device()))
                           .flatten());
      }
      out.push_back(at::cat(by_head, 1));
      const at::Tensor norm = at::cat(seen).norm();
      loss = loss.defined() ? loss + norm : norm;
    }
    return at::stack(out);
  }

  at::Tensor loss;

 private:
  std::vector<TapSample> samples_;
  at::Tensor context_;
};

class AttentionTapTest : public testing::DeviceTest {
 protected:
  explicit AttentionTapTest(at::ScalarType type = at::kDouble) { use(type); }

  void use(at::ScalarType type) {
    type_ = type;
    for (auto& [name, weight] : model_.weights_) weight = weight.to(type);
  }

  ConceptPairs random_pairs(double up_scale, int64_t rank = 2) {
    ConceptPairs pairs;
    for (const TextEntry& projection : model_.projections_) {
      LayerPairs& layer = pairs[layer_of(projection)];
      LoraPair& pair = projection.role == EntryRole::kKey ? layer.key : layer.value;
      pair.up = (up_scale * at::randn({model_.weights_.at(projection.name).size(0), rank}))
                    .to(type_)
                    .requires_grad_();
      pair.down = at::randn({rank, kWidth}).to(type_).requires_grad_();
    }
    return pairs;
  }

  static std::vector<at::Tensor> parameters(const ConceptPairs& pairs) {
    std::vector<at::Tensor> list;
    for (const auto& [name, layer] : pairs) {
      for (const LoraPair* pair : {&layer.key, &layer.value}) {
        list.push_back(pair->up);
        list.push_back(pair->down);
      }
    }
    return list;
  }

  TapSample random_sample(const ConceptPairs& pairs) {
    at::Tensor tokens = at::rand({kTokens}).gt(0.5).to(at::kFloat);
    tokens[2] = 1;
    at::Tensor mask = at::rand({8, 8}).gt(0.4).to(at::kFloat);
    mask[0][0] = 1;
    return {&pairs, tokens, mask};
  }

  DenoiseRequest request(int64_t n) {
    DenoiseRequest pass;
    pass.noisy = at::randn({n, 4, kLatent, kLatent});
    pass.sigma = 0.5 + at::rand({n});
    pass.text.context = at::randn({n, kTokens, kWidth});
    pass.attention_only = true;
    return pass;
  }

  static DenoiseRequest one_of(const DenoiseRequest& batch, int64_t i) {
    DenoiseRequest pass = batch;
    pass.noisy = batch.noisy.narrow(0, i, 1);
    pass.sigma = batch.sigma.narrow(0, i, 1);
    pass.text.context = batch.text.context.narrow(0, i, 1);
    return pass;
  }

  // Per-sample losses and the gradients of their sum.
  std::pair<at::Tensor, std::vector<at::Tensor>> gradients(const std::vector<TapSample>& samples,
                                                           const DenoiseRequest& pass,
                                                           const at::Tensor& original) {
    LoraTap tap(samples, original, kLatent, kLatent, progress_);
    model_.denoise(pass, &tap);
    std::vector<at::Tensor> wanted;
    for (const TapSample& sample : samples) {
      for (at::Tensor& parameter : parameters(*sample.pairs)) wanted.push_back(parameter);
    }
    return {tap.losses().detach(),
            torch::autograd::grad({tap.losses().sum()}, wanted, {}, std::nullopt, false, true)};
  }

  void batch_equals_single_runs(double tolerance) {
    std::vector<ConceptPairs> pairs;
    for (int i = 0; i < 4; ++i) pairs.push_back(random_pairs(0.3));
    std::vector<TapSample> samples;
    for (const ConceptPairs& own : pairs) samples.push_back(random_sample(own));
    samples[2].mask = at::Tensor();
    const DenoiseRequest batch = request(4);
    const at::Tensor original = at::randn({4, kTokens, kWidth});
    const auto [losses, together] = gradients(samples, batch, original);
    const size_t per_concept = together.size() / 4;
    for (int64_t i = 0; i < 4; ++i) {
      const auto [loss, alone] =
          gradients({samples[static_cast<size_t>(i)]}, one_of(batch, i), original.narrow(0, i, 1));
      EXPECT_LT(relative_difference(losses[i], loss[0]), tolerance);
      // Rounding is relative to the whole gradient: some parameters have hardly any.
      double squared = 0.0;
      for (const at::Tensor& gradient : alone) {
        if (gradient.defined()) squared += gradient.square().sum().item<double>();
      }
      for (size_t p = 0; p < per_concept; ++p) {
        const at::Tensor& in_batch = together[static_cast<size_t>(i) * per_concept + p];
        ASSERT_EQ(in_batch.defined(), alone[p].defined());
        if (alone[p].defined()) {
          EXPECT_GT(alone[p].norm().item<double>(), 0.0);
          EXPECT_LT((in_batch - alone[p]).norm().item<double>() / std::sqrt(squared), tolerance)
              << "parameter " << p;
        }
      }
    }
  }

  at::ScalarType type_ = at::kDouble;
  FakeDenoiser model_{kLayers, kWidth, device()};
  testing::CountingProgress progress_;
};
INSTANTIATE_TEST_SUITE_P(Devices, AttentionTapTest, ::testing::ValuesIn(testing::devices()));

TEST_P(AttentionTapTest, GradientsAreThoseOfThePlainFormula) {
  const ConceptPairs first = random_pairs(0.3);
  const ConceptPairs second = random_pairs(0.3);
  const std::vector<TapSample> samples{random_sample(first), random_sample(second)};
  const DenoiseRequest pass = request(2);
  // What the pairs read need not be what the host reads.
  const at::Tensor original = at::randn({2, kTokens, kWidth});
  const auto [losses, ours] = gradients(samples, pass, original);

  PlainTap plain(samples, original);
  model_.denoise(pass, &plain);
  std::vector<at::Tensor> wanted = parameters(first);
  for (at::Tensor& parameter : parameters(second)) wanted.push_back(parameter);
  const auto expected = torch::autograd::grad({plain.loss}, wanted, {}, std::nullopt, false, true);
  EXPECT_LT(relative_difference(losses.sum(), plain.loss.detach()), 1e-10);
  ASSERT_EQ(ours.size(), expected.size());
  double largest = 0.0;  // saturated attention leaves some layers little but rounding
  for (const at::Tensor& gradient : expected) {
    if (gradient.defined()) largest = std::max(largest, gradient.norm().item<double>());
  }
  int compared = 0;
  for (size_t i = 0; i < ours.size(); ++i) {
    ASSERT_EQ(ours[i].defined(), expected[i].defined()) << i;
    if (!ours[i].defined()) continue;
    const double allowed = 1e-10 * expected[i].norm().item<double>() + 1e-14 * largest;
    EXPECT_LT((ours[i] - expected[i]).norm().item<double>(), allowed) << i;
    ++compared;
  }
  // Invariant 25: only the last layer's value pair is without gradient, in both concepts.
  EXPECT_EQ(compared, static_cast<int>(ours.size()) - 4);
}

TEST_P(AttentionTapTest, ReturnsPlainAttentionWithTheMergedLora) {
  const ConceptPairs pairs = random_pairs(0.3);
  DenoiseRequest pass = request(1);
  pass.attention_only = false;
  LoraTap tap({random_sample(pairs)}, pass.text.context, kLatent, kLatent, progress_);
  const at::Tensor tapped = model_.denoise(pass, &tap).detach();
  std::vector<WeightDelta> deltas;
  for (const TextEntry& projection : model_.projections_) {
    const LayerPairs& layer = pairs.at(layer_of(projection));
    const LoraPair& pair = projection.role == EntryRole::kKey ? layer.key : layer.value;
    deltas.push_back({projection.name, pair.up.detach(), pair.down.detach()});
  }
  const at::Tensor merged = model_.with_weight_deltas(deltas, 1.0)->denoise(pass, nullptr);
  EXPECT_LT(relative_difference(tapped, merged), 1e-6);  // latents are float32
  EXPECT_GT(relative_difference(model_.denoise(pass, nullptr), merged), 1e-4);
}

TEST_P(AttentionTapTest, N23_ZeroUpIsTheModelAndGivesDownNoGradient) {
  const ConceptPairs pairs = random_pairs(0.0);
  DenoiseRequest pass = request(1);
  const auto [loss, gradient] = gradients({random_sample(pairs)}, pass, pass.text.context);
  const std::vector<at::Tensor> wanted = parameters(pairs);
  for (size_t i = 0; i < gradient.size(); ++i) {
    if (!gradient[i].defined()) continue;
    const bool is_up = i % 2 == 0;
    EXPECT_EQ(gradient[i].abs().max().item<double>() > 0.0, is_up) << i;
  }
  pass.attention_only = false;
  LoraTap tap({random_sample(pairs)}, pass.text.context, kLatent, kLatent, progress_);
  EXPECT_LT(relative_difference(model_.denoise(pass, &tap).detach(), model_.denoise(pass, nullptr)),
            1e-6);
}

TEST_P(AttentionTapTest, N27_BatchOfFourConceptsEqualsFourRunsInDouble) {
  batch_equals_single_runs(1e-10);
}

TEST_P(AttentionTapTest, N27_BatchOfFourConceptsEqualsFourRunsInFloat) {
  use(at::kFloat);
  // Saturated attention magnifies float32 rounding: up to 4e-4 in 2000 random runs. A sample that
  // saw another's weights would be off by about 1.
  batch_equals_single_runs(1e-2);
}

TEST_P(AttentionTapTest, CapturesTheMaskedQueriesOfEveryLayer) {
  const ConceptPairs pairs = random_pairs(0.0);
  const TapSample sample = random_sample(pairs);
  const DenoiseRequest pass = request(1);
  LoraTap tap({sample}, pass.text.context, kLatent, kLatent, progress_);
  tap.capture_queries(1000);
  model_.denoise(pass, &tap);
  const auto inside = resize_nearest(sample.mask, kLatent, kLatent).gt(0).sum().item<int64_t>();
  ASSERT_EQ(tap.captured().size(), static_cast<size_t>(kLayers));
  at::Tensor sum = at::zeros({}, at::kDouble);
  for (const TextEntry& projection : model_.projections_) {
    if (projection.role != EntryRole::kKey) continue;
    const CapturedQueries& layer = tap.captured().at(layer_of(projection));
    EXPECT_EQ(layer.queries[0].size(0), inside);
    EXPECT_FALSE(layer.queries[0].requires_grad());
    const at::Tensor key =
        at::matmul(pass.text.context.to(model_.weights_.begin()->second.options()),
                   model_.weights_.at(projection.name).t());
    sum = sum +
          attention_mass(attention_probabilities(layer.queries[0].unsqueeze(0), key, layer.heads),
                         layer.pixel_weights[0].unsqueeze(0),
                         sample.tokens.unsqueeze(0).to(key.options()))
              .cpu()[0];
  }
  // The loss that local training sees is the loss of the forward pass.
  EXPECT_LT(relative_difference(sum, tap.losses()[0].detach()), 1e-10);

  LoraTap few({sample}, pass.text.context, kLatent, kLatent, progress_);
  few.capture_queries(3);
  model_.denoise(pass, &few);
  const CapturedQueries& layer = few.captured().begin()->second;
  EXPECT_EQ(layer.queries[0].size(0), std::min<int64_t>(3, inside));
  EXPECT_NEAR(layer.pixel_weights[0].sum().item<double>(), static_cast<double>(inside), 1e-9);
}

TEST_P(AttentionTapTest, SaysWhenTheHostSplitsTheBatch) {
  const ConceptPairs pairs = random_pairs(0.0);
  const DenoiseRequest pass = request(2);
  LoraTap tap({random_sample(pairs), random_sample(pairs)}, pass.text.context, kLatent, kLatent,
              progress_);
  EXPECT_NE(
      message_of([&] { model_.denoise(one_of(pass, 0), &tap); }).find("1 samples instead of 2"),
      std::string::npos);
}

TEST_P(AttentionTapTest, CancelDuringTheBackwardPassArrivesAsItIs) {
  if (device().is_cuda()) GTEST_SKIP() << "checked between steps there";
  const ConceptPairs pairs = random_pairs(0.3);
  const DenoiseRequest pass = request(1);
  testing::CountingProgress progress;
  LoraTap tap({random_sample(pairs)}, pass.text.context, kLatent, kLatent, progress);
  model_.denoise(pass, &tap);
  progress.cancel_at = progress.checks + 2;
  EXPECT_THROW(
      torch::autograd::grad({tap.losses().sum()}, parameters(pairs), {}, std::nullopt, false, true),
      std::runtime_error);
  ASSERT_TRUE(tap.interruption());
  EXPECT_THROW(std::rethrow_exception(tap.interruption()), testing::Cancelled);
  // The autograd engine still works.
  const at::Tensor x = at::ones({2}, at::kDouble).requires_grad_();
  EXPECT_EQ(torch::autograd::grad({x.square().sum()}, {x})[0].sum().item<double>(), 4.0);
}

class AttentionMassTest : public testing::DeviceTest {
 protected:
  at::Tensor random_probabilities(int64_t heads, int64_t pixels, int64_t tokens) {
    return at::softmax(2 * at::randn({1, heads, pixels, tokens}, at::kDouble), -1).to(device());
  }
  at::Tensor ones(int64_t n) { return at::ones({1, n}, at::kDouble).to(device()); }
};
INSTANTIATE_TEST_SUITE_P(Devices, AttentionMassTest, ::testing::ValuesIn(testing::devices()));

TEST_P(AttentionMassTest, N24_IsTheFrobeniusNormOfWhatIsSelected) {
  // Two heads, two pixels, three tokens; pixel 1 and tokens 0 and 2 count.
  const at::Tensor p = at::tensor({0.2, 0.3, 0.5, 0.1, 0.8, 0.1,  //
                                   0.6, 0.1, 0.3, 0.7, 0.1, 0.2},
                                  at::kDouble)
                           .reshape({1, 2, 2, 3})
                           .to(device());
  const at::Tensor pixel = at::tensor({0.0, 1.0}, at::kDouble).unsqueeze(0).to(device());
  const at::Tensor tokens = at::tensor({1.0, 0.0, 1.0}, at::kDouble).unsqueeze(0).to(device());
  EXPECT_NEAR(attention_mass(p, pixel, tokens).item<double>(), std::sqrt(0.01 + 0.01 + 0.49 + 0.04),
              1e-12);
  // A soft mask m scales a pixel's probabilities by m.
  EXPECT_NEAR(attention_mass(p, 0.25 * pixel, tokens).item<double>(), 0.5 * std::sqrt(0.55), 1e-12);
}

TEST_P(AttentionMassTest, N24_HeadsMayBePermutedAndTheWholeIsBounded) {
  const at::Tensor p = random_probabilities(8, 64, 77);
  const at::Tensor order = at::randperm(8, at::kLong).to(device());
  const at::Tensor all = attention_mass(p, ones(64), ones(77));
  EXPECT_LT(relative_difference(attention_mass(p.index_select(1, order), ones(64), ones(77)), all),
            1e-12);
  EXPECT_GE(all.item<double>(), std::sqrt(8.0 * 64 / 77));
  EXPECT_LE(all.item<double>(), std::sqrt(8.0 * 64));
}

TEST_P(AttentionMassTest, N24_EmptySelectionsAreZeroWithZeroGradient) {
  const at::Tensor p = random_probabilities(2, 6, 5).requires_grad_();
  for (const auto& [pixels, tokens] :
       {std::pair(ones(6), 0 * ones(5)), std::pair(0 * ones(6), ones(5))}) {
    const at::Tensor mass = attention_mass(p, pixels, tokens);
    EXPECT_EQ(mass.item<double>(), 0.0);
    EXPECT_EQ(torch::autograd::grad({mass.sum()}, {p})[0].abs().max().item<double>(), 0.0);
  }
}

class MapTapTest : public testing::DeviceTest {};
INSTANTIATE_TEST_SUITE_P(Devices, MapTapTest, ::testing::ValuesIn(testing::devices()));

TEST_P(MapTapTest, AveragesHeadsStepsAndLayersOfMiddleResolutions) {
  // Latent 8 x 8: layers of 4 x 4 count, those of 8 x 8 do not when there are smaller ones.
  at::Tensor tokens = at::zeros({1, 5});
  tokens[0][1] = tokens[0][3] = 1;
  testing::CountingProgress progress;
  MapTap tap(tokens, 8, 8, progress);
  at::Tensor expected = at::zeros({16});
  const auto show = [&](int64_t pixels, bool counted) {
    // Two samples: the second is the unconditional one.
    const at::Tensor q = at::randn({2, pixels, 6}), k = at::randn({2, 5, 6}),
                     v = at::randn({2, 5, 6});
    const at::Tensor out =
        tap.attend("layer", q.to(device()), k.to(device()), v.to(device()), 2).cpu();
    at::Tensor attended = at::zeros({2, pixels, 6});
    at::Tensor seen = at::zeros({pixels});
    for (int64_t h = 0; h < 2; ++h) {
      const auto part = [&](const at::Tensor& t) { return t.narrow(2, 3 * h, 3); };
      const at::Tensor p =
          at::softmax(at::matmul(part(q), part(k).transpose(1, 2)) / std::sqrt(3.0), -1);
      attended.narrow(2, 3 * h, 3).copy_(at::matmul(p, part(v)));
      seen += (p[0].select(1, 1) + p[0].select(1, 3)) / 2;
    }
    EXPECT_LT(relative_difference(out, attended), 1e-5);
    if (counted) expected += seen;
  };
  show(64, false);
  const at::Tensor full_size = tap.maps();  // all there is so far
  EXPECT_EQ(full_size.sizes(), at::IntArrayRef({1, 8, 8}));
  show(16, true);
  show(16, true);
  show(64, false);
  const at::Tensor up =
      at::upsample_bilinear2d((expected / 2).reshape({1, 1, 4, 4}), {8, 8}, false);
  EXPECT_LT(relative_difference(tap.maps(), up.squeeze(1)), 1e-5);
  EXPECT_NE(message_of([&] { MapTap(tokens, 8, 8, progress).maps(); }), "");
}

}  // namespace
}  // namespace lacuna
