// SPDX-License-Identifier: Apache-2.0
#include "support/fake_host.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <sstream>
#include <stdexcept>

#include "lacuna/closed_form/text_entry.h"
#include "lacuna/closed_form/text_gate.h"

namespace lacuna::testing {
namespace {

constexpr int64_t kStart = 1;
constexpr int64_t kEnd = 2;

// Independent of the global random state, so that results are comparable between tests.
at::Tensor fixed_random(at::IntArrayRef shape, uint64_t seed) {
  at::Generator generator = at::detail::createCPUGenerator(seed);
  return at::randn(shape, generator, at::TensorOptions(at::kDouble));
}

}  // namespace

FakeTextEncoder::FakeTextEncoder(int64_t width, at::Device device)
    : width_(width), device_(device), mix_(fixed_random({width, width}, 7) / std::sqrt(width)) {}

std::vector<int64_t> FakeTextEncoder::tokenize(const std::string& text) {
  std::vector<int64_t> ids{kStart};
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    ids.push_back(static_cast<int64_t>(std::hash<std::string>{}(word) % 1'000'003) + 10);
  }
  ids.push_back(kEnd);
  return ids;
}

std::shared_ptr<TextEncoder> FakeTextEncoder::with_map(const TextMap& map, double strength,
                                                       const std::vector<std::string>& phrases) {
  auto mapped = std::make_shared<FakeTextEncoder>(*this);
  mapped->mapped_phrases_ = phrases;
  mapped->map_ = strength * (map.in.defined() ? at::matmul(map.out, map.in) : map.out);
  return mapped;
}

at::Tensor FakeTextEncoder::conditioning(const std::vector<std::string>& prompts) {
  at::Tensor rows = encode(prompts);
  for (size_t i = 0; i < prompts.size(); ++i) {
    const bool named =
        std::any_of(mapped_phrases_.begin(), mapped_phrases_.end(), [&](const std::string& phrase) {
          return (" " + prompts[i] + " ").find(" " + phrase + " ") != std::string::npos;
        });
    at::Tensor own = rows[static_cast<int64_t>(i)];
    if (named) own.add_(at::matmul(own, map_.t().to(own)));
  }
  return rows;
}

at::Tensor FakeTextEncoder::encode(const std::vector<std::string>& prompts) {
  std::vector<at::Tensor> rows;
  for (const std::string& prompt : prompts) {
    ++encoded_prompts;
    std::vector<int64_t> ids = tokenize(prompt);
    ids.resize(77, kEnd);
    // A running sum forgets nothing: like CLIP's padding, late positions still tell the phrase.
    at::Tensor sum = at::zeros({width_}, at::kDouble);
    std::vector<at::Tensor> positions;
    for (size_t t = 0; t < ids.size(); ++t) {
      const at::Tensor token = fixed_random({width_}, static_cast<uint64_t>(ids[t]));
      const at::Tensor position = fixed_random({width_}, 5'000'000 + t);
      if (ids[t] != kEnd) sum = sum + token;
      positions.push_back(at::tanh(at::mv(mix_, sum)) + 0.3 * token + 0.3 * position);
    }
    rows.push_back(at::stack(positions));
  }
  at::Tensor out = at::stack(rows).to(device_, at::kFloat);
  return broken ? out * NAN : out;
}

FakeDenoiser::FakeDenoiser(int64_t layers, int64_t width, at::Device device) {
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (const auto role : {EntryRole::kKey, EntryRole::kValue}) {
      const std::string suffix = role == EntryRole::kKey ? "k" : "v";
      const std::string name = "layer." + std::to_string(layer) + ".to_" + suffix;
      projections_.push_back(
          {name, "lora_unet_layer_" + std::to_string(layer) + "_to_" + suffix, role});
      weights_[name] = fixed_random({8 + 4 * layer, width}, 100 + 2 * layer + (suffix == "v"))
                           .to(device, at::kFloat);
    }
  }
}

std::shared_ptr<Denoiser> FakeDenoiser::with_weight_deltas(const std::vector<WeightDelta>& deltas,
                                                           double strength) {
  auto patched = std::make_shared<FakeDenoiser>(*this);
  for (const WeightDelta& delta : deltas) {
    const at::Tensor& weight = weights_.at(delta.name);
    const at::Tensor change =
        (delta.down.defined() ? at::matmul(delta.up, delta.down) : delta.up).to(weight.device());
    patched->weights_[delta.name] = weight + strength * change;
  }
  return patched;
}

std::shared_ptr<Denoiser> FakeDenoiser::with_weight_maps(const std::vector<TextMap>& maps,
                                                         double strength) {
  auto patched = std::make_shared<FakeDenoiser>(*this);
  for (const TextMap& map : maps) {
    for (const TextEntry& entry : map.entries) {
      const at::Tensor& weight = patched->weights_.at(entry.name);
      const at::Tensor reads = entry_weight(*patched, entry);
      at::Tensor change = at::matmul(reads, map.out.to(weight));
      if (map.in.defined()) change = at::matmul(change, map.in.to(weight));
      at::Tensor edited = weight.clone();
      edited.narrow(1, entry.first_column, reads.size(1)).add_(change, strength);
      patched->weights_[entry.name] = edited;
    }
  }
  return patched;
}

std::shared_ptr<Denoiser> FakeDenoiser::with_input_maps(
    const std::vector<TextMap>& maps, const std::vector<WeightDelta>& deltas, double strength,
    const std::shared_ptr<const TextGate>& gate) {
  auto patched = std::make_shared<FakeDenoiser>(*this);
  for (const TextMap& map : maps) {
    const at::Tensor delta = map.in.defined() ? at::matmul(map.out, map.in) : map.out;
    for (const TextEntry& entry : map.entries) {
      patched->input_maps_[entry.name] = strength * delta;
    }
    patched->gate_ = gate;
  }
  for (const WeightDelta& delta : deltas) {
    patched->added_[delta.name] =
        strength * (delta.down.defined() ? at::matmul(delta.up, delta.down) : delta.up);
  }
  return patched;
}

at::Tensor FakeDenoiser::acts_on(const at::Tensor& context) {
  return gate_ == nullptr ? at::Tensor() : opens(*gate_, context);
}

at::Tensor FakeDenoiser::read(const TextEntry& projection, const at::Tensor& context) const {
  const at::Tensor& weight = weights_.at(projection.name);
  const at::Tensor x = context.to(weight);
  const at::Tensor plain = at::matmul(x, weight.t());
  const auto map = input_maps_.find(projection.name);
  if (map == input_maps_.end()) return plain;
  at::Tensor edited = at::matmul(x + at::matmul(x, map->second.t().to(weight)), weight.t());
  if (const auto it = added_.find(projection.name); it != added_.end()) {
    edited = edited + at::matmul(x, it->second.t().to(weight));
  }
  if (gate_ == nullptr) return edited;
  const at::Tensor open = opens(*gate_, x.dim() == 2 ? x.unsqueeze(0) : x).to(x.device());
  return at::where(open.reshape({-1, 1, 1}), edited, plain).reshape(plain.sizes());
}

at::Tensor FakeDenoiser::noise_levels() {
  const at::Tensor kept = at::cumprod(
      1 - at::linspace(std::sqrt(0.00085), std::sqrt(0.012), 1000, at::kDouble).square(), 0);
  return ((1 - kept) / kept).sqrt().to(at::kFloat);
}

std::vector<int64_t> FakeDenoiser::latent_shape(int64_t width, int64_t height) {
  return {4, height / 8, width / 8};
}

// One residual cross-attention per layer on every pixel; smooth in everything.
at::Tensor FakeDenoiser::denoise(const DenoiseRequest& request, AttentionTap* tap) {
  constexpr int64_t kFeatures = 6, kHeads = 2;
  const auto like = weights_.begin()->second.options();
  const auto fixed = [&](at::IntArrayRef shape, uint64_t seed) {
    return fixed_random(shape, seed).to(like);
  };
  const at::Tensor sigma = request.sigma.to(like).reshape({-1, 1, 1, 1});
  const at::Tensor x = request.noisy.to(like) / (sigma.square() + 1).sqrt();
  at::Tensor features =
      at::matmul(x.flatten(2).transpose(1, 2), fixed({x.size(1), kFeatures}, 900)) +
      0.1 * sigma.log().reshape({-1, 1, 1});
  for (size_t i = 0; i + 1 < projections_.size(); i += 2) {
    const at::Tensor key = read(projections_[i], request.text.context);
    const at::Tensor value = read(projections_[i + 1], request.text.context);
    const int64_t inner = key.size(2);
    const at::Tensor query = at::matmul(features, fixed({kFeatures, inner}, 910 + i));
    at::Tensor out;
    if (tap != nullptr) {
      out = tap->attend(layer_of(projections_[i]), query, key, value, kHeads);
    } else {
      const auto split = [&](const at::Tensor& t) {
        return t.reshape({t.size(0), t.size(1), kHeads, inner / kHeads}).transpose(1, 2);
      };
      const at::Tensor scores = at::matmul(split(query), split(key).transpose(2, 3)) /
                                std::sqrt(static_cast<double>(inner / kHeads));
      out =
          at::matmul(at::softmax(scores, -1), split(value)).transpose(1, 2).reshape(query.sizes());
    }
    if (request.attention_only && i + 2 >= projections_.size()) return {};
    features = features + 0.3 * at::tanh(at::matmul(out, fixed({inner, kFeatures}, 930 + i)));
  }
  const at::Tensor noise =
      at::matmul(features, fixed({kFeatures, x.size(1)}, 950)).transpose(1, 2).reshape(x.sizes());
  return request.noisy - (sigma * noise).to(request.noisy.device(), at::kFloat);
}

at::Tensor FakeDenoiser::sample(const SamplingRequest& request,
                                const std::function<void(int64_t, int64_t)>& on_step) {
  at::Tensor sum = at::zeros({}, at::kFloat);
  for (size_t i = 0; i + 1 < projections_.size(); i += 2) {
    const at::Tensor keys = read(projections_[i], request.positive[0]);
    const at::Tensor values = read(projections_[i + 1], request.positive[0]);
    const at::Tensor query = keys.mean(0, true);
    sum = sum + at::matmul(at::softmax(at::matmul(query, keys.t()), -1), values).sum().to(at::kCPU);
  }
  for (int64_t step = 0; step < request.steps; ++step) on_step(step + 1, request.steps);
  return request.latent + sum;
}

at::Tensor FakeImageDecoder::decode(const at::Tensor& latent) {
  return at::sigmoid(latent.narrow(1, 0, 3)).permute({0, 2, 3, 1}).contiguous();
}

at::Tensor FakeImageDecoder::encode(const at::Tensor& images) {
  const at::Tensor latent = at::logit(images.clamp(1e-3, 1 - 1e-3)).permute({0, 3, 1, 2});
  return at::cat({latent, latent.narrow(1, 0, 1)}, 1);
}

Checkpoint FakeApplication::load_checkpoint(const std::string& name) {
  if (name == "missing.safetensors") throw std::runtime_error("no such checkpoint");
  ++checkpoints_loaded;
  return {std::make_shared<FakeDenoiser>(3, 16), std::make_shared<FakeTextEncoder>(16),
          std::make_shared<FakeImageDecoder>()};
}

std::shared_ptr<Denoiser> FakeApplication::load_lora(const std::shared_ptr<Denoiser>& model,
                                                     const std::string&, double strength) {
  std::vector<WeightDelta> deltas;
  for (const TextEntry& projection : model->text_entries()) {
    deltas.push_back(
        {projection.name, at::ones_like(model->effective_weight(projection.name)), {}});
  }
  return model->with_weight_deltas(deltas, strength);
}

void CountingProgress::report(int64_t done, int64_t total) {
  ++reports;
  last_done = done;
  last_total = total;
}

void CountingProgress::check() {
  if (++checks == cancel_at) throw Cancelled{};
}

}  // namespace lacuna::testing
