// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lacuna/files/weight_samples.h"

namespace lacuna {

// Everything Lacuna asks of the application that runs it (ComfyUI, a diffusers script, a test).
// The core owns loops and maths; the host is called back for its own forward passes. A host signals
// cancellation or failure by throwing; the core lets every exception pass through unchanged.

class Progress {
 public:
  virtual ~Progress() = default;
  // done of total units of work; may throw the host's interrupt.
  virtual void report(int64_t done, int64_t total) = 0;
  // Throws the host's interrupt when the user pressed Cancel. Called at least every two seconds.
  virtual void check() = 0;
  // One line about what is going on now, e.g. "church: step 12 of 50, about 2 min left".
  virtual void status(const std::string& line) { (void)line; }
  // A picture of the work so far, [H, W, 3] float32 in 0..1.
  virtual void preview(const at::Tensor& image) { (void)image; }
};

// A Progress that nobody watches.
class SilentProgress final : public Progress {
 public:
  void report(int64_t, int64_t) override {}
  void check() override {}
};

// Text embeddings of n prompts.
struct TextEmbedding {
  at::Tensor context;  // [n, window, width] float32: what cross-attention reads
  at::Tensor pooled;   // [n, p]: what SDXL adds to its time embedding; undefined elsewhere
};

struct TextMap;

class TextEncoder {
 public:
  virtual ~TextEncoder() = default;
  virtual int64_t width() = 0;   // d: 768 for SD1.x, 1024 for SD2.x, 2048 for SDXL
  virtual int64_t window() = 0;  // tokens per prompt, 77
  // Hash of the encoder's weights, equal in every host; empty when it cannot be known.
  virtual std::string fingerprint() = 0;
  // Of the encoder's matrices, so that the same weights are known in another weight type; empty:
  // the host cannot say.
  virtual WeightSamples weight_samples() { return {}; }
  // Folder for cached statistics; empty: none.
  virtual std::string cache_directory() = 0;
  // Literal text (no emphasis syntax) to ids with start and end token, unpadded, not truncated.
  virtual std::vector<int64_t> tokenize(const std::string& text) = 0;
  // Whole words that the tokenizer knows as one token and the encoder tells apart, most frequent
  // first; empty: cannot say.
  virtual std::vector<std::string> vocabulary() { return {}; }
  // [n, window, width] float32, any device: what cross-attention sees for each prompt.
  virtual at::Tensor encode(const std::vector<std::string>& prompts) = 0;
  // [n, length, width]: the first rows of encode(). They do not depend on later ones, so that a
  // host can save computing the padding, which is most of a window.
  virtual at::Tensor encode_start(const std::vector<std::string>& prompts, int64_t length) {
    return encode(prompts).narrow(1, 0, length);
  }
  // encode() with the pooled vectors, for forward passes.
  virtual TextEmbedding embed(const std::vector<std::string>& prompts) {
    return {encode(prompts), {}};
  }
  // The same encoder, whose conditioning() becomes x + strength delta x for prompts that say one of
  // `phrases` word for word, whatever else they say. What the core reads of it stays as it is.
  // Null: the host cannot do that.
  virtual std::shared_ptr<TextEncoder> with_map(const TextMap& map, double strength,
                                                const std::vector<std::string>& phrases) {
    (void)map, (void)strength, (void)phrases;
    return nullptr;
  }
  // [n, window, width]: what prompt nodes make of prompts.
  virtual at::Tensor conditioning(const std::vector<std::string>& prompts) {
    return encode(prompts);
  }
};

inline WeightIdentity identity_of(TextEncoder& encoder) {
  return {encoder.fingerprint(), encoder.weight_samples()};
}

// What text entries read: the rows that cross-attention sees, and the vector that SDXL adds to its
// time embedding.
inline constexpr std::string_view kContextStream = "context";
inline constexpr std::string_view kPooledStream = "pooled";

enum class EntryRole { kKey, kValue, kInput };  // kInput: in front of everything else

// One linear map through which text enters a model: a weight [out, d] that reads rows of a text
// stream and nothing else, at least in some of its columns. Whatever a model draws from a text, it
// reads through these.
struct TextEntry {
  std::string name;       // the host's weight key
  std::string lora_name;  // kohya module name, e.g. "lora_unet_down_blocks_0_..._attn2_to_k"
  EntryRole role = EntryRole::kKey;
  std::string stream = std::string(kContextStream);
  int64_t first_column = 0;  // of the weight, where the stream begins
  int64_t columns = 0;       // 0: all that follow
};

// W <- W + strength * (up @ down), or + strength * up when down is undefined (a full difference).
struct WeightDelta {
  std::string name;
  at::Tensor up;    // [out, r], or [out, d] when down is undefined
  at::Tensor down;  // [r, d]
};

// Which prompts an edit acts on: those with a row whose score is above zero,
//   score_k(t) = x_t . now_k + x_{t-1} . before_k - offset_k,
// t counted in windows of `window` rows, without the first row of each.
struct TextGate {
  struct Test {
    at::Tensor now;     // [d, k] float32
    at::Tensor before;  // [d, k], or undefined: zero
    at::Tensor offset;  // [k]
    bool last_row_only = false;
  };
  std::vector<Test> tests;
  int64_t window = 77;
};

// One linear map of what some weights read, x <- x + strength delta x, shared by all of them: for a
// weight, W <- W + strength W delta. However many weights there are, it is held once.
struct TextMap {
  std::vector<TextEntry> entries;  // weights that read x in d of their columns
  at::Tensor out;                  // delta = out in: [d, r]; or delta itself, [d, d] float32 ...
  at::Tensor in;                   // [r, d]; undefined then
};

// Stands in for the attention inside every text cross-attention layer of a forward pass.
class AttentionTap {
 public:
  virtual ~AttentionTap() = default;
  // layer: the projections' common weight name, layer_of(projection). query [n, q, inner], key and
  // value [n, T, inner], `heads` side by side in `inner`. Returns [n, q, inner]: what plain
  // attention, softmax(q k^T / sqrt(inner / heads)) v per head, would return. Runs under the
  // caller's grad mode; autograd passes through it.
  virtual at::Tensor attend(const std::string& layer, const at::Tensor& query,
                            const at::Tensor& key, const at::Tensor& value, int64_t heads) = 0;
};

// One forward pass, in the variance-exploding convention that all model types share:
// noisy = clean + sigma * noise, in the model's own latent scale.
struct DenoiseRequest {
  at::Tensor noisy;    // [n, c, h, w] float32
  at::Tensor sigma;    // [n] float32
  TextEmbedding text;  // of n prompts
  // Stop after the last text cross-attention: the result is then undefined.
  bool attention_only = false;
};

struct SamplingRequest {
  int64_t seed = 0;
  int64_t steps = 20;
  double cfg = 7.0;
  std::string sampler = "euler";
  std::string scheduler = "normal";
  at::Tensor positive;  // [1, T, d]
  at::Tensor negative;  // [1, T, d]
  at::Tensor latent;    // [n, c, h, w]
  double denoise = 1.0;
};

// A diffusion model as the user sees it: base weights plus the patches put on it so far. Immutable:
// with_* returns another Denoiser that shares the base weights.
class Denoiser {
 public:
  virtual ~Denoiser() = default;
  virtual std::string family() = 0;                      // "SD1.x", ... for messages
  virtual std::string fingerprint() = 0;                 // hash of the cross-attention base weights
  virtual WeightSamples weight_samples() { return {}; }  // of the same weights, by LoRA name
  // Equal for two models only if all their effective weights are equal; empty: cannot say.
  virtual std::string revision() { return {}; }
  // False when weights are stored packed, so that a patch cannot be merged exactly (GGUF, 4-bit).
  virtual bool patchable() = 0;
  // Those of cross-attention layer by layer, key before value; empty when Lacuna knows of none.
  virtual std::vector<TextEntry> text_entries() = 0;
  // [out, d], upstream patches included, on the model's device. Must not be written to.
  virtual at::Tensor effective_weight(const std::string& name) = 0;
  virtual std::shared_ptr<Denoiser> with_weight_deltas(const std::vector<WeightDelta>& deltas,
                                                       double strength) = 0;
  // As patches that the host merges into its weights, after the patches that are there already.
  virtual std::shared_ptr<Denoiser> with_weight_maps(const std::vector<TextMap>& maps,
                                                     double strength) = 0;
  // The same edit made on the inputs of the entries while the model runs: for weights that cannot
  // be patched, and, with a gate, for prompts that it opens for only (null: all of them), the
  // others being read as they are, bit for bit. deltas: of weights that `maps` name, added to what
  // the weights make of the text before the map: x reads as W N x + up down x. No file of the
  // host's holds it.
  virtual std::shared_ptr<Denoiser> with_input_maps(
      const std::vector<TextMap>& maps, const std::vector<WeightDelta>& deltas, double strength,
      const std::shared_ptr<const TextGate>& gate) = 0;
  // Of edits with a gate: for which prompts one opens, [n] bool CPU; context: [n, T, d]. Undefined
  // where there is none, or where another edit acts on every prompt while the model runs.
  virtual at::Tensor acts_on(const at::Tensor& context) {
    (void)context;
    return {};
  }
  // Sigma of every training timestep, ascending, [1000] float32 CPU.
  virtual at::Tensor noise_levels() = 0;
  // [c, h, w] of the latent of a picture of that size in pixels. Throws where the model cannot draw
  // from a text alone (a refiner, an upscaler): asked before any work starts.
  virtual std::vector<int64_t> latent_shape(int64_t width, int64_t height) = 0;
  // Between the model's own latent scale and that of LATENT sockets and image decoders.
  virtual at::Tensor to_host_latent(const at::Tensor& latent) = 0;
  virtual at::Tensor from_host_latent(const at::Tensor& latent) = 0;
  // The clean latent, [n, c, h, w] float32, that the model (with its patches) sees in a noisy one.
  // `tap` may be null. With grad mode on, gradients flow to what the tap adds and to a text
  // context that requires them; never to the base weights, which are not written to either.
  virtual at::Tensor denoise(const DenoiseRequest& request, AttentionTap* tap) = 0;
  // Headless hosts only. on_step(done, total) is called after every step and may throw.
  virtual at::Tensor sample(const SamplingRequest& request,
                            const std::function<void(int64_t, int64_t)>& on_step) = 0;
};

inline WeightIdentity identity_of(Denoiser& model) {
  return {model.fingerprint(), model.weight_samples()};
}

// Host latents, as LATENT sockets carry them, to pictures and back.
class ImageDecoder {
 public:
  virtual ~ImageDecoder() = default;
  virtual at::Tensor decode(const at::Tensor& latent) = 0;  // [n, H, W, 3] float32 in 0..1
  virtual at::Tensor encode(const at::Tensor& images) = 0;  // the other way
};

struct Checkpoint {
  std::shared_ptr<Denoiser> denoiser;
  std::shared_ptr<TextEncoder> text_encoder;
  std::shared_ptr<ImageDecoder> image_decoder;
};

// What the headless graph runner needs for a workflow's built-in nodes.
class Application {
 public:
  virtual ~Application() = default;
  virtual std::string output_directory() = 0;
  virtual Checkpoint load_checkpoint(const std::string& name) = 0;
  virtual std::shared_ptr<Denoiser> load_lora(const std::shared_ptr<Denoiser>& model,
                                              const std::string& name, double strength) = 0;
};

}  // namespace lacuna
