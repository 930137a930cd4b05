// SPDX-License-Identifier: Apache-2.0
#include "lacuna/training/latent_sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "support/fake_host.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::FakeDenoiser;
using testing::SeededTest;

constexpr double kMean = 0.7;
constexpr double kSpread = 0.6;

// SD's scaled-linear schedule, rescaled so that the last timestep is noise alone (Lin et al. 2024);
// its signal is ComfyUI's smallest, sigma 4518.
at::Tensor zero_terminal_snr() {
  const at::Tensor betas = at::linspace(std::sqrt(0.00085), std::sqrt(0.012), 1000, at::kDouble);
  at::Tensor signal = (1 - betas.square()).cumprod(0).sqrt();
  const double first = signal[0].item<double>();
  const double last = signal[999].item<double>();
  signal = (signal - last) * (first / (first - last));
  at::Tensor power = signal.square();
  power[999] = 4.8973451890853435e-08;
  return ((1 - power) / power).sqrt().to(at::kFloat);
}

// Knows the best clean estimate for pictures of independent N(mean, spread) values, and tells it as
// v-prediction networks do, in float32.
class GaussianDenoiser final : public FakeDenoiser {
 public:
  GaussianDenoiser() : FakeDenoiser(1, 16) {}
  at::Tensor noise_levels() override { return zero_terminal_snr(); }
  at::Tensor denoise(const DenoiseRequest& request, AttentionTap*) override {
    const at::Tensor sigma = request.sigma.to(at::kDouble).reshape({-1, 1, 1, 1});
    const at::Tensor x = request.noisy.to(at::kDouble);
    const at::Tensor power = sigma.square() + 1;
    const double variance = kSpread * kSpread;
    const at::Tensor best = (variance * x + sigma.square() * kMean) / (variance + sigma.square());
    const at::Tensor v = ((x / power - best) * power.sqrt() / sigma).to(at::kFloat);
    const at::Tensor level = request.sigma.reshape({-1, 1, 1, 1});
    return request.noisy / (level.square() + 1) - v * level / (level.square() + 1).sqrt();
  }
};

class ZeroTerminalSnrTest : public SeededTest {};

TEST_F(ZeroTerminalSnrTest, PicturesAreDrawnFromNoiseAlone) {
  GaussianDenoiser model;
  EXPECT_GT(model.noise_levels()[999].item<double>(), 4500.0);
  for (const Sampler sampler : {Sampler::kEuler, Sampler::kDpmpp2M}) {
    LatentRequest request;
    request.noise = at::randn({4, 4, 16, 16});
    request.positive.context = at::zeros({4, 77, 16});
    request.negative.context = at::zeros({1, 77, 16});
    request.steps = 50;
    request.sampler = sampler;
    const at::Tensor drawn = sample_latents(model, request, [](int64_t) { return nullptr; });
    ASSERT_TRUE(drawn.isfinite().all().item<bool>());
    EXPECT_NEAR(drawn.mean().item<double>(), kMean, 0.05) << to_string(sampler);
    EXPECT_NEAR(drawn.std().item<double>(), kSpread, 0.08) << to_string(sampler);
  }
}

}  // namespace
}  // namespace lacuna
