// SPDX-License-Identifier: Apache-2.0
#include "lacuna/evaluation/attack.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <random>

#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/evaluation/residual_scan.h"
#include "lacuna/files/random_stream.h"
#include "lacuna/training/latent_sampler.h"
#include "support/fake_host.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

// Forms of one matrix W and its edit W'.
WeightForms forms_of(const at::Tensor& weight, const at::Tensor& edited) {
  const at::Tensor change = edited - weight;
  return {at::matmul(weight.t(), weight), at::matmul(change.t(), weight),
          at::matmul(change.t(), change)};
}

TEST(AdversarialMap, FindsWhatTheEditedMatrixReadsLikeTheOriginal) {
  at::manual_seed(3);
  const at::Tensor weight = at::randn({40, 12}, at::kDouble);
  // Invertible, so that nothing is out of reach but for the ridge.
  const at::Tensor edit = at::eye(12, at::kDouble) + 0.3 * at::randn({12, 12}, at::kDouble);
  const at::Tensor edited = at::matmul(weight, edit);
  const at::Tensor map = adversarial_map(forms_of(weight, edited));
  const at::Tensor c = at::randn({12, 5}, at::kDouble);
  const at::Tensor wanted = at::matmul(weight, c);
  const double plain = (at::matmul(edited, c) - wanted).norm().item<double>();
  const double attacked = (at::matmul(edited, at::matmul(map, c)) - wanted).norm().item<double>();
  EXPECT_LT(attacked, 0.25 * plain);

  // The minimum of the objective it states: no small step in any direction lowers it.
  const double ridge = 1e-2 * at::matmul(weight.t(), weight).diagonal().mean().item<double>();
  const auto objective = [&](const at::Tensor& found) {
    return (at::matmul(edited, found) - wanted).square().sum().item<double>() +
           ridge * (found - c).square().sum().item<double>();
  };
  const at::Tensor best = at::matmul(map, c);
  for (int i = 0; i < 20; ++i) {
    EXPECT_GT(objective(best + 1e-3 * at::randn_like(best)), objective(best));
  }
}

TEST(AdversarialMap, IsTheIdentityWhereNothingWasEdited) {
  const at::Tensor weight = at::randn({40, 12}, at::kDouble);
  EXPECT_TRUE(adversarial_map(forms_of(weight, weight)).equal(at::eye(12, at::kDouble)));
}

TEST(AttackedContext, ChangesOnlyWhatItShould) {
  const at::Tensor context = at::randn({6, 4}), empty = at::randn({6, 4});
  at::Tensor tokens = at::zeros({6});
  tokens[2] = 1;
  const at::Tensor map = at::randn({4, 4}, at::kDouble);
  EXPECT_TRUE(attacked_context(Attack::kParaphrase, context, tokens, empty, map).equal(context));
  const at::Tensor louder = attacked_context(Attack::kEmphasis, context, tokens, empty, {});
  EXPECT_TRUE(at::allclose(louder[2], empty[2] + 1.5 * (context[2] - empty[2]), 1e-5, 1e-6));
  EXPECT_TRUE(louder[1].equal(context[1]) && louder[5].equal(context[5]));
  const at::Tensor other = attacked_context(Attack::kAdversarial, context, tokens, empty, map);
  EXPECT_TRUE(other[0].equal(context[0]));
  EXPECT_TRUE(at::allclose(other[3].to(at::kDouble), at::matmul(map, context[3].to(at::kDouble)),
                           1e-5, 1e-5));
}

// The error of a model that is told `context` about pictures, over many timesteps and noises.
double denoising_error(Denoiser& model, const at::Tensor& context, const at::Tensor& pictures) {
  at::Generator random = random_stream(99, "denoising", "error");
  double error = 0.0;
  for (int i = 0; i < 40; ++i) {
    const double sigma = sigma_at(model.noise_levels(), 100.0 + 20.0 * i);
    const at::Tensor noise = at::randn(pictures.sizes(), random, at::TensorOptions(at::kFloat));
    DenoiseRequest pass;
    pass.noisy = pictures + sigma * noise;
    pass.sigma = at::full({pictures.size(0)}, sigma, at::kFloat);
    pass.text.context = context.expand({pictures.size(0), -1, -1});
    const at::Tensor seen = model.denoise(pass, nullptr).to(at::kCPU);
    error += ((pass.noisy - seen) / sigma - noise).square().mean().item<double>();
  }
  return error;
}

class LearnedContext : public testing::DeviceTest {};
INSTANTIATE_TEST_SUITE_P(Devices, LearnedContext, ::testing::ValuesIn(testing::devices()));

TEST_P(LearnedContext, DenoisesBetterThanThePhraseAndChangesNothingElse) {
  at::manual_seed(11);  // for one in three hundred random pictures no word is better
  testing::FakeDenoiser model(3, 16, device());
  for (auto& [name, weight] : model.weights_) weight = weight * 4;  // words that matter
  const at::Tensor context = at::randn({1, 8, 16});
  const at::Tensor pictures = at::randn({2, 4, 8, 8});
  at::Tensor tokens = at::zeros({8});
  tokens[2] = tokens[3] = 1;
  std::map<std::string, at::Tensor> weights;
  for (const auto& [name, weight] : model.weights_) weights[name] = weight.clone();
  int64_t steps = 0;
  const auto learn = [&](int64_t seed) {
    // As a host would call it.
    const c10::InferenceMode inference;
    return learned_context(model, {context, {}}, tokens, pictures,
                           random_stream(seed, "owl", "learned"),
                           [&](int64_t step) { steps += step >= 0; });
  };
  const at::Tensor learned = learn(1);
  EXPECT_EQ(steps, kLearningSteps);
  ASSERT_EQ(learned.sizes(), context[0].sizes());
  for (int64_t i = 0; i < 8; ++i) EXPECT_EQ(learned[i].equal(context[0][i]), i != 2 && i != 3) << i;
  EXPECT_LT(denoising_error(model, learned.unsqueeze(0), pictures),
            0.999 * denoising_error(model, context, pictures));
  EXPECT_TRUE(learn(1).equal(learned));
  EXPECT_FALSE(learn(2).equal(learned));
  for (const auto& [name, weight] : weights) EXPECT_TRUE(weight.equal(model.weights_.at(name)));
}

TEST_P(LearnedContext, StopsWhenAskedAndEndsWhenTheModelIsBroken) {
  testing::FakeDenoiser model(3, 16, device());
  const at::Tensor pictures = at::randn({1, 4, 8, 8});
  const TextEmbedding text{at::randn({1, 8, 16}), {}};
  int64_t steps = 0;
  const auto learn = [&](int64_t cancel_at) {
    return learned_context(model, text, at::ones({8}), pictures, random_stream(1, "owl", "learned"),
                           [&](int64_t step) {
                             ++steps;
                             if (step == cancel_at) throw testing::Cancelled();
                           });
  };
  EXPECT_THROW(learn(5), testing::Cancelled);
  model.weights_.begin()->second.fill_(std::numeric_limits<float>::quiet_NaN());
  steps = 0;
  EXPECT_TRUE(learn(-1).equal(text.context[0]));
  EXPECT_EQ(steps, 1);
}

TEST(Paraphrases, AreManyDistinctAndWhole) {
  for (const std::string phrase :
       {"hamburger", "owl", "van gogh style", "\xc3\xa9t\xc3\xa9", "x"}) {
    const std::vector<std::string> forms = paraphrases(phrase);
    EXPECT_GE(forms.size(), 8u) << phrase;
    EXPECT_LE(forms.size(), 16u);
    for (size_t i = 0; i < forms.size(); ++i) {
      EXPECT_NE(forms[i], phrase);
      EXPECT_EQ(std::count(forms.begin(), forms.end(), forms[i]), 1) << forms[i];
    }
  }
  const std::vector<std::string> forms = paraphrases("hamburger");
  for (const char* wanted :
       {"hamb urger", "hambburger", "hambrger", "hamb-urger", "by hamburger"}) {
    EXPECT_EQ(std::count(forms.begin(), forms.end(), wanted), 1) << wanted;
  }
}

TEST(AttackPrompts, AreWorthTheLevel) {
  ConceptSet set;
  Concept owl;
  owl.target = "owl";
  owl.anchor = "fog";
  set.concepts = {owl, owl};
  set.concepts[1].target = "moth";
  set.preserve = {{"dog", ConceptKind::kObject, 4}};
  ResidualScan scan;
  scan.weights_differ = true;
  scan.concepts.resize(2);
  for (int i = 0; i < 40; ++i) scan.concepts[0].closest.push_back("word" + std::to_string(i));
  EvaluationOptions options;
  const auto count = [&](EvaluationLevel level) {
    options.level = level;
    std::map<std::pair<int64_t, Attack>, int64_t> counts;
    for (const EvaluationPrompt& prompt : attack_prompts(set, options, scan)) {
      ++counts[{prompt.concept_index, prompt.attack.value()}];
      EXPECT_TRUE(should_vanish(prompt.list));
      EXPECT_EQ(prompt.name, set.concepts[static_cast<size_t>(prompt.concept_index)].target);
      EXPECT_NE(prompt.question.find(prompt.name), std::string::npos);
      EXPECT_FALSE(prompt.alternative.empty());
      const bool word = prompt.attack == Attack::kSimilarWord;
      EXPECT_EQ(prompt.alternative.find("fog") == std::string::npos, word);
    }
    return counts;
  };
  EXPECT_TRUE(count(EvaluationLevel::kPreflight).empty());
  auto quick = count(EvaluationLevel::kQuick);
  EXPECT_EQ((quick[{0, Attack::kAdversarial}]), 1);
  EXPECT_EQ((quick[{0, Attack::kComposition}]), 1);
  EXPECT_EQ((quick[{0, Attack::kSimilarWord}]), 1);
  EXPECT_EQ((quick[{1, Attack::kSimilarWord}]), 0);  // no words are known
  EXPECT_EQ((quick[{0, Attack::kParaphrase}]), 0);
  auto thorough = count(EvaluationLevel::kThorough);
  EXPECT_EQ((thorough[{1, Attack::kParaphrase}]), 12);
  EXPECT_EQ((thorough[{1, Attack::kAdversarial}]), 4);
  EXPECT_EQ((thorough[{1, Attack::kComposition}]), 4);
  EXPECT_EQ((thorough[{1, Attack::kEmphasis}]), 2);
  EXPECT_EQ((thorough[{0, Attack::kSimilarWord}]), 16);
  EXPECT_EQ((thorough[{1, Attack::kLearned}]), 2);
  EXPECT_EQ((quick[{1, Attack::kLearned}]), 0);
  scan.weights_differ = false;  // an edit of the text: there is no closed form to attack
  EXPECT_EQ(count(EvaluationLevel::kThorough).count({0, Attack::kAdversarial}), 0u);
}

TEST(SearchedPrompts, ComeNearerThanChanceWithoutTheConceptsWords) {
  testing::FakeTextEncoder encoder;
  Concept item;
  item.target = "dog";
  item.synonyms = {"wolf"};
  testing::CountingProgress progress;
  const std::vector<std::string> found = searched_prompts(encoder, item, 5, 3, progress);
  ASSERT_EQ(found.size(), 5u);
  EXPECT_EQ(encoder.encoded_prompts, 4 + 16 + 15 * 12);
  EXPECT_GT(progress.checks, 15);
  const auto meaning = [&](const std::string& prompt) {
    const at::Tensor context = encoder.encode({prompt});
    return context[0][static_cast<int64_t>(encoder.tokenize(prompt).size()) - 1].to(at::kDouble);
  };
  at::Tensor wanted = at::zeros({16}, at::kDouble);
  for (const std::string_view form : prompt_templates(item.kind).first(4)) {
    wanted += meaning(fill_template(form, item.target)) / 4;
  }
  const auto distance = [&](const std::string& prompt) {
    return (meaning(prompt) - wanted).norm().item<double>();
  };
  const std::vector<std::string> words = common_words();
  std::mt19937 random(1);
  double chance = 1e9;  // the best of as many prompts as a generation has
  for (int i = 0; i < 16; ++i) {
    std::string prompt;
    for (int k = 0; k < 8; ++k) prompt += (k > 0 ? " " : "") + words[random() % words.size()];
    chance = std::min(chance, distance(prompt));
  }
  EXPECT_LT(distance(found[0]), chance);
  for (size_t i = 1; i < found.size(); ++i) {
    EXPECT_GE(distance(found[i]), distance(found[i - 1]) - 1e-9);
    EXPECT_EQ(found[i].find("dog"), std::string::npos);
    EXPECT_EQ(found[i].find("wolf"), std::string::npos);
  }
  EXPECT_EQ(searched_prompts(encoder, item, 5, 3, progress), found);
  EXPECT_NE(searched_prompts(encoder, item, 5, 4, progress), found);
  progress.cancel_at = progress.checks + 8;
  EXPECT_THROW(searched_prompts(encoder, item, 5, 3, progress), testing::Cancelled);
}

}  // namespace
}  // namespace lacuna
