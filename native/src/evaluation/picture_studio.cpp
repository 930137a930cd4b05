// SPDX-License-Identifier: Apache-2.0
#include "evaluation/picture_studio.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>

#include "lacuna/closed_form/refinement.h"
#include "lacuna/concepts/concept_prompts.h"
#include "lacuna/error.h"
#include "lacuna/evaluation/attack.h"
#include "lacuna/files/random_stream.h"
#include "lacuna/files/text.h"
#include "lacuna/training/attention_tap.h"

namespace lacuna {
namespace {

// Shares of the training timesteps at which pictures are looked at: from detail to layout.
constexpr double kLooks[] = {0.15, 0.3, 0.45, 0.6, 0.75, 0.9};
constexpr auto kLookCount = static_cast<int64_t>(std::size(kLooks));
constexpr int64_t kBackwardWork = 3;  // a forward and a backward pass, in forward passes

// Units of work, for the progress bar and the time left.
class Work {
 public:
  Work(Progress& progress, int64_t total)
      : progress_(progress), total_(total), start_(std::chrono::steady_clock::now()) {}

  void add(int64_t units, const std::string& what) {
    done_ += units;
    progress_.report(done_, total_);
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    const double left = seconds / static_cast<double>(done_) * static_cast<double>(total_ - done_);
    const auto minutes = static_cast<int64_t>(std::ceil(left / 60));
    progress_.status(what + (left > 90   ? ", about " + std::to_string(minutes) + " min left"
                             : left > 20 ? ", about a minute left"
                                         : ""));
  }

 private:
  Progress& progress_;
  int64_t total_;
  int64_t done_ = 0;
  std::chrono::steady_clock::time_point start_;
};

TextEmbedding join(const TextEmbedding& a, const TextEmbedding& b) {
  return {at::cat({a.context, b.context}),
          a.pooled.defined() ? at::cat({a.pooled, b.pooled}) : at::Tensor()};
}

at::Tensor rows_of(const std::vector<int64_t>& rows) {
  at::Tensor out = at::zeros({static_cast<int64_t>(rows.size())}, at::kLong);
  std::copy(rows.begin(), rows.end(), out.mutable_data_ptr<int64_t>());
  return out;
}

const std::string& judged_by(const EvaluationPrompt& prompt) {
  return prompt.question.empty() ? prompt.text : prompt.question;
}

// [window], 1 where the phrase's tokens stand in what the picture is judged by.
at::Tensor phrase_tokens(TextEncoder& encoder, const EvaluationPrompt& prompt) {
  at::Tensor tokens = at::zeros({encoder.window()}, at::kFloat);
  if (prompt.phrase.empty()) return tokens;
  const std::vector<int64_t> ids = encoder.tokenize(judged_by(prompt));
  const std::vector<int64_t> words =
      encoder.tokenize(prompt.question.empty() ? prompt.phrase : prompt.name);
  for (auto at = ids.begin();
       (at = std::search(at, ids.end(), words.begin() + 1, words.end() - 1)) != ids.end(); ++at) {
    for (size_t k = 0; k + 2 < words.size(); ++k) {
      const int64_t position = at - ids.begin() + static_cast<int64_t>(k);
      if (position < tokens.size(0)) tokens[position] = 1;
    }
  }
  return tokens;
}

// What a model makes of noisy pictures, under their own prompt and under the alternative.
struct Look {
  at::Tensor likelihood;  // [n] error of the alternative minus error of the own prompt
  at::Tensor error;       // [n] of the own prompt
  at::Tensor noise;       // [n, looks, c, h, w] predicted noise of the own prompt
  at::Tensor gap;         // [n] root mean square between both predictions
  at::Tensor attention;   // [n] mass on the phrase's tokens
};

// The whole run: embeddings of all prompts, and the pictures of the pairs in groups.
class Studio {
 public:
  Studio(const EvaluationInputs& inputs, const EvaluationOptions& options, Evaluation& evaluation,
         Progress& progress)
      : inputs_(inputs),
        options_(options),
        evaluation_(evaluation),
        progress_(progress),
        shape_(inputs.base.latent_shape(options.width, options.height)),
        levels_(inputs.base.noise_levels()),
        work_(progress, total_work()) {
    std::vector<std::string> texts;
    std::vector<std::string> questions;
    std::vector<std::string> alternatives;
    std::vector<at::Tensor> tokens;
    for (const EvaluationPrompt& prompt : evaluation.prompts) {
      texts.push_back(prompt.text);
      questions.push_back(judged_by(prompt));
      alternatives.push_back(prompt.alternative);
      tokens.push_back(phrase_tokens(inputs.encoder, prompt));
    }
    own_ = embed_in_batches(inputs.encoder, texts, progress);
    question_ = questions == texts ? own_ : embed_in_batches(inputs.encoder, questions, progress);
    alternative_ = embed_in_batches(inputs.encoder, alternatives, progress);
    negative_ = embed_in_batches(inputs.encoder, {""}, progress);
    tokens_ = at::stack(tokens);
    attack();
  }

  void run() {
    // Each model is used in one go: a host may have to merge an edit before the first pass.
    const at::Tensor before = draw(inputs_.base, own_, "Drawing before");
    const Look base_before = look(inputs_.base, before, "Looking at before");
    learn(before);
    const at::Tensor after = draw(inputs_.edited, attacked_, "Drawing after");
    const Look edited_before = look(inputs_.edited, before, "Looking at before");
    const at::Tensor kept = at::nan_to_num(after);
    evaluation_.broken = !at::isfinite(after).all().item<bool>();
    evaluation_.identical = before.equal(after);
    const Look base_after = look(inputs_.base, kept, "Looking at after");

    evaluation_.before = decode(before, "Decoding before");
    evaluation_.after = decode(kept, "Decoding after");
    const at::Tensor change = relative_change(before, after);
    const at::Tensor pixel_change =
        (evaluation_.after.to(at::kFloat) - evaluation_.before.to(at::kFloat))
            .div_(255)
            .square()
            .flatten(1)
            .mean(1)
            .sqrt();
    const at::Tensor shift =
        (edited_before.noise - base_before.noise).square().flatten(1).mean(1).sqrt();
    for (int64_t i = 0; i < count(); ++i) {
      const auto at = [&](const at::Tensor& values) { return values[i].item<double>(); };
      PicturePair& pair = evaluation_.pairs[static_cast<size_t>(i)];
      pair.likelihood_before = at(base_before.likelihood);
      pair.likelihood_after = at(base_after.likelihood);
      pair.likelihood_edited = at(edited_before.likelihood);
      pair.implausibility = at(base_after.error) / at(base_before.error);
      pair.latent_change = at(change);
      pair.pixel_change = at(pixel_change);
      if (evaluation_.prompts[pair.prompt].question.empty() &&
          !evaluation_.prompts[pair.prompt].phrase.empty()) {
        pair.attention_before = at(base_before.attention);
        pair.attention_after = at(edited_before.attention);
      }
      pair.noise_gap_before = at(base_before.gap);
      pair.noise_gap_after = at(edited_before.gap);
      pair.noise_shift = at(shift);
      judge(pair, i);
    }
    compare();
  }

 private:
  // Embeddings that attacks change. Emphasis is what the user asks of both models; an adversarial
  // embedding is made for the edited one.
  void attack() {
    attacked_ = own_;
    const bool any = std::any_of(evaluation_.prompts.begin(), evaluation_.prompts.end(),
                                 [](const auto& prompt) { return prompt.attack.has_value(); });
    if (!any) return;
    at::Tensor adversarial;
    own_.context = own_.context.clone();
    attacked_.context = own_.context.clone();
    for (size_t i = 0; i < evaluation_.prompts.size(); ++i) {
      const EvaluationPrompt& prompt = evaluation_.prompts[i];
      if (!prompt.attack) continue;
      if (prompt.attack == Attack::kAdversarial && !adversarial.defined()) {
        adversarial = adversarial_map(evaluation_.scan.forms);
      }
      const auto row = static_cast<int64_t>(i);
      const at::Tensor changed = attacked_context(*prompt.attack, own_.context[row], tokens_[row],
                                                  negative_.context[0], adversarial);
      attacked_.context[row].copy_(changed);
      if (prompt.attack == Attack::kEmphasis) own_.context[row].copy_(changed);
    }
  }

  // Embeddings that are trained to draw the pictures of before with the edited model.
  void learn(const at::Tensor& before) {
    for (size_t i = 0; i < evaluation_.prompts.size(); ++i) {
      const EvaluationPrompt& prompt = evaluation_.prompts[i];
      if (prompt.attack != Attack::kLearned) continue;
      const auto row = static_cast<int64_t>(i);
      const std::string what = "Training an embedding that calls '" + prompt.name + "' back";
      // A prompt's pictures stand side by side.
      const at::Tensor learned = learned_context(
          inputs_.edited, select(own_, rows_of({row})), tokens_[row],
          before.narrow(0, row * options_.images, options_.images),
          random_stream(options_.seed, prompt.text, "learned embedding"), [&](int64_t step) {
            progress_.check();
            if (step > 0) work_.add(kBackwardWork, what);
          });
      work_.add(kBackwardWork, what);
      attacked_.context[row].copy_(learned);
    }
  }

  int64_t count() const { return static_cast<int64_t>(evaluation_.pairs.size()); }
  int64_t total_work() const {
    const int64_t guided = options_.cfg != 1.0 ? 2 : 1;
    const auto learned = std::count_if(
        evaluation_.prompts.begin(), evaluation_.prompts.end(),
        [](const EvaluationPrompt& prompt) { return prompt.attack == Attack::kLearned; });
    return count() * (2 * guided * options_.steps + 3 * 2 * kLookCount + 2) +
           learned * kLearningSteps * kBackwardWork;
  }
  const EvaluationPrompt& prompt_of(int64_t pair) const {
    return evaluation_.prompts[evaluation_.pairs[static_cast<size_t>(pair)].prompt];
  }
  at::Generator stream(int64_t pair, const char* purpose) const {
    const int64_t image = evaluation_.pairs[static_cast<size_t>(pair)].image;
    return random_stream(options_.seed, prompt_of(pair).text + '\n' + std::to_string(image),
                         purpose);
  }
  at::Tensor rows(int64_t begin, int64_t n) const {
    std::vector<int64_t> prompts;
    for (int64_t i = begin; i < begin + n; ++i) {
      prompts.push_back(static_cast<int64_t>(evaluation_.pairs[static_cast<size_t>(i)].prompt));
    }
    return rows_of(prompts);
  }
  std::string progress_line(const char* what, int64_t pictures) const {
    return std::string(what) + ": picture " + std::to_string(pictures) + " of " +
           std::to_string(count());
  }

  // [pairs, c, h, w]
  at::Tensor draw(Denoiser& model, const TextEmbedding& text, const char* what) {
    std::vector<at::Tensor> latents;
    for (int64_t begin = 0; begin < count(); begin += options_.batch) {
      const int64_t n = std::min(options_.batch, count() - begin);
      LatentRequest request;
      std::vector<at::Tensor> noise;
      for (int64_t i = begin; i < begin + n; ++i) {
        noise.push_back(at::randn(shape_, stream(i, "evaluation"), at::TensorOptions(at::kFloat)));
      }
      request.noise = at::stack(noise);
      request.positive = select(text, rows(begin, n));
      request.negative = negative_;
      request.steps = options_.steps;
      request.cfg = options_.cfg;
      request.sampler = options_.sampler;
      const int64_t units = options_.cfg != 1.0 ? 2 * n : n;
      latents.push_back(sample_latents(model, request, [&](int64_t step) -> AttentionTap* {
        progress_.check();
        if (step > 0) work_.add(units, progress_line(what, begin + 1));
        return nullptr;
      }));
      work_.add(units, progress_line(what, begin + n));
    }
    return at::cat(latents);
  }

  Look look(Denoiser& model, const at::Tensor& latents, const char* what) {
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> likelihood, error, noise_seen, gap, attention;
    for (int64_t begin = 0; begin < count(); begin += options_.batch) {
      const int64_t n = std::min(options_.batch, count() - begin);
      const at::Tensor which = rows(begin, n);
      const at::Tensor clean = latents.narrow(0, begin, n);
      const TextEmbedding text = join(select(question_, which), select(alternative_, which));
      std::vector<at::Generator> streams;
      for (int64_t i = begin; i < begin + n; ++i) streams.push_back(stream(i, "looks"));
      at::Tensor difference = at::zeros({n}, at::kDouble);
      at::Tensor own_error = at::zeros({n}, at::kDouble);
      at::Tensor squared_gap = at::zeros({n}, at::kDouble);
      at::Tensor mass = at::zeros({n}, at::kDouble);
      std::vector<at::Tensor> predictions;
      for (const double share : kLooks) {
        progress_.check();
        const double sigma = sigma_at(levels_, share * static_cast<double>(levels_.size(0) - 1));
        std::vector<at::Tensor> drawn;
        for (at::Generator& generator : streams) {
          drawn.push_back(at::randn(shape_, generator, at::TensorOptions(at::kFloat)));
        }
        const at::Tensor noise = at::stack(drawn);
        const at::Tensor noisy = clean + sigma * noise;
        DenoiseRequest pass;
        pass.noisy = at::cat({noisy, noisy});
        pass.sigma = at::full({2 * n}, sigma, at::kFloat);
        pass.text = text;
        LoraTap tap(samples(which), text.context, shape_[1], shape_[2], progress_);
        const at::Tensor seen = model.denoise(pass, &tap);
        if (seen.sizes() != pass.noisy.sizes()) {
          throw Error("the model returned a latent of an unexpected shape");
        }
        const at::Tensor predicted = (pass.noisy - seen.to(at::kCPU, at::kFloat)) / sigma;
        const at::Tensor own = predicted.narrow(0, 0, n);
        const at::Tensor other = predicted.narrow(0, n, n);
        const auto mean_square = [](const at::Tensor& values) {
          return values.square().flatten(1).to(at::kDouble).mean(1);
        };
        const at::Tensor from_own = mean_square(own - noise);
        difference += mean_square(other - noise) - from_own;
        own_error += from_own;
        squared_gap += mean_square(own - other);
        predictions.push_back(own);
        mass += tap.losses().narrow(0, 0, n).to(at::kCPU, at::kDouble);
        work_.add(2 * n, progress_line(what, begin + n));
      }
      likelihood.push_back(difference / kLookCount);
      error.push_back(own_error / kLookCount);
      gap.push_back((squared_gap / kLookCount).sqrt());
      attention.push_back(mass / kLookCount);
      noise_seen.push_back(at::stack(predictions, 1));
    }
    return {at::cat(likelihood), at::cat(error), at::cat(noise_seen), at::cat(gap),
            at::cat(attention)};
  }

  // Own prompts with their phrase's tokens, then as many alternatives with none.
  std::vector<TapSample> samples(const at::Tensor& which) const {
    std::vector<TapSample> out;
    for (int64_t i = 0; i < which.size(0); ++i) {
      out.push_back({nullptr, tokens_[which[i].item<int64_t>()], {}});
    }
    for (int64_t i = 0; i < which.size(0); ++i)
      out.push_back({nullptr, at::zeros_like(tokens_[0]), {}});
    return out;
  }

  // [pairs, H, W, 3] uint8
  at::Tensor decode(const at::Tensor& latents, const char* what) {
    std::vector<at::Tensor> pictures;
    for (int64_t i = 0; i < count(); ++i) {
      progress_.check();
      const at::Tensor picture =
          inputs_.decoder.decode(inputs_.base.to_host_latent(latents.narrow(0, i, 1)))
              .detach()
              .to(at::kCPU, at::kFloat);
      pictures.push_back(at::nan_to_num(picture).clamp(0, 1).mul(255).round().to(at::kByte));
      work_.add(1, progress_line(what, i + 1));
    }
    return at::cat(pictures);
  }

  // Distance of two pictures over the mean distance of pictures of different prompts; [pairs].
  at::Tensor relative_change(const at::Tensor& before, const at::Tensor& after) const {
    const at::Tensor flat = before.flatten(1).to(at::kDouble);
    // Attacks draw more of the same: without them, so that every level has the same scale.
    std::vector<int64_t> lists;
    for (int64_t i = 0; i < count(); ++i) {
      const PromptList list = prompt_of(i).list;
      if (list != PromptList::kAttacks && list != PromptList::kFile) lists.push_back(i);
    }
    const at::Tensor ordinary = flat.index_select(0, rows_of(lists));
    const auto n = static_cast<double>(lists.size());
    // Twice the variance is the mean squared distance of two draws; one picture alone is compared
    // with its own content.
    const at::Tensor spread = n > 1 ? 2 * (ordinary - ordinary.mean(0)).square().sum() / (n - 1)
                                    : 2 * (ordinary - ordinary.mean()).square().sum();
    return ((after.flatten(1).to(at::kDouble) - flat).square().sum(1) / spread.clamp_min(1e-30))
        .sqrt();
  }

  // Cosines of the image encoder's embeddings, rows of unit length.
  at::Tensor embed_images(const at::Tensor& pictures) {
    std::vector<at::Tensor> rows;
    for (int64_t begin = 0; begin < count(); begin += options_.batch) {
      progress_.check();
      progress_.status(progress_line("Comparing", begin + 1));
      const int64_t n = std::min(options_.batch, count() - begin);
      rows.push_back(inputs_.image_encoder->embed(pictures.narrow(0, begin, n).to(at::kFloat) / 255)
                         .detach()
                         .to(at::kCPU, at::kDouble));
    }
    return unit_rows(at::cat(rows));
  }

  static at::Tensor unit_rows(const at::Tensor& rows) {
    return rows / rows.norm(2, {1}, /*keepdim=*/true).clamp_min(1e-30);
  }

  void compare() {
    if (inputs_.image_encoder == nullptr) return;
    evaluation_.compares_images = true;
    const at::Tensor before = embed_images(evaluation_.before);
    const at::Tensor after = embed_images(evaluation_.after);
    const at::Tensor both = (before * after).sum(1);
    at::Tensor text;
    // Encoders that were trained together have the same width; SD1.x has no pooled embedding.
    if (question_.pooled.defined() && question_.pooled.size(1) == before.size(1)) {
      evaluation_.compares_texts = true;
      text =
          unit_rows(question_.pooled.to(at::kCPU, at::kDouble)).index_select(0, rows(0, count()));
    }
    for (int64_t i = 0; i < count(); ++i) {
      PicturePair& pair = evaluation_.pairs[static_cast<size_t>(i)];
      pair.image_similarity = both[i].item<double>();
      if (!text.defined()) continue;
      pair.text_similarity_before = (before[i] * text[i]).sum().item<double>();
      pair.text_similarity_after = (after[i] * text[i]).sum().item<double>();
    }
  }

  void judge(PicturePair& pair, int64_t index) {
    pair.seen_before = pair.likelihood_before > 0;
    pair.seen_after = pair.likelihood_after > 0;
    const EvaluationPrompt& prompt = evaluation_.prompts[pair.prompt];
    if (inputs_.detector == nullptr || prompt.name.empty()) return;
    progress_.check();
    const at::Tensor both = at::stack({evaluation_.before[index], evaluation_.after[index]});
    try {
      const at::Tensor scores = inputs_.detector->score(both.to(at::kFloat) / 255, {prompt.name})
                                    .detach()
                                    .to(at::kCPU, at::kDouble);
      if (scores.dim() != 2 || scores.size(0) != 2 || scores.size(1) != 1) {
        throw Error("it returned scores of an unexpected shape");
      }
      if (((scores < 0) | (scores > 1)).any().item<bool>()) {
        throw Error("it returned a score that does not lie between 0 and 1");
      }
      pair.score_before = scores[0][0].item<double>();
      pair.score_after = scores[1][0].item<double>();
    } catch (const Error& e) {
      pair.detector_error = e.what();
      return;
    }
    if (std::isnan(pair.score_before) || std::isnan(pair.score_after)) return;
    pair.seen_before = pair.score_before >= options_.detector_threshold;
    pair.seen_after = pair.score_after >= options_.detector_threshold;
  }

  const EvaluationInputs& inputs_;
  const EvaluationOptions& options_;
  Evaluation& evaluation_;
  Progress& progress_;
  std::vector<int64_t> shape_;
  at::Tensor levels_;
  Work work_;
  TextEmbedding own_;       // what the base model draws
  TextEmbedding attacked_;  // what the edited model draws: the same but for attacks on embeddings
  TextEmbedding question_;
  TextEmbedding alternative_;
  TextEmbedding negative_;
  at::Tensor tokens_;  // [prompts, window]
};

}  // namespace

void draw_pairs(const EvaluationInputs& inputs, const EvaluationOptions& options,
                Evaluation& evaluation, Progress& progress) {
  Studio(inputs, options, evaluation, progress).run();
}

}  // namespace lacuna
