// SPDX-License-Identifier: Apache-2.0
#include "lacuna/training/attention_tap.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/upsample_bilinear2d.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <stdexcept>

#include "lacuna/error.h"
#include "lacuna/training/attention_mask.h"

namespace lacuna {
namespace {

constexpr double kFloor = 1e-12;  // under the square root: its gradient at 0 is infinite

// [n, T, inner] -> [n, heads, T, inner / heads]
at::Tensor split_heads(const at::Tensor& tensor, int64_t heads) {
  return tensor.reshape({tensor.size(0), tensor.size(1), heads, tensor.size(2) / heads})
      .transpose(1, 2);
}

// Attention and loss in float32 at least. Inference tensors cannot take part in a graph.
at::Tensor for_graph(const at::Tensor& tensor) {
  const at::Tensor plain = tensor.is_inference() ? tensor.clone() : tensor;
  return plain.scalar_type() == at::kDouble ? plain : plain.to(at::kFloat);
}

}  // namespace

at::Tensor attention_probabilities(const at::Tensor& query, const at::Tensor& key, int64_t heads) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(query.size(2) / heads));
  return at::softmax(
      at::matmul(split_heads(query * scale, heads), split_heads(key, heads).transpose(2, 3)), -1);
}

at::Tensor weighted_values(const at::Tensor& probabilities, const at::Tensor& value) {
  return at::matmul(probabilities, split_heads(value, probabilities.size(1)))
      .transpose(1, 2)
      .reshape({value.size(0), probabilities.size(2), value.size(2)});
}

at::Tensor attention_mass(const at::Tensor& probabilities, const at::Tensor& pixel_weights,
                          const at::Tensor& tokens) {
  // Products with vectors, so that autograd keeps nothing of the size of the map but the map.
  const at::Tensor by_pixel =
      at::matmul(probabilities.square(), tokens.unsqueeze(1).unsqueeze(3)).squeeze(3).sum(1);
  const at::Tensor squared = (by_pixel * pixel_weights).sum(1);
  return squared.clamp_min(kFloor).sqrt() * squared.gt(kFloor);
}

at::Tensor add_pairs(const at::Tensor& base, const at::Tensor& context,
                     const std::vector<const LoraPair*>& pairs) {
  std::vector<at::Tensor> ups;
  std::vector<at::Tensor> downs;
  for (const LoraPair* pair : pairs) {
    ups.push_back(pair->up);
    downs.push_back(pair->down);
  }
  const at::Tensor up = at::stack(ups).to(base.options());
  const at::Tensor down = at::stack(downs).to(base.options());
  return base + at::matmul(at::matmul(context, down.transpose(1, 2)), up.transpose(1, 2));
}

LoraTap::LoraTap(std::vector<TapSample> samples, at::Tensor context, int64_t latent_height,
                 int64_t latent_width, Progress& progress)
    : samples_(std::move(samples)),
      context_(std::move(context)),
      latent_height_(latent_height),
      latent_width_(latent_width),
      progress_(progress) {
  std::vector<at::Tensor> tokens;
  for (const TapSample& sample : samples_) tokens.push_back(sample.tokens);
  tokens_ = at::stack(tokens);
}

at::Tensor LoraTap::with_pairs(const std::string& layer, const at::Tensor& base,
                               LoraPair LayerPairs::* side) {
  std::vector<const LoraPair*> pairs;
  for (const TapSample& sample : samples_) {
    if (sample.pairs == nullptr) return base;
    const auto it = sample.pairs->find(layer);
    if (it == sample.pairs->end() || !(it->second.*side).up.defined()) return base;
    pairs.push_back(&(it->second.*side));
  }
  context_ = context_.to(base.options());
  return add_pairs(base, context_, pairs);
}

const at::Tensor& LoraTap::pixel_weights(int64_t pixels, const at::Tensor& like) {
  at::Tensor& weights = pixel_weights_[pixels];
  if (!weights.defined()) {
    const MapSize size = map_size(pixels, latent_height_, latent_width_);
    std::vector<at::Tensor> rows;
    for (const TapSample& sample : samples_) {
      rows.push_back(sample.mask.defined()
                         ? resize_nearest(sample.mask, size.height, size.width).flatten().square()
                         : at::ones({pixels}, at::kFloat));
    }
    weights = at::stack(rows).to(like.options());
  }
  return weights;
}

at::Tensor LoraTap::attend(const std::string& layer, const at::Tensor& query, const at::Tensor& key,
                           const at::Tensor& value, int64_t heads) {
  progress_.check();
  if (query.size(0) != static_cast<int64_t>(samples_.size())) {
    throw Error("the model passed on " + std::to_string(query.size(0)) + " samples instead of " +
                std::to_string(samples_.size()));
  }
  const at::Tensor q = for_graph(query);
  const at::Tensor k = with_pairs(layer, for_graph(key), &LayerPairs::key);
  const at::Tensor v = with_pairs(layer, for_graph(value), &LayerPairs::value);
  const at::Tensor probabilities = attention_probabilities(q, k, heads);
  if (probabilities.requires_grad() && probabilities.is_cpu()) {
    // A backward pass on a CPU takes long; Cancel must not wait for its end.
    probabilities.register_hook([this](const at::Tensor&) {
      try {
        progress_.check();
      } catch (...) {
        interruption_ = std::current_exception();
        throw std::runtime_error("interrupted");
      }
    });
  }
  const at::Tensor& weights = pixel_weights(q.size(1), q);
  tokens_ = tokens_.to(q.options());
  const at::Tensor mass = attention_mass(probabilities, weights, tokens_);
  losses_ = losses_.defined() ? losses_ + mass.to(losses_.options()) : mass;

  if (capture_limit_ > 0) {
    const at::NoGradGuard no_grad;
    CapturedQueries& captured = captured_[layer];
    captured = {.queries = {}, .pixel_weights = {}, .heads = heads};
    for (int64_t i = 0; i < q.size(0); ++i) {
      at::Tensor rows = weights[i].gt(0).nonzero().squeeze(1);
      const int64_t inside = rows.size(0);
      const int64_t kept = std::min(inside, capture_limit_);
      if (kept < inside) {
        rows =
            rows.index_select(0, at::arange(kept, rows.options()).mul(inside).floor_divide(kept));
      }
      captured.queries.push_back(q[i].detach().index_select(0, rows).clone());
      const double scale = kept > 0 ? static_cast<double>(inside) / static_cast<double>(kept) : 1.0;
      captured.pixel_weights.push_back(weights[i].index_select(0, rows) * scale);
    }
  }
  return weighted_values(probabilities, v).to(query.scalar_type());
}

MapTap::MapTap(at::Tensor tokens, int64_t latent_height, int64_t latent_width, Progress& progress)
    : tokens_(std::move(tokens)),
      latent_height_(latent_height),
      latent_width_(latent_width),
      progress_(progress) {}

at::Tensor MapTap::attend(const std::string&, const at::Tensor& query, const at::Tensor& key,
                          const at::Tensor& value, int64_t heads) {
  progress_.check();
  const at::Tensor q = for_graph(query);
  const at::Tensor probabilities = attention_probabilities(q, for_graph(key), heads);
  const at::Tensor to_phrase = at::matmul(probabilities.narrow(0, 0, tokens_.size(0)).mean(1),
                                          tokens_.to(q.options()).unsqueeze(2))
                                   .squeeze(2)
                                   .to(at::kCPU, at::kFloat);
  Sum& sum = sums_[q.size(1)];
  sum.map = sum.map.defined() ? sum.map + to_phrase : to_phrase;
  ++sum.count;
  return weighted_values(probabilities, for_graph(value)).to(query.scalar_type());
}

at::Tensor MapTap::maps() const {
  const int64_t n = tokens_.size(0);
  const auto collect = [&](bool middle_only) {
    at::Tensor total;
    int64_t count = 0;
    for (const auto& [pixels, sum] : sums_) {
      const MapSize size = map_size(pixels, latent_height_, latent_width_);
      const int64_t shrink = (latent_height_ + size.height - 1) / size.height;
      if (middle_only && shrink != 2 && shrink != 4) continue;
      const at::Tensor map =
          at::upsample_bilinear2d(sum.map.reshape({n, 1, size.height, size.width}),
                                  {latent_height_, latent_width_}, false)
              .squeeze(1);
      total = total.defined() ? total + map : map;
      count += sum.count;
    }
    return total.defined() ? total / static_cast<double>(count) : total;
  };
  at::Tensor maps = collect(true);
  if (!maps.defined()) maps = collect(false);
  if (!maps.defined()) throw Error("the model never showed its cross-attention");
  return maps;
}

}  // namespace lacuna
