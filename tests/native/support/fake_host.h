// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lacuna/host.h"

namespace lacuna::testing {

// A causal text encoder on words: position t holds a fixed random function of tokens 0..t, like
// CLIP; padding repeats the end token at new positions.
class FakeTextEncoder : public TextEncoder {
 public:
  explicit FakeTextEncoder(int64_t width = 16, at::Device device = at::kCPU);
  int64_t width() override { return width_; }
  int64_t window() override { return 77; }
  std::string fingerprint() override { return fingerprint_; }
  WeightSamples weight_samples() override { return samples_; }
  std::string cache_directory() override { return cache_directory_; }
  std::vector<int64_t> tokenize(const std::string& text) override;
  std::vector<std::string> vocabulary() override { return vocabulary_; }
  at::Tensor encode(const std::vector<std::string>& prompts) override;
  std::shared_ptr<TextEncoder> with_map(const TextMap& map, double strength,
                                        const std::vector<std::string>& phrases) override;
  at::Tensor conditioning(const std::vector<std::string>& prompts) override;

  std::string fingerprint_ = "fake";
  std::vector<std::string> vocabulary_;
  WeightSamples samples_;
  std::string cache_directory_;
  int64_t encoded_prompts = 0;
  bool broken = false;  // returns NaN
  std::vector<std::string> mapped_phrases_;
  at::Tensor map_;  // strength delta, [d, d], or undefined

 private:
  int64_t width_;
  at::Device device_;
  at::Tensor mix_;  // [d, d]
};

// Cross-attention layers with random weights; sample() is one attention read-out per layer, enough
// to see an edit at the output.
class FakeDenoiser : public Denoiser, public std::enable_shared_from_this<FakeDenoiser> {
 public:
  FakeDenoiser(int64_t layers, int64_t width, at::Device device = at::kCPU);
  std::string family() override { return family_; }
  std::string fingerprint() override { return fingerprint_; }
  WeightSamples weight_samples() override { return samples_; }
  std::string revision() override { return revision_; }
  bool patchable() override { return patchable_; }
  std::vector<TextEntry> text_entries() override { return projections_; }
  at::Tensor effective_weight(const std::string& name) override { return weights_.at(name); }
  std::shared_ptr<Denoiser> with_weight_deltas(const std::vector<WeightDelta>& deltas,
                                               double strength) override;
  std::shared_ptr<Denoiser> with_weight_maps(const std::vector<TextMap>& maps,
                                             double strength) override;
  std::shared_ptr<Denoiser> with_input_maps(const std::vector<TextMap>& maps,
                                            const std::vector<WeightDelta>& deltas, double strength,
                                            const std::shared_ptr<const TextGate>& gate) override;
  at::Tensor acts_on(const at::Tensor& context) override;
  at::Tensor noise_levels() override;
  std::vector<int64_t> latent_shape(int64_t width, int64_t height) override;
  at::Tensor to_host_latent(const at::Tensor& latent) override { return latent / 0.18215; }
  at::Tensor from_host_latent(const at::Tensor& latent) override { return latent * 0.18215; }
  at::Tensor denoise(const DenoiseRequest& request, AttentionTap* tap) override;
  at::Tensor sample(const SamplingRequest& request,
                    const std::function<void(int64_t, int64_t)>& on_step) override;

  std::string fingerprint_ = "fake-model";
  std::string revision_;
  WeightSamples samples_;
  std::string family_ = "SD1.x";
  bool patchable_ = true;
  std::vector<TextEntry> projections_;
  std::map<std::string, at::Tensor> weights_;
  std::map<std::string, at::Tensor> input_maps_;  // by weight: strength delta, [d, d]
  std::map<std::string, at::Tensor> added_;       // beside them: strength up down, [out, d]
  std::shared_ptr<const TextGate> gate_;          // of both

 private:
  // What a projection makes of an embedding, [..., d].
  at::Tensor read(const TextEntry& projection, const at::Tensor& context) const;
};

class FakeImageDecoder : public ImageDecoder {
 public:
  at::Tensor decode(const at::Tensor& latent) override;
  at::Tensor encode(const at::Tensor& images) override;
};

class FakeApplication : public Application {
 public:
  explicit FakeApplication(std::string output) : output_(std::move(output)) {}
  std::string output_directory() override { return output_; }
  Checkpoint load_checkpoint(const std::string& name) override;
  std::shared_ptr<Denoiser> load_lora(const std::shared_ptr<Denoiser>& model,
                                      const std::string& name, double strength) override;

  int checkpoints_loaded = 0;

 private:
  std::string output_;
};

// Counts reports; throws Cancelled at the given check.
struct Cancelled {};
class CountingProgress : public Progress {
 public:
  void report(int64_t done, int64_t total) override;
  void check() override;

  int64_t reports = 0;
  int64_t checks = 0;
  int64_t last_done = 0;
  int64_t last_total = 0;
  int64_t cancel_at = -1;
};

}  // namespace lacuna::testing
