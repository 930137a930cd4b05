// SPDX-License-Identifier: Apache-2.0
#include "lacuna/training/concept_images.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <memory>

#include "lacuna/concepts/concept_prompts.h"
#include "lacuna/files/random_stream.h"
#include "lacuna/training/attention_mask.h"
#include "lacuna/training/attention_tap.h"
#include "lacuna/training/latent_sampler.h"

namespace lacuna {
namespace {

// The first steps settle the layout; attention means little before.
constexpr double kFirstMaskedShare = 0.3;
// Shares of the training timesteps at which given pictures are looked at.
constexpr double kMaskTimesteps[] = {0.2, 0.3, 0.4, 0.5};
constexpr double kOutside = 0.35;  // brightness of what a mask leaves out

at::Tensor masks_from(const MapTap& tap) {
  const at::Tensor maps = tap.maps();
  std::vector<at::Tensor> masks;
  for (int64_t i = 0; i < maps.size(0); ++i) masks.push_back(mask_from_map(maps[i]));
  return at::stack(masks);
}

}  // namespace

TrainingImages draw_concept(Denoiser& model, const ConceptPrompts& prompts,
                            const TextEmbedding& negative, const LoraOptions& options,
                            const std::string& subject, bool masked, Progress& progress,
                            const std::function<void(int64_t)>& on_step) {
  const std::vector<int64_t> shape = model.latent_shape(options.width, options.height);
  const auto count = static_cast<int64_t>(prompts.texts.size());
  at::Generator generator = random_stream(options.seed, subject, "pictures");
  const at::Tensor phrase = prompts.tokens(TokenSet::kPhrase);
  const auto first_masked =
      static_cast<int64_t>(kFirstMaskedShare * static_cast<double>(options.sampling_steps));
  std::vector<at::Tensor> latents;
  std::vector<at::Tensor> masks;
  for (int64_t begin = 0; begin < options.images; begin += options.batch) {
    const int64_t n = std::min(options.batch, options.images - begin);
    LatentRequest request;
    std::vector<at::Tensor> noise;
    for (int64_t i = 0; i < n; ++i) {
      noise.push_back(at::randn(shape, generator, at::TensorOptions(at::kFloat)));
    }
    request.noise = at::stack(noise);
    // Spread over all templates and phrases.
    const at::Tensor rows =
        at::arange(begin, begin + n, at::kLong).mul(count).floor_divide(options.images);
    request.positive = select(prompts.embedding, rows);
    request.negative = negative;
    request.steps = options.sampling_steps;
    request.cfg = options.cfg;
    MapTap tap(phrase.index_select(0, rows), shape[1], shape[2], progress);
    latents.push_back(sample_latents(model, request, [&](int64_t step) -> AttentionTap* {
      progress.check();
      if (step > 0) on_step(n);
      return masked && step >= first_masked ? &tap : nullptr;
    }));
    on_step(n);
    if (masked) masks.push_back(masks_from(tap));
  }
  return {at::cat(latents), masked ? at::cat(masks) : at::Tensor()};
}

at::Tensor masks_of(Denoiser& model, const ConceptPrompts& prompts, const at::Tensor& latents,
                    const std::string& subject, Progress& progress) {
  const at::NoGradGuard no_grad;
  const at::Tensor levels = model.noise_levels();
  at::Generator generator = random_stream(0, subject, "masks");
  const at::Tensor first = at::arange(1, at::kLong);
  std::vector<at::Tensor> masks;
  for (int64_t i = 0; i < latents.size(0); ++i) {
    const at::Tensor latent = latents.narrow(0, i, 1);
    MapTap tap(prompts.tokens(TokenSet::kPhrase).narrow(0, 0, 1), latents.size(2), latents.size(3),
               progress);
    for (const double share : kMaskTimesteps) {
      progress.check();
      const double sigma = sigma_at(levels, share * static_cast<double>(levels.size(0) - 1));
      DenoiseRequest pass;
      pass.noisy = latent + sigma * at::randn(latent.sizes(), generator, latent.options());
      pass.sigma = at::full({1}, sigma, at::kFloat);
      pass.text = select(prompts.embedding, first);
      pass.attention_only = true;
      model.denoise(pass, &tap);
    }
    masks.push_back(masks_from(tap));
  }
  return at::cat(masks);
}

at::Tensor picture_masks(Denoiser& model, ImageDecoder* decoder, const TrainingImages& images,
                         int64_t count, int64_t width, int64_t height, Progress& progress) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> pictures;
  for (int64_t i = 0; i < std::min(count, images.latents.size(0)); ++i) {
    progress.check();
    at::Tensor picture = at::ones({height, width, 3}, at::kFloat);
    if (decoder != nullptr) {
      picture = decoder->decode(model.to_host_latent(images.latents.narrow(0, i, 1)))
                    .detach()
                    .to(at::kCPU, at::kFloat)[0];
    }
    if (images.masks.defined()) {
      const at::Tensor mask =
          resize_nearest(images.masks[i], picture.size(0), picture.size(1)).unsqueeze(2);
      picture = picture * (decoder != nullptr ? kOutside + (1 - kOutside) * mask : mask);
    }
    pictures.push_back(picture.clamp(0, 1));
  }
  return at::stack(pictures);
}

}  // namespace lacuna
