// SPDX-License-Identifier: Apache-2.0
#include "lacuna/training/latent_sampler.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <string>

#include "lacuna/error.h"

namespace lacuna {
namespace {

at::Tensor with_negative(const at::Tensor& positive, const at::Tensor& negative) {
  if (!positive.defined()) return positive;
  std::vector<int64_t> shape = positive.sizes().vec();
  return at::cat({positive, negative.to(positive.options()).expand(shape)});
}

// One step of a solver, from one noise level to the next lower one.
class Solver {
 public:
  explicit Solver(Sampler kind) : kind_(kind) {}

  at::Tensor step(const at::Tensor& x, const at::Tensor& clean, double sigma, double next) {
    if (kind_ == Sampler::kEuler) return x + (x - clean) * ((next - sigma) / sigma);
    at::Tensor stepped = clean;
    if (next > 0.0) {
      const double length = std::log(sigma / next);  // in half the log signal-to-noise ratio
      at::Tensor estimate = clean;
      if (previous_.defined()) {
        const double ratio = length / (2 * previous_length_);
        estimate = (1 + ratio) * clean - ratio * previous_;
      }
      stepped = (next / sigma) * x - std::expm1(-length) * estimate;
      previous_length_ = length;
    }
    previous_ = clean;
    return stepped;
  }

 private:
  Sampler kind_;
  at::Tensor previous_;  // clean estimate of the step before
  double previous_length_ = 0.0;
};

}  // namespace

std::string_view to_string(Sampler sampler) {
  return sampler == Sampler::kEuler ? "euler" : "dpmpp_2m";
}

Sampler sampler_from_string(std::string_view text) {
  if (text == "euler") return Sampler::kEuler;
  if (text == "dpmpp_2m") return Sampler::kDpmpp2M;
  throw Error("unknown sampler '" + std::string(text) + "'; use one of: euler, dpmpp_2m");
}

double sigma_at(const at::Tensor& levels, double timestep) {
  const int64_t last = levels.size(0) - 1;
  const auto low = std::min(last, static_cast<int64_t>(timestep));
  const int64_t high = std::min(last, low + 1);
  const double weight = timestep - static_cast<double>(low);
  return std::exp((1 - weight) * std::log(levels[low].item<double>()) +
                  weight * std::log(levels[high].item<double>()));
}

at::Tensor sampling_sigmas(const at::Tensor& levels, int64_t steps) {
  at::Tensor sigmas = at::zeros({steps + 1}, at::kDouble);
  const auto last = static_cast<double>(levels.size(0) - 1);
  for (int64_t i = 0; i < steps; ++i) {
    const double share = steps > 1 ? static_cast<double>(i) / static_cast<double>(steps - 1) : 0.0;
    sigmas[i] = sigma_at(levels, last * (1.0 - share));
  }
  return sigmas;
}

at::Tensor sample_latents(Denoiser& model, const LatentRequest& request,
                          const std::function<AttentionTap*(int64_t step)>& before_step) {
  const at::NoGradGuard no_grad;
  const int64_t n = request.noise.size(0);
  const at::Tensor sigmas = sampling_sigmas(model.noise_levels(), request.steps);
  const bool guided = request.cfg != 1.0;
  const TextEmbedding text =
      guided ? TextEmbedding{with_negative(request.positive.context, request.negative.context),
                             with_negative(request.positive.pooled, request.negative.pooled)}
             : request.positive;
  Solver solver(request.sampler);
  at::Tensor x = request.noise.to(at::kCPU, at::kFloat) * sigmas[0].item<double>();
  for (int64_t step = 0; step < request.steps; ++step) {
    AttentionTap* tap = before_step(step);
    const double sigma = sigmas[step].item<double>();
    DenoiseRequest pass;
    pass.noisy = guided ? at::cat({x, x}) : x;
    pass.sigma = at::full({pass.noisy.size(0)}, sigma, at::kFloat);
    pass.text = text;
    at::Tensor clean = model.denoise(pass, tap).to(at::kCPU, at::kFloat);
    if (clean.sizes() != pass.noisy.sizes()) {
      throw Error("the model returned a latent of an unexpected shape");
    }
    if (guided) {
      const at::Tensor negative = clean.narrow(0, n, n);
      clean = negative + request.cfg * (clean.narrow(0, 0, n) - negative);
    }
    x = solver.step(x, clean, sigma, sigmas[step + 1].item<double>());
  }
  return x;
}

}  // namespace lacuna
