// SPDX-License-Identifier: Apache-2.0
// The LoRA Erase node: what it refuses, what it keeps between runs, what it hands on.
#include "nodes/lora_erase_node.h"

#include <c10/core/InferenceMode.h>

#include "concept_sets.h"
#include "lacuna/error.h"
#include "nodes/node_registry.h"
#include "support/fake_host.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::concepts_named;
using testing::CountingProgress;
using testing::FakeDenoiser;
using testing::FakeTextEncoder;
using testing::message_of;

using Values = std::map<std::string, Value>;

class LoraEraseNodeTest : public testing::DeviceTest {
 protected:
  Values inputs(Values more = {}) {
    more.try_emplace("model", std::shared_ptr<Denoiser>(model_));
    more.try_emplace("clip", std::shared_ptr<TextEncoder>(clip_));
    more.try_emplace("concepts", concepts_named({"owl", "black cat"}, 4));
    for (const auto& [id, value] : Values{{"steps", int64_t{3}},
                                          {"images", int64_t{2}},
                                          {"sampling_steps", int64_t{3}},
                                          {"width", int64_t{64}},
                                          {"height", int64_t{64}},
                                          {"batch", int64_t{1}}}) {
      more.try_emplace(id, value);
    }
    return more;
  }
  NodeResult run(Values more = {}) {
    return node_.run(NodeInputs(node_.schema(), inputs(std::move(more))), progress_);
  }
  static std::shared_ptr<const LoraBundle> bundle_of(const NodeResult& result) {
    return std::get<std::shared_ptr<const LoraBundle>>(result.outputs[0]);
  }
  static std::vector<std::string> targets_of(const LoraBundle& bundle) {
    std::vector<std::string> targets;
    for (const auto& lora : bundle.concepts) targets.push_back(lora->item.target);
    return targets;
  }
  void refuse(Values more, const std::string& expected) {
    const std::string message = message_of([&] { run(std::move(more)); });
    EXPECT_NE(message.find(expected), std::string::npos) << message;
    EXPECT_EQ(clip_->encoded_prompts, 0);
  }

  std::shared_ptr<FakeDenoiser> model_ = std::make_shared<FakeDenoiser>(3, 16, device());
  std::shared_ptr<FakeTextEncoder> clip_ = std::make_shared<FakeTextEncoder>(16, device());
  std::shared_ptr<ImageDecoder> vae_ = std::make_shared<testing::FakeImageDecoder>();
  LoraEraseNode node_;
  CountingProgress progress_;
};
INSTANTIATE_TEST_SUITE_P(Devices, LoraEraseNodeTest, ::testing::ValuesIn(testing::devices()));

// Saved workflows store widgets by position: this order may only grow.
TEST(LoraEraseSchema, InputOrderIsFrozen) {
  std::vector<std::string> ids;
  for (const InputSpec& input : LoraEraseNode().schema().inputs) ids.push_back(input.id);
  EXPECT_EQ(ids, (std::vector<std::string>{"model",         "clip",           "concepts",
                                           "refinement",    "loras",          "vae",
                                           "image",         "mask",           "gradient",
                                           "rank",          "steps",          "learning_rate",
                                           "images",        "sampling_steps", "cfg",
                                           "width",         "height",         "focal",
                                           "focal_t1",      "focal_t2",       "focal_sharpness",
                                           "mask_from",     "tokens",         "batch",
                                           "training_seed", "refresh",        "suppress_value"}));
  EXPECT_NE(NodeRegistry::with_lacuna_nodes("output").find("LacunaLoRAErase"), nullptr);
}

TEST_P(LoraEraseNodeTest, TrainsEveryConceptOfTheList) {
  for (const char* gradient : {"full", "cached"}) {
    const NodeResult result = run({{"gradient", std::string(gradient)}});
    ASSERT_EQ(result.outputs.size(), node_.schema().outputs.size());
    const auto bundle = bundle_of(result);
    EXPECT_EQ(targets_of(*bundle), (std::vector<std::string>{"owl", "black cat"}));
    EXPECT_EQ(bundle->model_fingerprint, "fake-model");
    EXPECT_EQ(bundle->encoder_fingerprint, "fake");
    EXPECT_EQ(bundle->preserve, concepts_named({"x"}, 4)->preserve);
    EXPECT_EQ(bundle->general_prior, GeneralPriorSize::kNone);
    for (const auto& lora : bundle->concepts) {
      EXPECT_EQ(lora->pairs.size(), model_->projections_.size());
      EXPECT_TRUE(lora->prompt_gram.defined());
    }
    const at::Tensor preview = std::get<at::Tensor>(result.outputs[1]);
    EXPECT_EQ(preview.sizes(), at::IntArrayRef({4, 64, 64, 3}));
    const auto loss = std::get<std::shared_ptr<const LossMap>>(result.outputs[2]);
    EXPECT_EQ(loss->losses.size(), 3u);
    EXPECT_GT(loss->losses[0], 0.0);
    EXPECT_NE(result.text.at(0).find("Trained 2 concepts"), std::string::npos) << result.text[0];
    EXPECT_NE(result.text[0].find("owl: attention "), std::string::npos);
  }
}

TEST_P(LoraEraseNodeTest, TheSecondRunHasNothingToDo) {
  const NodeResult first = run();
  const int64_t encoded = clip_->encoded_prompts;
  const NodeResult second = run();
  EXPECT_EQ(clip_->encoded_prompts, encoded);
  EXPECT_EQ(bundle_of(second)->concepts, bundle_of(first)->concepts);  // the same objects
  EXPECT_NE(second.text[0].find("2 were ready"), std::string::npos) << second.text[0];
  // The batch changes nothing that matters; a rank does.
  EXPECT_EQ(bundle_of(run({{"batch", int64_t{2}}}))->concepts, bundle_of(first)->concepts);
  EXPECT_NE(bundle_of(run({{"rank", int64_t{2}}}))->concepts[0], bundle_of(first)->concepts[0]);
}

TEST_P(LoraEraseNodeTest, PatchesBeforeTheNodeAreAnotherModel) {
  const NodeResult first = run();
  std::vector<WeightDelta> lora;
  for (const auto& [name, weight] : model_->weights_) {
    lora.push_back({name, 0.1 * at::ones_like(weight), {}});
  }
  const NodeResult second = run({{"model", model_->with_weight_deltas(lora, 1.0)}});
  EXPECT_NE(bundle_of(second)->concepts[0], bundle_of(first)->concepts[0]);
}

TEST_P(LoraEraseNodeTest, AfterACancelTheNextRunGoesOn) {
  CountingProgress counter;
  LoraEraseNode reference;
  reference.run(NodeInputs(reference.schema(), inputs()), counter);
  progress_.cancel_at = counter.checks * 3 / 4;  // in the second concept
  EXPECT_THROW(run(), testing::Cancelled);
  progress_.cancel_at = -1;
  const NodeResult result = run();
  EXPECT_NE(result.text[0].find("Trained 1 concept ("), std::string::npos) << result.text[0];
  EXPECT_NE(result.text[0].find("1 were ready"), std::string::npos);
  EXPECT_EQ(bundle_of(result)->concepts.size(), 2u);
}

TEST_P(LoraEraseNodeTest, LorasAreExtendedAndOnlyWhatIsMissingIsTrained) {
  const auto first = bundle_of(run({{"concepts", concepts_named({"barn", "owl"}, 4)}}));
  LoraEraseNode fresh;
  const auto extend = [&](Values more) {
    more["loras"] = first;
    return fresh.run(NodeInputs(fresh.schema(), inputs(std::move(more))), progress_);
  };
  const NodeResult result = extend({});
  EXPECT_EQ(targets_of(*bundle_of(result)), (std::vector<std::string>{"barn", "owl", "black cat"}));
  EXPECT_EQ(bundle_of(result)->concepts[0], first->concepts[0]);
  EXPECT_EQ(bundle_of(result)->concepts[1], first->concepts[1]);
  EXPECT_NE(result.text[0].find("Trained 1 concept ("), std::string::npos) << result.text[0];
  EXPECT_NE(result.text[0].find("1 came from LORAS, 1 others passed on"), std::string::npos);
  // Another option: trained again, in the place of the old one.
  const NodeResult other = extend({{"steps", int64_t{2}}});
  EXPECT_EQ(bundle_of(other)->concepts.size(), 3u);
  EXPECT_NE(bundle_of(other)->concepts[1], first->concepts[1]);
  // All there: outputs are valid nevertheless.
  const NodeResult all = extend({{"concepts", concepts_named({"barn", "owl"}, 4)}});
  EXPECT_EQ(bundle_of(all)->concepts, first->concepts);
  EXPECT_EQ(std::get<at::Tensor>(all.outputs[1]).sizes(), at::IntArrayRef({1, 64, 64, 3}));
  EXPECT_FALSE(std::get<std::shared_ptr<const LossMap>>(all.outputs[2])->losses.empty());
}

TEST_P(LoraEraseNodeTest, PicturesOfTheUserAreTrainedOn) {
  const auto with = [&](const at::Tensor& mask) {
    at::manual_seed(5);
    Values more{{"concepts", concepts_named({"owl"}, 4)},
                {"vae", vae_},
                {"image", at::rand({2, 16, 16, 3})}};
    if (mask.defined()) more["mask"] = mask;
    return bundle_of(run(std::move(more)))->concepts[0];
  };
  at::Tensor left = at::zeros({16, 16});
  left.narrow(1, 0, 8).fill_(1);
  const auto whole = with(at::ones({1, 16, 16}));
  EXPECT_EQ(with(at::ones({2, 16, 16})), whole);
  EXPECT_NE(with(left), whole);
  EXPECT_NE(with({}), nullptr);
}

TEST_P(LoraEraseNodeTest, RefusesBeforeAnyPromptIsEncoded) {
  refuse({{"concepts", std::make_shared<const ConceptSet>()}}, "no concept to erase");
  refuse({{"rank", int64_t{9}}}, "rank 9 is above the width");
  refuse({{"width", int64_t{68}}}, "multiples of 8");
  refuse({{"focal_t1", 500.0}}, "t1 < t2");
  refuse({{"suppress_value", 1.0}}, "cached");
  refuse({{"clip", std::shared_ptr<TextEncoder>(std::make_shared<FakeTextEncoder>(24, device()))}},
         "width 24");
  const auto bundle = [](const std::string& model, const std::string& encoder) {
    LoraBundle loras;
    loras.model_fingerprint = model;
    loras.encoder_fingerprint = encoder;
    return std::make_shared<const LoraBundle>(loras);
  };
  refuse({{"loras", bundle("other", "fake")}}, "another base model");
  refuse({{"loras", bundle("fake-model", "other")}}, "another text encoder");
  auto refinement = std::make_shared<Refinement>();
  refinement->encoder_fingerprint = "other";
  refuse({{"refinement", std::shared_ptr<const Refinement>(refinement)}}, "another text encoder");

  const at::Tensor image = at::rand({2, 16, 16, 3});
  const auto one = concepts_named({"owl"}, 4);
  const auto picture = [&](const at::Tensor& pixels, const at::Tensor& mask,
                           const std::string& expected) {
    Values more{{"concepts", one}, {"vae", vae_}, {"image", pixels}};
    if (mask.defined()) more["mask"] = mask;
    refuse(std::move(more), expected);
  };
  refuse({{"mask", at::ones({1, 16, 16})}}, "needs the 'image'");
  refuse({{"image", image}, {"concepts", one}}, "needs a 'vae'");
  refuse({{"image", image}, {"vae", vae_}}, "there are 2; use one LoRA Erase for each");
  picture(at::rand({0, 16, 16, 3}), {}, "no picture");
  picture(at::rand({1, 12, 16, 3}), {}, "multiple of 8 pixels, not 16 x 12");
  picture(image * NAN, {}, "NaN");
  picture(image, at::ones({1, 8, 16}), "must have the size of 'image'");
  picture(image, at::ones({3, 16, 16}), "2 pictures but 3 masks");
  picture(image, at::zeros({2, 16, 16}), "mask 1 is empty");
  at::Tensor dot = at::zeros({1, 16, 16});
  dot[0][3][3] = 1;  // the fake decoder keeps every pixel, a real one every eighth
  Values values{{"concepts", one}, {"vae", vae_}, {"image", image}, {"mask", dot}};
  EXPECT_EQ(message_of([&] { run(values); }), "");

  model_->projections_.clear();
  model_->family_ = "SD3";
  EXPECT_NE(message_of([&] { run(); }).find("SD3"), std::string::npos);
}

TEST_P(LoraEraseNodeTest, WidgetsAreJudgedBeforeQueueing) {
  const auto message = [&](Values values) {
    return message_of([&] { node_.validate(NodeInputs(node_.schema(), std::move(values))); });
  };
  EXPECT_EQ(message({}), "");
  EXPECT_NE(message({{"focal_t2", 100.0}}).find("t1 < t2"), std::string::npos);
  EXPECT_NE(message({{"height", int64_t{516}}}).find("multiples of 8"), std::string::npos);
}

TEST_P(LoraEraseNodeTest, RunsUnderTheHostsInferenceMode) {
  const auto plain = bundle_of(run());
  LoraEraseNode node;
  const c10::InferenceMode inference;
  const auto result = node.run(NodeInputs(node.schema(), inputs({{"vae", vae_}})), progress_);
  EXPECT_TRUE(c10::InferenceMode::is_enabled());
  const auto bundle = bundle_of(result);
  for (const auto& [name, pair] : plain->concepts[0]->pairs) {
    EXPECT_LT((bundle->concepts[0]->pairs.at(name).up - pair.up).abs().max().item<double>(), 1e-3);
  }
}

}  // namespace
}  // namespace lacuna
