// SPDX-License-Identifier: Apache-2.0
// LoRA training as a whole on a small differentiable denoiser: what it learns, that it depends on
// nothing but the concept, and that no way out leaves anything behind.
#include "lacuna/training/lora_trainer.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

#include <nlohmann/json.hpp>

#include "lacuna/closed_form/text_entry.h"
#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/error.h"
#include "lacuna/training/adam_w.h"
#include "lacuna/training/concept_images.h"
#include "lacuna/training/latent_sampler.h"
#include "support/fake_host.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::CountingProgress;
using testing::FakeDenoiser;
using testing::FakeTextEncoder;
using testing::message_of;
using testing::relative_difference;

constexpr int64_t kWidth = 16;

Concept concept_of(const std::string& target, std::vector<std::string> synonyms = {},
                   ConceptKind kind = ConceptKind::kObject) {
  Concept item;
  item.target = target;
  item.anchor = "fog";
  item.synonyms = std::move(synonyms);
  item.kind = kind;
  item.templates = 5;
  return item;
}

LoraOptions small_options(LoraGradient gradient = LoraGradient::kFull) {
  LoraOptions options;
  options.gradient = gradient;
  options.steps = 4;
  options.learning_rate = 0.02;
  options.images = 3;
  options.sampling_steps = 4;
  options.cfg = 3.0;
  options.width = 64;
  options.height = 64;
  options.evaluations = 3;
  options.captures = 3;
  return options;
}

// Records what the host is shown, and can spoil it.
class WatchedDenoiser final : public FakeDenoiser {
 public:
  using FakeDenoiser::FakeDenoiser;
  at::Tensor denoise(const DenoiseRequest& request, AttentionTap* tap) override {
    (request.attention_only ? training : drawing).push_back(request);
    DenoiseRequest pass = request;
    if (request.attention_only && ++attention_passes > poison_after) {
      pass.noisy = pass.noisy.clone();
      pass.noisy.narrow(0, pass.noisy.size(0) - 1, 1).fill_(NAN);
    }
    if (throw_at >= 0 && ++passes > throw_at) throw std::runtime_error("out of memory");
    grad_modes.push_back(at::GradMode::is_enabled());
    return FakeDenoiser::denoise(pass, tap);
  }
  std::vector<DenoiseRequest> drawing, training;
  std::vector<bool> grad_modes;
  int64_t attention_passes = 0;
  int64_t poison_after = 1'000'000;
  int64_t passes = 0;
  int64_t throw_at = -1;
};

class LoraTrainerTest : public testing::DeviceTest {
 protected:
  std::vector<TrainedConcept> train(const std::vector<Concept>& concepts,
                                    const LoraOptions& options) {
    return train(*model_, concepts, options);
  }
  std::vector<TrainedConcept> train(Denoiser& model, const std::vector<Concept>& concepts,
                                    const LoraOptions& options) {
    std::vector<TrainedConcept> done;
    LoraTraining training{.model = model, .encoder = encoder_};
    training.refinement = refinement_.get();
    training.images = images_;
    train_loras(training, concepts, options, progress_,
                [&](TrainedConcept one) { done.push_back(std::move(one)); });
    return done;
  }
  std::string refusal(const LoraOptions& options) {
    return message_of([&] { train({concept_of("cat")}, options); });
  }
  void use_double() {
    for (auto& [name, weight] : model_->weights_) weight = weight.to(at::kDouble);
  }
  // Largest relative difference over all pairs; the products decide, not their factors.
  static double difference(const ConceptLora& a, const ConceptLora& b) {
    double worst = 0.0;
    EXPECT_EQ(a.pairs.size(), b.pairs.size());
    for (const auto& [name, pair] : a.pairs) {
      const LoraPair& other = b.pairs.at(name);
      worst = std::max(worst, (pair.up - other.up).abs().max().item<double>());
      worst = std::max(worst, (pair.down - other.down).abs().max().item<double>());
    }
    return worst;
  }

  std::shared_ptr<FakeDenoiser> model_ = std::make_shared<FakeDenoiser>(3, kWidth, device());
  FakeTextEncoder encoder_{kWidth, device()};
  std::unique_ptr<Refinement> refinement_;
  TrainingImages images_;
  CountingProgress progress_;
};
INSTANTIATE_TEST_SUITE_P(Devices, LoraTrainerTest, ::testing::ValuesIn(testing::devices()));

TEST_P(LoraTrainerTest, BothGradientsLowerTheTrueObjective) {
  for (const LoraGradient gradient : {LoraGradient::kFull, LoraGradient::kCached}) {
    for (const TokenSet tokens : {TokenSet::kPhrase, TokenSet::kPhraseAndPadding}) {
      LoraOptions options = small_options(gradient);
      options.steps = 40;
      options.tokens = tokens;
      const auto done = train({concept_of("black cat", {"tabby"}), concept_of("owl")}, options);
      ASSERT_EQ(done.size(), 2u);
      for (const TrainedConcept& one : done) {
        // With the padding, nearly all positions count: attention has few places left to go.
        const double factor = tokens == TokenSet::kPhrase ? 0.9 : 1.0;
        EXPECT_LT(one.mass_after, factor * one.mass_before)
            << to_string(gradient) << ' ' << to_string(tokens);
        EXPECT_EQ(one.losses.size(), 40u);
        const auto how = nlohmann::json::parse(one.lora->training);
        EXPECT_EQ(how["mass_after"].get<double>(), one.mass_after);
        EXPECT_EQ(how["last_loss"].get<double>(), one.losses.back());
        EXPECT_EQ(how["steps"], 40);
      }
    }
  }
}

TEST_P(LoraTrainerTest, CachedAndFullMeasureTheSameObjective) {
  const auto full = train({concept_of("owl")}, small_options());
  const auto cached = train({concept_of("owl")}, small_options(LoraGradient::kCached));
  EXPECT_EQ(full[0].mass_before, cached[0].mass_before);
  EXPECT_GT(difference(*full[0].lora, *cached[0].lora), 1e-4);
}

// The loss after training is that of the model with the LoRA merged into its weights.
TEST_P(LoraTrainerTest, TheLoraDoesInTheWeightsWhatItDidInTraining) {
  LoraOptions options = small_options();
  options.steps = 20;
  const TrainedConcept done = train({concept_of("owl")}, options)[0];
  std::vector<WeightDelta> deltas;
  for (const TextEntry& projection : model_->projections_) {
    const LoraPair& pair = done.lora->pairs.at(projection.lora_name);
    deltas.push_back({projection.name, pair.up.to(device()), pair.down.to(device())});
  }
  const auto merged = model_->with_weight_deltas(deltas, 1.0);
  // The same pictures for both: those of the model without LoRA.
  SilentProgress silent;
  const ConceptPrompts prompts = encode_prompts(encoder_, concept_of("owl"), silent);
  const TextEmbedding negative{encoder_.encode({""}).cpu(), {}};
  images_ = draw_concept(*model_, prompts, negative, options, "object\nowl", true, silent,
                         [](int64_t) {});
  options.learning_rate = 1e-9;
  const TrainedConcept again = train(*merged, {concept_of("owl")}, options)[0];
  EXPECT_NEAR(again.mass_before, done.mass_after, 1e-4 * done.mass_after);
  EXPECT_GT(std::abs(done.mass_before - done.mass_after), 1e-2 * done.mass_after);
}

TEST_P(LoraTrainerTest, N29_AConceptIsTheSameAloneAndInAList) {
  use_double();
  std::vector<Concept> list{concept_of("dog"), concept_of("black cat", {"tabby"}),
                            concept_of("van gogh", {}, ConceptKind::kStyle), concept_of("owl"),
                            concept_of("red barn")};
  for (const LoraGradient gradient : {LoraGradient::kFull, LoraGradient::kCached}) {
    const LoraOptions options = small_options(gradient);
    const auto together = train(list, options);
    ASSERT_EQ(together.size(), list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      EXPECT_EQ(together[i].lora->item, list[i]);
      const auto alone = train({list[i]}, options);
      // float64 passes; parameters are rounded to float32.
      EXPECT_LT(difference(*together[i].lora, *alone[0].lora), 1e-5) << list[i].target;
      EXPECT_NEAR(together[i].mass_after, alone[0].mass_after, 1e-6 * alone[0].mass_after);
    }
    EXPECT_GT(difference(*together[0].lora, *together[1].lora), 0.1);
  }
}

TEST_P(LoraTrainerTest, N29_SameSeedSameLoraOtherSeedOther) {
  LoraOptions options = small_options();
  at::manual_seed(1);
  const auto first = train({concept_of("owl")}, options);
  at::manual_seed(2);
  const auto second = train({concept_of("owl")}, options);
  if (device().is_cpu()) {
    EXPECT_EQ(difference(*first[0].lora, *second[0].lora), 0.0);
  }
  EXPECT_LT(difference(*first[0].lora, *second[0].lora), 1e-3);
  options.seed = 1;
  EXPECT_GT(difference(*first[0].lora, *train({concept_of("owl")}, options)[0].lora), 0.1);
}

TEST_P(LoraTrainerTest, N23_HasTheParameterCountOfThePaper) {
  // The sixteen cross-attention layers of SD1.4.
  FakeDenoiser model(16, 768, device());
  const int64_t rows[] = {320,  320,  640, 640, 1280, 1280, 1280, 1280,
                          1280, 1280, 640, 640, 640,  320,  320,  320};
  for (size_t i = 0; i < model.projections_.size(); ++i) {
    model.weights_[model.projections_[i].name] = 0.03 * at::randn({rows[i / 2], 768}).to(device());
  }
  FakeTextEncoder wide(768, device());
  LoraOptions options = small_options();
  options.images = options.steps = options.sampling_steps = options.evaluations = 1;
  Concept item = concept_of("cat");
  item.templates = 1;
  int64_t count = 0;
  train_loras({.model = model, .encoder = wide}, {item}, options, progress_,
              [&](const TrainedConcept& done) {
                for (const auto& [name, pair] : done.lora->pairs) {
                  count += pair.up.numel() + pair.down.numel();
                }
              });
  EXPECT_EQ(count, 49'536);
}

TEST_P(LoraTrainerTest, N25_OnlyTheLastValuePairIsNeverTouched) {
  LoraOptions options = small_options();
  options.steps = 1;
  const auto one = train({concept_of("owl")}, options);
  options.steps = 3;
  const auto three = train({concept_of("owl")}, options);
  for (const TextEntry& projection : model_->projections_) {
    const bool last = projection.name == "layer.2.to_v.weight" || projection.name == "layer.2.to_v";
    const LoraPair& early = one[0].lora->pairs.at(projection.lora_name);
    const LoraPair& late = three[0].lora->pairs.at(projection.lora_name);
    EXPECT_EQ(early.up.abs().max().item<double>() == 0.0, last) << projection.name;
    EXPECT_EQ(at::equal(early.down, late.down), last) << projection.name;
  }
}

TEST_P(LoraTrainerTest, CachedTrainsKeysOnlyUnlessValuesAreSuppressed) {
  LoraOptions options = small_options(LoraGradient::kCached);
  options.steps = 30;
  const auto keys = train({concept_of("owl")}, options);
  options.suppress_value = 1.0;
  const auto both = train({concept_of("owl")}, options);
  for (const TextEntry& projection : model_->projections_) {
    const at::Tensor without = keys[0].lora->pairs.at(projection.lora_name).up;
    const LoraPair& with = both[0].lora->pairs.at(projection.lora_name);
    if (projection.role == EntryRole::kKey) {
      EXPECT_GT(without.abs().max().item<double>(), 0.0);
    } else {
      EXPECT_EQ(without.abs().max().item<double>(), 0.0);
      EXPECT_GT(with.up.abs().max().item<double>(), 0.0);
    }
  }
  EXPECT_LT(both[0].mass_after, both[0].mass_before);
}

TEST_P(LoraTrainerTest, N28_TheBaseModelIsFrozen) {
  std::map<std::string, at::Tensor> before;
  for (const auto& [name, weight] : model_->weights_) before[name] = weight.clone();
  for (const LoraGradient gradient : {LoraGradient::kFull, LoraGradient::kCached}) {
    const auto done = train({concept_of("owl")}, small_options(gradient));
    for (const auto& [name, weight] : model_->weights_) {
      EXPECT_TRUE(at::equal(weight, before[name]));
      EXPECT_FALSE(weight.requires_grad());
      EXPECT_FALSE(weight.grad().defined());
    }
    for (const auto& [name, pair] : done[0].lora->pairs) {
      EXPECT_FALSE(pair.up.requires_grad() || pair.down.requires_grad());
      EXPECT_EQ(pair.up.scalar_type(), at::kFloat);
      EXPECT_TRUE(pair.up.is_cpu());
    }
  }
}

TEST_P(LoraTrainerTest, OnlyTrainingPassesBuildAGraph) {
  WatchedDenoiser model(3, kWidth, device());
  const LoraOptions options = small_options();
  train(model, {concept_of("owl")}, options);
  EXPECT_EQ(std::count(model.grad_modes.begin(), model.grad_modes.end(), true), options.steps);
  WatchedDenoiser cached(3, kWidth, device());
  train(cached, {concept_of("owl")}, small_options(LoraGradient::kCached));
  EXPECT_EQ(std::count(cached.grad_modes.begin(), cached.grad_modes.end(), true), 0);
}

TEST_P(LoraTrainerTest, TrainsOnTheFocalTimestepsWithTheConceptsPrompts) {
  WatchedDenoiser model(3, kWidth, device());
  LoraOptions options = small_options();
  options.steps = 40;
  options.focal = {.enabled = true, .t1 = 300, .t2 = 320, .sharpness = 1};
  train(model, {concept_of("owl")}, options);
  const at::Tensor levels = model.noise_levels();
  EXPECT_EQ(model.training.size(), 40u + 2 * 3);
  SilentProgress silent;
  const at::Tensor context = encode_prompts(encoder_, concept_of("owl"), silent).embedding.context;
  for (const DenoiseRequest& pass : model.training) {
    EXPECT_GE(pass.sigma[0].item<double>(), levels[280].item<double>());
    EXPECT_LE(pass.sigma[0].item<double>(), levels[340].item<double>());
    EXPECT_EQ((context - pass.text.context).abs().sum({1, 2}).min().item<double>(), 0.0);
  }
}

// Mode (c) of the fusion: each concept on top of its own edit, prompts read as with the anchor.
TEST_P(LoraTrainerTest, TrainsOnTopOfTheConceptsOwnRefinement) {
  refinement_ = std::make_unique<Refinement>();
  refinement_->options.method = "mace";
  refinement_->encoder_fingerprint = encoder_.fingerprint();
  WatchedDenoiser model(3, kWidth, device());
  const std::vector<Concept> list{concept_of("cat"), concept_of("owl", {"barn owl"})};
  const auto done = train(model, list, small_options());

  SilentProgress silent;
  for (size_t i = 0; i < list.size(); ++i) {
    const Concept& item = list[i];
    ConceptSet alone{{item}, {}, GeneralPriorSize::kNone};
    const RefinementProblem problem =
        collect_problem(encoder_, alone, refinement_->options, nullptr, silent);
    const ConceptPrompts prompts = encode_prompts(encoder_, item, silent);
    const at::Tensor e = prompts.embedding.context.to(at::kDouble);
    const at::Tensor rows = e.flatten(0, 1);
    const ConceptLora& lora = *done[i].lora;
    // Means over the prompts of all phrases, summed in float64 and stored as float32.
    const auto n = static_cast<double>(e.size(0));
    const auto phrase_count = static_cast<double>(phrases(item).size());
    const TextStatistics& sums = problem.concepts;
    EXPECT_LT(relative_difference(lora.prompt_gram, at::matmul(rows.t(), rows) / n), 6e-8);
    EXPECT_LT(relative_difference(lora.refinement_gram, (sums.edited + sums.kept) / phrase_count),
              6e-8);
    EXPECT_LT(relative_difference(lora.refinement_shift, sums.shift / phrase_count), 6e-8);
    for (const at::Tensor& statistic :
         {lora.prompt_gram, lora.refinement_gram, lora.refinement_shift}) {
      EXPECT_EQ(statistic.scalar_type(), at::kFloat);
    }
    // In training the host reads the anchor's embeddings at the edited positions and the prompt's
    // own elsewhere; it draws with the prompt as it is.
    std::vector<at::Tensor> read;
    int64_t prompt = 0;
    for (const std::string& phrase : phrases(item)) {
      for (const std::string_view text :
           prompt_templates(item.kind).first(static_cast<size_t>(item.templates))) {
        const std::string twin = fill_template(text, item.anchor);
        const at::Tensor anchor = encoder_.encode({twin})[0];
        const TokenAlignment pairs = align_tokens(encoder_.tokenize(fill_template(text, phrase)),
                                                  encoder_.tokenize(twin), encoder_.window());
        at::Tensor context = prompts.embedding.context[prompt++].clone();
        for (size_t k = 0; k < pairs.target.size(); ++k) {
          context[pairs.target[k]].copy_(anchor[pairs.anchor[k]]);
        }
        read.push_back(context);
      }
    }
    const at::Tensor expected = at::stack(read);
    // The statistics say the same: C - A = mean of (g - f) f^T over all positions.
    const at::Tensor moved = (expected.to(at::kDouble) - e).flatten(0, 1);
    EXPECT_LT(relative_difference(lora.refinement_shift, at::matmul(moved.t(), rows) / n), 1e-6);
    const auto distance = [&](const at::Tensor& contexts, const at::Tensor& shown) {
      return (contexts - shown).abs().amax({1, 2}).min().item<double>();
    };
    for (const DenoiseRequest& pass : model.training) {
      EXPECT_LT(distance(expected, pass.text.context[static_cast<int64_t>(i)]), 1e-6);
    }
    const at::Tensor drawn = model.drawing[i * 4].text.context[0];
    EXPECT_EQ(distance(prompts.embedding.context, drawn), 0.0);
    EXPECT_GT(distance(expected, drawn), 1e-3);
  }
  refinement_.reset();
  const auto plain = train(list, small_options());
  EXPECT_FALSE(plain[0].lora->refinement_shift.defined());
  EXPECT_FALSE(plain[0].lora->refinement_gram.defined());
  EXPECT_GT(difference(*plain[0].lora, *done[0].lora), 1e-4);
}

TEST_P(LoraTrainerTest, StylesAndMaskNoneTrainOnTheWholePicture) {
  // A mask that leaves a corner only must show in the result.
  LoraOptions options = small_options();
  const auto attention = train({concept_of("owl")}, options);
  options.mask = MaskSource::kNone;
  const auto none = train({concept_of("owl")}, options);
  EXPECT_GT(none[0].mass_before, attention[0].mass_before);
  const Concept style = concept_of("cubism", {}, ConceptKind::kStyle);
  EXPECT_EQ(train({style}, options)[0].mass_before, train({style}, small_options())[0].mass_before);
}

TEST_P(LoraTrainerTest, UsersPicturesAndMasksReplaceDrawing) {
  WatchedDenoiser model(3, kWidth, device());
  images_.latents = at::randn({2, 4, 8, 8});
  images_.masks = at::zeros({2, 64, 64});
  images_.masks.narrow(1, 0, 32).fill_(1);
  const auto half = train(model, {concept_of("owl")}, small_options());
  EXPECT_TRUE(model.drawing.empty());
  images_.masks.fill_(1);
  const auto whole = train(model, {concept_of("owl")}, small_options());
  images_.masks = at::Tensor();
  LoraOptions none = small_options();
  none.mask = MaskSource::kNone;
  EXPECT_NEAR(train(model, {concept_of("owl")}, none)[0].mass_before, whole[0].mass_before, 1e-6);
  EXPECT_LT(half[0].mass_before, 0.95 * whole[0].mass_before);
  // Without masks, the model's attention to the given pictures decides.
  EXPECT_EQ(train(model, {concept_of("owl")}, small_options()).size(), 1u);

  EXPECT_NE(
      message_of([&] { train({concept_of("owl"), concept_of("cat")}, none); }).find("one concept"),
      std::string::npos);
  images_.masks = at::zeros({2, 64, 64});
  images_.masks[0].fill_(1);
  EXPECT_NE(refusal(none).find("mask 2 is empty"), std::string::npos);
  images_.masks = at::ones({3, 64, 64});
  EXPECT_NE(refusal(none).find("one mask for each"), std::string::npos);
  images_ = {at::zeros({0, 4, 8, 8}), {}};
  EXPECT_NE(refusal(none).find("no pictures"), std::string::npos);
}

TEST_P(LoraTrainerTest, RefusesBadOptionsBeforeAnyWork) {
  const auto refuse = [&](const std::function<void(LoraOptions&)>& spoil,
                          const std::string& expected) {
    LoraOptions options = small_options();
    spoil(options);
    EXPECT_NE(refusal(options).find(expected), std::string::npos) << refusal(options);
  };
  refuse([](LoraOptions& o) { o.rank = 9; }, "rank 9 is above the width of layer 'layer.0' (8)");
  refuse([](LoraOptions& o) { o.rank = 0; }, "rank");
  refuse([](LoraOptions& o) { o.width = 60; }, "multiples of 8");
  refuse([](LoraOptions& o) { o.images = 0; }, "images");
  refuse([](LoraOptions& o) { o.steps = 0; }, "steps");
  refuse([](LoraOptions& o) { o.learning_rate = NAN; }, "learning_rate");
  refuse([](LoraOptions& o) { o.focal.t2 = 100; }, "focal");
  refuse([](LoraOptions& o) { o.batch = 0; }, "batch");
  refinement_ = std::make_unique<Refinement>();
  refinement_->encoder_fingerprint = "other";
  EXPECT_NE(refusal(small_options()).find("another text encoder"), std::string::npos);
  refinement_->encoder_fingerprint = encoder_.fingerprint();
  refinement_->matrices = EditedMatrices::kValueOnly;
  EXPECT_NE(refusal(small_options()).find("values only"), std::string::npos);
  refinement_->matrices = EditedMatrices::kKeyAndValue;
  refinement_->options.adversarial_rounds = 1;
  EXPECT_NE(refusal(small_options()).find("adversarial rounds"), std::string::npos);
  EXPECT_EQ(encoder_.encoded_prompts, 0);
}

TEST_P(LoraTrainerTest, ANanLossNamesTheConceptAndKeepsTheFinished) {
  for (const LoraGradient gradient : {LoraGradient::kFull, LoraGradient::kCached}) {
    WatchedDenoiser model(3, kWidth, device());
    LoraOptions options = small_options(gradient);
    options.batch = 2;
    // The last concept of the second pair.
    model.poison_after = gradient == LoraGradient::kFull ? 3 + 4 + 3 + 5 : 3 + 6 + 3 + 4;
    std::vector<std::string> done;
    const std::string message = message_of([&] {
      train_loras({.model = model, .encoder = encoder_},
                  {concept_of("dog"), concept_of("owl"), concept_of("cat"), concept_of("barn")},
                  options, progress_,
                  [&](const TrainedConcept& one) { done.push_back(one.lora->item.target); });
    });
    EXPECT_NE(message.find("'barn'"), std::string::npos) << message;
    EXPECT_NE(message.find("NaN"), std::string::npos);
    EXPECT_EQ(done, (std::vector<std::string>{"dog", "owl"}));
  }
  encoder_.broken = true;
  EXPECT_NE(refusal(small_options()).find("'cat'"), std::string::npos);
}

// Modes are thread-local: whatever the caller's are, training works in them and leaves them alone.
TEST_P(LoraTrainerTest, CancelAndFailureAnywhereRestoreTheModesAndTheNextRunIsRight) {
  for (const LoraGradient gradient : {LoraGradient::kFull, LoraGradient::kCached}) {
    const std::vector<Concept> list{concept_of("owl"), concept_of("cat")};
    const LoraOptions options = small_options(gradient);
    CountingProgress counter;
    const LoraTraining training{.model = *model_, .encoder = encoder_};
    std::vector<TrainedConcept> expected;
    const auto keep = [&](TrainedConcept one) { expected.push_back(std::move(one)); };
    train_loras(training, list, options, counter, keep);
    std::map<std::string, at::Tensor> before;
    for (const auto& [name, weight] : model_->weights_) before[name] = weight.clone();

    const auto attempt = [&](Denoiser& model, int64_t cancel_at) {
      CountingProgress progress;
      progress.cancel_at = cancel_at;
      train_loras({.model = model, .encoder = encoder_}, list, options, progress,
                  [](const TrainedConcept&) {});
    };
    int kind = 0;
    for (int64_t at = 1; at <= counter.checks; at += 1 + counter.checks / 24, ++kind) {
      const bool inference = kind % 3 == 0, grad = kind % 3 == 1;
      const c10::InferenceMode outer_inference(inference);
      const at::AutoGradMode outer_grad(grad);
      EXPECT_THROW(attempt(*model_, at), testing::Cancelled) << at;
      EXPECT_EQ(c10::InferenceMode::is_enabled(), inference);
      EXPECT_EQ(at::GradMode::is_enabled(), grad);
    }
    EXPECT_GT(kind, 12);
    for (const int64_t at : {0, 3, 9}) {
      WatchedDenoiser failing(3, kWidth, device());
      failing.throw_at = at;
      const at::NoGradGuard no_grad;
      EXPECT_THROW(attempt(failing, -1), std::runtime_error);
      EXPECT_FALSE(at::GradMode::is_enabled());
    }
    for (const auto& [name, weight] : model_->weights_) {
      EXPECT_TRUE(at::equal(weight, before[name]));
    }
    const auto again = train(list, options);
    EXPECT_LT(difference(*again[0].lora, *expected[0].lora), device().is_cpu() ? 1e-30 : 1e-3);
  }
}

TEST_P(LoraTrainerTest, WorksUnderInferenceModeWithAModelMadeThere) {
  const auto expected = train({concept_of("owl")}, small_options());
  const c10::InferenceMode inference;
  FakeDenoiser model(3, kWidth, device());
  ASSERT_TRUE(model.weights_.begin()->second.is_inference());
  for (const LoraGradient gradient : {LoraGradient::kFull, LoraGradient::kCached}) {
    const auto done = train(model, {concept_of("owl")}, small_options(gradient));
    EXPECT_TRUE(c10::InferenceMode::is_enabled());
    if (gradient == LoraGradient::kFull) {
      EXPECT_LT(difference(*done[0].lora, *expected[0].lora), device().is_cpu() ? 1e-30 : 1e-3);
    }
  }
}

TEST_P(LoraTrainerTest, ReportsEveryStepSaysWhatItDoesAndShowsPictures) {
  struct Watcher final : CountingProgress {
    void status(const std::string& line) override { lines.push_back(line); }
    void preview(const at::Tensor& image) override { previews.push_back(image); }
    std::vector<std::string> lines;
    std::vector<at::Tensor> previews;
  } watcher;
  testing::FakeImageDecoder decoder;
  LoraTraining training{.model = *model_, .encoder = encoder_, .decoder = &decoder};
  at::Tensor pictures;
  const LoraOptions options = small_options();
  train_loras(training, {concept_of("owl"), concept_of("cat")}, options, watcher,
              [&](const TrainedConcept& done) { pictures = done.pictures; });
  EXPECT_EQ(watcher.last_done, watcher.last_total);
  EXPECT_GE(watcher.reports, options.steps + 2 * options.sampling_steps);
  const auto said = [&](const std::string& part) {
    return std::any_of(watcher.lines.begin(), watcher.lines.end(), [&](const std::string& line) {
      return line.find(part) != std::string::npos;
    });
  };
  EXPECT_TRUE(said("owl: drawing pictures, "));
  EXPECT_TRUE(said("owl and 1 more: step 4 of 4, loss "));
  EXPECT_TRUE(said(" left"));
  ASSERT_EQ(watcher.previews.size(), 2u);
  EXPECT_EQ(watcher.previews[0].dim(), 3);
  EXPECT_EQ(watcher.previews[0].size(2), 3);
  EXPECT_EQ(pictures.sizes(), at::IntArrayRef({3, 8, 8, 3}));  // the fake decoder's size
  EXPECT_GE(pictures.min().item<double>(), 0.0);
  EXPECT_LE(pictures.max().item<double>(), 1.0);
}

TEST_P(LoraTrainerTest, TheRecipeTellsWhatMatters) {
  const std::string base = recipe(small_options(), nullptr, {});
  LoraOptions options = small_options();
  options.batch = 1;
  EXPECT_EQ(recipe(options, nullptr, {}), base);
  options.refresh = 5;  // full does not read it
  EXPECT_EQ(recipe(options, nullptr, {}), base);
  options = small_options();
  options.seed = 3;
  EXPECT_NE(recipe(options, nullptr, {}), base);
  const Refinement refinement;
  EXPECT_NE(recipe(small_options(), &refinement, {}), base);
  TrainingImages images{at::randn({1, 4, 8, 8}), {}};
  const std::string with_images = recipe(small_options(), nullptr, images);
  EXPECT_NE(with_images, base);
  images.latents[0][0][0][0] += 1;
  EXPECT_NE(recipe(small_options(), nullptr, images), with_images);
  const auto done = train({concept_of("owl")}, small_options());
  EXPECT_EQ(recipe_of(*done[0].lora), base);
  EXPECT_EQ(recipe_of(ConceptLora{}), "");
}

TEST(ConceptPromptsTest, MarksThePhraseWhereverItStands) {
  FakeTextEncoder encoder(8);
  SilentProgress silent;
  Concept item = concept_of("purple heron", {"tabby"});
  item.templates = 30;
  const ConceptPrompts prompts = encode_prompts(encoder, item, silent);
  ASSERT_EQ(prompts.texts.size(), 60u);
  const auto word = [&](const std::string& text) { return encoder.tokenize(text).at(1); };
  for (int64_t i = 0; i < 60; ++i) {
    const std::vector<int64_t> ids = encoder.tokenize(prompts.texts[static_cast<size_t>(i)]);
    for (int64_t t = 0; t < 77; ++t) {
      const auto at = static_cast<size_t>(t);
      const bool in_phrase =
          at < ids.size() && (i < 30 ? ids[at] == word("purple") || ids[at] == word("heron")
                                     : ids[at] == word("tabby"));
      EXPECT_EQ(prompts.phrase[i][t].item<float>(), in_phrase ? 1.0f : 0.0f)
          << prompts.texts[static_cast<size_t>(i)] << " position " << t;
      EXPECT_EQ(prompts.padding[i][t].item<float>(), at + 1 >= ids.size() ? 1.0f : 0.0f);
    }
  }
  const at::Tensor both = prompts.tokens(TokenSet::kPhraseAndPadding);
  EXPECT_TRUE(at::equal(both, prompts.phrase + prompts.padding));
  EXPECT_TRUE(at::equal(prompts.tokens(TokenSet::kPhrase), prompts.phrase));
  // "a photo of photo": the word of the template counts, too.
  const ConceptPrompts twice = encode_prompts(encoder, concept_of("photo"), silent);
  EXPECT_EQ(twice.phrase[0].sum().item<float>(), 2.0f);
  EXPECT_NE(message_of([&] { encode_prompts(encoder, concept_of(" "), silent); }), "");
}

// Adam's formula one scalar at a time.
TEST(AdamWTest, FollowsTheFormulaAndSkipsWhatHasNoGradient) {
  const at::Tensor x = at::tensor({1.0, -2.0}, at::kDouble), y = at::tensor({3.0}, at::kDouble);
  const at::Tensor untouched = at::tensor({5.0}, at::kDouble);
  AdamW optimizer({x, untouched, y}, 0.1);
  double p[] = {1.0, -2.0, 3.0}, m[3] = {}, v[3] = {};
  const double gradients[3][3] = {{3.0, -4.0, 12.0}, {0.1, 0.2, -0.1}, {0.0, 1.0, 0.5}};
  for (int step = 0; step < 3; ++step) {
    const double* g = gradients[step];
    optimizer.step({at::tensor({g[0], g[1]}, at::kDouble), {}, at::tensor({g[2]}, at::kDouble)});
    const double norm = std::sqrt(g[0] * g[0] + g[1] * g[1] + g[2] * g[2]);
    for (int i = 0; i < 3; ++i) {
      const double clipped = norm > 1.0 ? g[i] / norm : g[i];
      m[i] = 0.9 * m[i] + 0.1 * clipped;
      v[i] = 0.999 * v[i] + 0.001 * clipped * clipped;
      p[i] *= 1 - 0.1 * 0.01;
      p[i] -= 0.1 * (m[i] / (1 - std::pow(0.9, step + 1))) /
              (std::sqrt(v[i] / (1 - std::pow(0.999, step + 1))) + 1e-8);
    }
  }
  // The clipping coefficient has the usual 1e-6 in its denominator.
  EXPECT_NEAR(x[0].item<double>(), p[0], 1e-5);
  EXPECT_NEAR(x[1].item<double>(), p[1], 1e-5);
  EXPECT_NEAR(y[0].item<double>(), p[2], 1e-5);
  EXPECT_EQ(untouched[0].item<double>(), 5.0);
}

// A model that always sees one picture for each prompt.
class CertainDenoiser final : public FakeDenoiser {
 public:
  CertainDenoiser() : FakeDenoiser(1, kWidth) {}
  at::Tensor denoise(const DenoiseRequest& request, AttentionTap*) override {
    sigmas.push_back(request.sigma[0].item<double>());
    return request.text.context.mean({1, 2}).reshape({-1, 1, 1, 1}).expand(request.noisy.sizes());
  }
  std::vector<double> sigmas;
};

TEST(EulerSamplerTest, EndsAtWhatTheModelSeesWithGuidance) {
  CertainDenoiser model;
  LatentRequest request;
  request.noise = at::randn({2, 4, 8, 8});
  request.positive.context = at::randn({2, 77, kWidth});
  request.negative.context = at::randn({1, 77, kWidth});
  request.steps = 5;
  request.cfg = 4.0;
  int64_t steps = 0;
  const at::Tensor x = sample_latents(model, request, [&](int64_t step) -> AttentionTap* {
    EXPECT_EQ(step, steps++);
    return nullptr;
  });
  EXPECT_EQ(steps, 5);
  for (int64_t i = 0; i < 2; ++i) {
    const at::Tensor positive = request.positive.context[i].mean();
    const at::Tensor negative = request.negative.context[0].mean();
    const double expected = (negative + 4.0 * (positive - negative)).item<double>();
    EXPECT_LT((x[i] - expected).abs().max().item<double>(), 1e-5);
  }
  const at::Tensor levels = model.noise_levels();
  EXPECT_NEAR(model.sigmas.front(), levels[999].item<double>(), 1e-4);
  EXPECT_NEAR(model.sigmas.back(), levels[0].item<double>(), 1e-6);
  EXPECT_NEAR(model.sigmas[2], std::sqrt(levels[499].item<double>() * levels[500].item<double>()),
              1e-4);
  EXPECT_TRUE(std::is_sorted(model.sigmas.rbegin(), model.sigmas.rend()));
}

}  // namespace
}  // namespace lacuna
