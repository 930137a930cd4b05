// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "lacuna/host.h"
#include "lacuna/training/concept_lora.h"

namespace lacuna {

// Cross-attention written out, so that its probabilities can be seen and trained on.

// query [n, q, inner], key [n, T, inner] -> softmax(q k^T / sqrt(inner / heads)), [n, heads, q, T].
at::Tensor attention_probabilities(const at::Tensor& query, const at::Tensor& key, int64_t heads);
// probabilities [n, heads, q, T], value [n, T, inner] -> [n, q, inner]
at::Tensor weighted_values(const at::Tensor& probabilities, const at::Tensor& value);

// MACE's loss of one layer: the Frobenius norm over heads, pixels and positions of the probability
// that pixels give to the concept's tokens. pixel_weights [n, q]: squared mask; tokens [n, T]: 1 on
// the concept's positions, 0 elsewhere. [n]; exactly 0, with zero gradient, where nothing is left.
at::Tensor attention_mass(const at::Tensor& probabilities, const at::Tensor& pixel_weights,
                          const at::Tensor& tokens);

// The low-rank pairs of one cross-attention layer: k += up (down e), v likewise. A pair may be
// undefined.
struct LayerPairs {
  LoraPair key;
  LoraPair value;
};
using ConceptPairs = std::map<std::string, LayerPairs>;  // by layer_of(projection)

// base [n, T, out] + (context [n, T, d] down^T) up^T with a pair for each sample.
at::Tensor add_pairs(const at::Tensor& base, const at::Tensor& context,
                     const std::vector<const LoraPair*>& pairs);

// What one sample of a forward pass belongs to.
struct TapSample {
  const ConceptPairs* pairs = nullptr;  // none: the layer as it is
  at::Tensor tokens;                    // [T], 1 on the concept's positions
  at::Tensor mask;                      // [H, W] in 0..1, any size; undefined: all ones
};

// The queries that one layer saw inside the masks, one entry for each sample.
struct CapturedQueries {
  std::vector<at::Tensor> queries;        // [m, inner]
  std::vector<at::Tensor> pixel_weights;  // [m], squared mask
  int64_t heads = 1;
};

// Gives every sample its own concept's LoRA and sums up every sample's loss. No layer of a
// diffusion model couples samples, so a batch over concepts computes exactly what single runs do.
class LoraTap final : public AttentionTap {
 public:
  // context: [n, T, d], what the pairs read: the original embedding, even when the host is given a
  // mapped one (k = W M e + up (down e)). progress.check() is called in every layer.
  LoraTap(std::vector<TapSample> samples, at::Tensor context, int64_t latent_height,
          int64_t latent_width, Progress& progress);

  // Also keep the queries (detached), at most `limit` of each layer and sample, evenly spread, with
  // weights raised accordingly.
  void capture_queries(int64_t limit) { capture_limit_ = limit; }

  at::Tensor attend(const std::string& layer, const at::Tensor& query, const at::Tensor& key,
                    const at::Tensor& value, int64_t heads) override;

  const at::Tensor& losses() const { return losses_; }  // [n]; undefined before the first layer
  const std::map<std::string, CapturedQueries>& captured() const { return captured_; }

  // What progress.check() threw during the backward pass, which it ended. The autograd engine is
  // left in an orderly state only by standard exceptions, so the host's own waits here.
  const std::exception_ptr& interruption() const { return interruption_; }

 private:
  at::Tensor with_pairs(const std::string& layer, const at::Tensor& base, LoraPair LayerPairs::*);
  const at::Tensor& pixel_weights(int64_t pixels, const at::Tensor& like);

  std::vector<TapSample> samples_;
  at::Tensor context_;
  int64_t latent_height_;
  int64_t latent_width_;
  Progress& progress_;
  int64_t capture_limit_ = 0;
  at::Tensor tokens_;                            // [n, T]
  std::map<int64_t, at::Tensor> pixel_weights_;  // by number of pixels
  at::Tensor losses_;
  std::map<std::string, CapturedQueries> captured_;
  std::exception_ptr interruption_;
};

// Sums up how much each pixel attends to the concept's tokens: the first n samples of the passes it
// sees, mean over heads.
class MapTap final : public AttentionTap {
 public:
  // tokens: [n, T], 1 on the phrase's own positions.
  MapTap(at::Tensor tokens, int64_t latent_height, int64_t latent_width, Progress& progress);
  at::Tensor attend(const std::string& layer, const at::Tensor& query, const at::Tensor& key,
                    const at::Tensor& value, int64_t heads) override;
  // [n, latent_height, latent_width] float32 CPU, mean over layers. Layers of a half and a quarter
  // of the latent's size show objects best; others are used when the model has none of those.
  at::Tensor maps() const;

 private:
  struct Sum {
    at::Tensor map;  // [n, q]
    int64_t count = 0;
  };
  at::Tensor tokens_;
  int64_t latent_height_;
  int64_t latent_width_;
  Progress& progress_;
  std::map<int64_t, Sum> sums_;  // by number of pixels
};

}  // namespace lacuna
