// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "drawn.h"
#include "lacuna/error.h"
#include "lacuna/training/lora_bundle.h"
#include "nodes/lora_bundle_nodes.h"
#include "nodes/lora_fuse_node.h"
#include "support/fake_host.h"
#include "support/message_of.h"
#include "support/random_concepts.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::FakeDenoiser;
using testing::FakeTextEncoder;
using testing::message_of;
using testing::relative_difference;

using Values = std::map<std::string, Value>;
using Bundle = std::shared_ptr<const LoraBundle>;

constexpr int64_t kWidth = 16;

std::vector<std::string> input_ids(const NodeSchema& schema) {
  std::vector<std::string> list;
  for (const InputSpec& input : schema.inputs) list.push_back(input.id);
  return list;
}

// Saved workflows store widgets by position: this order may only grow.
TEST(Schemas, OrderOfTheFusionNodesIsFrozen) {
  EXPECT_EQ(input_ids(LoraFuseNode().schema()),
            (std::vector<std::string>{
                "model", "clip", "loras", "loras_2", "loras_3", "loras_4", "concepts", "strength",
                "mode", "preserve_weight", "prior_weight", "regularization", "concept_strengths",
                "leave_out", "lora_rank", "lora_rank_limit", "retain_set", "where"}));
  EXPECT_EQ(input_ids(SaveBundleNode("x").schema()),
            (std::vector<std::string>{"loras", "filename_prefix"}));
  EXPECT_EQ(input_ids(LoadBundleNode("x").schema()), (std::vector<std::string>{"file"}));
}

class LoraFuseTest : public testing::DeviceTest {
 protected:
  LoraFuseTest() {
    for (const TextEntry& projection : model_->projections_) {
      rows_[projection.lora_name] = model_->weights_.at(projection.name).size(0);
    }
    loras_ = bundle({"cat", "owl"});
  }
  std::shared_ptr<LoraBundle> bundle(const std::vector<std::string>& targets) {
    auto bundle = std::make_shared<LoraBundle>();
    for (const std::string& target : targets) {
      bundle->concepts.push_back(
          testing::random_concept(target, rows_, testing::embeddings(30, kWidth)));
    }
    bundle->preserve = {{"dog", ConceptKind::kObject, 2}};
    bundle->general_prior = GeneralPriorSize::kNone;
    bundle->model_fingerprint = "fake-model";
    bundle->encoder_fingerprint = "fake";
    return bundle;
  }
  std::shared_ptr<const ConceptSet> concepts(const std::vector<std::string>& targets) {
    ConceptSet set;
    for (const std::string& target : targets) {
      Concept item;
      item.target = target;
      item.anchor = "scenery";
      item.templates = 2;
      set.concepts.push_back(item);
    }
    set.general_prior = GeneralPriorSize::kNone;
    return std::make_shared<const ConceptSet>(std::move(set));
  }
  NodeInputs inputs(Values more = {}) {
    more.try_emplace("model", std::shared_ptr<Denoiser>(model_));
    more.try_emplace("clip", std::shared_ptr<TextEncoder>(clip_));
    more.try_emplace("loras", Bundle(loras_));
    return NodeInputs(node_.schema(), std::move(more));
  }
  NodeResult run(Values more = {}) { return node_.run(inputs(std::move(more)), progress_); }
  static std::shared_ptr<FakeDenoiser> model_of(const NodeResult& result) {
    return std::dynamic_pointer_cast<FakeDenoiser>(
        std::get<std::shared_ptr<Denoiser>>(result.outputs[0]));
  }
  static const LoraBundle& loras_of(const NodeResult& result) {
    return *std::get<Bundle>(result.outputs[2]);
  }
  static std::string report_of(const NodeResult& result) {
    return std::get<std::string>(result.outputs[3]);
  }
  static std::vector<std::string> targets(const LoraBundle& bundle) {
    std::vector<std::string> list;
    for (const auto& item : bundle.concepts) list.push_back(item->item.target);
    return list;
  }
  // Change of every weight, one vector.
  at::Tensor change(const NodeResult& result) {
    std::vector<at::Tensor> parts;
    for (const auto& [name, weight] : model_->weights_) {
      parts.push_back(
          (model_of(result)->weights_.at(name) - weight).flatten().cpu().to(at::kDouble));
    }
    return at::cat(parts);
  }

  std::shared_ptr<FakeDenoiser> model_ = std::make_shared<FakeDenoiser>(3, kWidth, device());
  std::shared_ptr<FakeTextEncoder> clip_ = std::make_shared<FakeTextEncoder>(kWidth, device());
  std::map<std::string, int64_t> rows_;
  std::shared_ptr<LoraBundle> loras_;
  LoraFuseNode node_;
  testing::CountingProgress progress_;
};
INSTANTIATE_TEST_SUITE_P(Devices, LoraFuseTest, ::testing::ValuesIn(testing::devices()));

TEST(Schemas, SavedFusionsActOnEveryPrompt) {
  const LoraFuseNode node;
  EXPECT_EQ(NodeInputs(node.schema(), {}).string("where"), "every prompt");
  EXPECT_TRUE(find_input(node.schema(), "where")->optional);
}

// The whole fused edit, the low-rank part included, on prompts that name a concept.
TEST_P(LoraFuseTest, ActsWhereAPromptNamesAConcept) {
  clip_->vocabulary_ = testing::vocabulary(20);  // as many as 16 dimensions tell apart
  const NodeResult gated = run({{"where", std::string("prompts that name it")}});
  const NodeResult everywhere = run({{"where", std::string("every prompt")}});
  EXPECT_EQ(at::count_nonzero(change(gated)).item<int64_t>(), 0) << "no weight is patched";
  const auto drawn = [&](Denoiser& model, const std::string& prompt) {
    return testing::drawn(model, *clip_, prompt);
  };
  const std::string other = "a photo of wordac";
  const std::string named = "a photo of owl";
  EXPECT_TRUE(at::equal(drawn(*model_of(gated), other), drawn(*model_, other)));
  EXPECT_GT(relative_difference(drawn(*model_of(gated), named), drawn(*model_, named)), 1e-3);
  EXPECT_LT(
      relative_difference(drawn(*model_of(gated), named), drawn(*model_of(everywhere), named)),
      1e-4);
  EXPECT_NE(report_of(gated).find("Acts on prompts that name a concept"), std::string::npos);
  EXPECT_NE(report_of(everywhere).find("Applied to the weights"), std::string::npos);
  // A protected concept is no prompt to act on.
  const NodeResult one = run({{"where", std::string("prompts that name it")},
                              {"concept_strengths", std::string("owl = 0")}});
  EXPECT_TRUE(at::equal(drawn(*model_of(one), named), drawn(*model_, named)));
  EXPECT_GT(relative_difference(drawn(*model_of(one), "a photo of cat"),
                                drawn(*model_, "a photo of cat")),
            1e-3);
  // Not even a gate is fitted where nothing is to be done.
  const NodeResult silent =
      run({{"where", std::string("prompts that name it")}, {"strength", 0.0}});
  EXPECT_EQ(model_of(silent), model_);
}

TEST_P(LoraFuseTest, PatchesTheModelAsTheFormulaSays) {
  std::map<std::string, at::Tensor> before;
  for (const auto& [name, weight] : model_->weights_) before[name] = weight.clone();
  const NodeResult result = run({{"regularization", 0.5},
                                 {"preserve_weight", 2.0},
                                 {"lora_rank", int64_t{64}},
                                 {"concept_strengths", std::string("OWL = 0.5  # less")}});
  at::Tensor h = 0.5 * at::eye(kWidth, at::kDouble);
  SilentProgress progress;
  h = h + 2.0 * collect_kept_text(*clip_, loras_->preserve, GeneralPriorSize::kNone, {}, nullptr,
                                  progress)
                    .preserve;
  for (const auto& item : loras_->concepts) h = h + item->prompt_gram;
  for (const TextEntry& projection : model_->projections_) {
    const at::Tensor weight = model_->weights_.at(projection.name);
    EXPECT_TRUE(at::equal(weight, before[projection.name]));
    const at::Tensor w = weight.cpu().to(at::kDouble);
    at::Tensor right = at::zeros_like(w);
    for (const auto& item : loras_->concepts) {
      const double s = item->item.target == "owl" ? 0.5 : 1.0;
      const LoraPair& pair = item->pairs.at(projection.lora_name);
      right = right + s * (at::matmul(w, item->refinement_shift) +
                           at::matmul(at::matmul(pair.up, pair.down), item->prompt_gram));
    }
    const at::Tensor expected = w + at::linalg_solve(h, right.t()).t();
    EXPECT_LT(relative_difference(model_of(result)->weights_.at(projection.name), expected), 5e-6);
    EXPECT_EQ(model_of(result)->weights_.at(projection.name).device().type(), device().type());
    // The LoRA says the same: its rank allows it.
    const auto& lora = *std::get<std::shared_ptr<const LoraTensors>>(result.outputs[1]);
    const at::Tensor product =
        at::matmul(lora.at(projection.lora_name + ".lora_up.weight").to(at::kDouble),
                   lora.at(projection.lora_name + ".lora_down.weight").to(at::kDouble));
    EXPECT_LT(relative_difference(product, expected - w), 5e-3);
  }
  EXPECT_EQ(result.outputs.size(), node_.schema().outputs.size());
  EXPECT_NE(report_of(result).find("owl -> scenery (0.5)"), std::string::npos) << report_of(result);
  EXPECT_NE(report_of(result).find("Preserved: 1 phrases"), std::string::npos);
  EXPECT_EQ(targets(loras_of(result)), (std::vector<std::string>{"cat", "owl"}));
}

TEST_P(LoraFuseTest, LinearInBothStrengthsAndZeroIsTheModel) {
  const at::Tensor full = change(run());
  EXPECT_LT(relative_difference(change(run({{"strength", 0.5}})), 0.5 * full), 1e-4);
  const at::Tensor cat = change(run({{"concept_strengths", std::string("owl=0")}}));
  const at::Tensor owl = change(run({{"concept_strengths", std::string("cat=0")}}));
  EXPECT_LT(relative_difference(cat + owl, full), 1e-4);
  const NodeResult none = run({{"strength", 0.0}});
  for (const auto& [name, weight] : model_->weights_) {
    EXPECT_TRUE(at::equal(model_of(none)->weights_.at(name), weight));
  }
  EXPECT_NE(report_of(none).find("unchanged"), std::string::npos);
  const NodeResult silent = run({{"concept_strengths", std::string("cat = 0\nowl = 0")}});
  EXPECT_EQ(change(silent).abs().max().item<double>(), 0.0);
}

TEST_P(LoraFuseTest, AddingAndLeavingOutNeedNoTrainingAndNoEncoding) {
  const at::Tensor before = change(run());
  const int64_t encoded = clip_->encoded_prompts;
  const Bundle more = bundle({"fox"});
  const NodeResult three = run({{"loras_3", more}});
  EXPECT_EQ(targets(loras_of(three)), (std::vector<std::string>{"cat", "owl", "fox"}));
  EXPECT_GT(relative_difference(change(three), before), 1e-3);
  const NodeResult back = run({{"loras_3", more}, {"leave_out", std::string("# gone:\nFox")}});
  EXPECT_EQ(clip_->encoded_prompts, encoded);
  EXPECT_TRUE(at::equal(change(back), before));
  EXPECT_NE(report_of(back).find("Left out: fox"), std::string::npos);
  EXPECT_EQ(targets(loras_of(back)), (std::vector<std::string>{"cat", "owl"}));
  // The merged output fuses to the same model, also from a node without memory.
  LoraFuseNode fresh;
  const NodeResult again =
      fresh.run(inputs({{"loras", std::get<Bundle>(three.outputs[2])}}), progress_);
  EXPECT_LT(relative_difference(change(again), change(three)), 1e-6);
  // The same concepts twice count once.
  EXPECT_TRUE(at::equal(change(run({{"loras_2", Bundle(loras_)}})), before));
}

// Concept Set takes "c#" for a word, and so must every list that names concepts.
TEST_P(LoraFuseTest, NamesMayHoldTheSignOfComments) {
  loras_ = bundle({"cat", "c#"});
  const NodeResult half = run({{"concept_strengths", std::string("c# = 0.5 # of it\n#cat = 2")}});
  EXPECT_NE(report_of(half).find("c# -> scenery (0.5)"), std::string::npos) << report_of(half);
  const NodeResult left = run({{"leave_out", std::string("\tc#\t# of\n # cat")}});
  EXPECT_EQ(targets(loras_of(left)), (std::vector<std::string>{"cat"}));
}

TEST_P(LoraFuseTest, NumbersThatNoWeightCanHoldAreRefusedByName) {
  const auto refuse = [&](const std::function<void(ConceptLora&)>& spoil, const std::string& part) {
    loras_ = bundle({"cat", "owl"});
    auto owl = std::make_shared<ConceptLora>(*loras_->concepts[1]);
    spoil(*owl);
    loras_->concepts[1] = owl;
    const std::string message = message_of([&] { run(); });
    EXPECT_NE(message.find("'owl'"), std::string::npos) << message;
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  const auto scaled = [](at::Tensor& t, double factor) { t = t * factor; };
  refuse([&](ConceptLora& c) { scaled(c.pairs.begin()->second.up, 1e38); }, "no training gives");
  refuse([&](ConceptLora& c) { scaled(c.refinement_shift, 1e30); }, "no training gives");
  refuse([&](ConceptLora& c) { scaled(c.pairs.begin()->second.up, 1e8); }, "would change");
  // Just below what no training gives.
  refuse(
      [&](ConceptLora& c) {
        scaled(c.refinement_shift, 5e9 / c.refinement_shift.abs().max().item<double>());
      },
      "the text embedding");
}

TEST_P(LoraFuseTest, TheReportWarnsOfViolentEdits) {
  EXPECT_EQ(report_of(run({{"regularization", 10000.0}})).find("Warning"), std::string::npos);
  for (const auto& item : loras_->concepts) {
    for (const auto& [name, pair] : item->pairs) pair.up.mul_(100.0);
  }
  EXPECT_NE(report_of(run()).find("Warning: "), std::string::npos);
}

TEST_P(LoraFuseTest, TheSameModelInAnotherWeightTypeIsTheSame) {
  loras_->model_samples = {{"lora_unet_layer_0_to_k", {0.1f, 0.3f}}};  // trained on fp32
  auto earlier = bundle({"fox"});                                      // knows the hash alone
  model_->samples_ = {{"lora_unet_layer_0_to_k", {0.1f, 0.3f}}};
  const NodeResult upgraded = run({{"loras_2", Bundle(earlier)}});
  EXPECT_EQ(loras_of(upgraded).model_samples, model_->samples_);
  model_->fingerprint_ = "fp8-model";
  model_->samples_.begin()->second = {0.1015625f, 0.3125f};
  const Bundle saved = std::get<Bundle>(upgraded.outputs[2]);
  EXPECT_EQ(message_of([&] { run({{"loras", saved}}); }), "");
  EXPECT_NE(message_of([&] { run({{"loras", Bundle(earlier)}}); }).find("in another weight type"),
            std::string::npos);
}

TEST_P(LoraFuseTest, ConnectedConceptsSayWhatIsFusedAndPreserved) {
  auto set = std::make_shared<ConceptSet>(*concepts({"Owl"}));
  set->preserve = {{"cat", ConceptKind::kObject, 2}, {"Dog", ConceptKind::kObject, 2}};
  const NodeResult result = run({{"concepts", std::shared_ptr<const ConceptSet>(set)}});
  EXPECT_EQ(targets(loras_of(result)), (std::vector<std::string>{"owl"}));
  ASSERT_EQ(loras_of(result).preserve.size(), 2u);
  EXPECT_EQ(loras_of(result).preserve[1].phrase, "cat");
  EXPECT_NE(report_of(result).find("Left out: cat"), std::string::npos);
  set->concepts[0].anchor = "fog";
  EXPECT_NE(report_of(run({{"concepts", std::shared_ptr<const ConceptSet>(set)}}))
                .find("another anchor or other synonyms than the concepts now say: Owl"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              run({{"concepts", concepts({"owl", "fox"})}});
            }).find("'fox' is in the concepts, but has no LoRA"),
            std::string::npos);
}

TEST_P(LoraFuseTest, AnErasedPhraseIsNotPreservedUntilItIsLeftOut) {
  auto wolf = bundle({"dog"});  // the others preserve it
  const NodeResult erased = run({{"loras_2", Bundle(wolf)}});
  EXPECT_TRUE(loras_of(erased).preserve.empty());
  const NodeResult left = run({{"loras_2", Bundle(wolf)}, {"leave_out", std::string("dog")}});
  EXPECT_EQ(loras_of(left).preserve.size(), 1u);
}

TEST_P(LoraFuseTest, JointModeDiffersAndNeedsARefinementOfAll) {
  const at::Tensor independent = change(run());
  EXPECT_GT(relative_difference(change(run({{"mode", std::string("joint")}})), independent), 1e-3);
  auto half = std::make_shared<ConceptLora>(*loras_->concepts[0]);
  half->refinement_gram.reset();
  half->refinement_shift.reset();
  loras_->concepts[0] = half;
  EXPECT_NE(message_of([&] { run({{"mode", std::string("joint")}}); }).find("'cat' was not"),
            std::string::npos);
  EXPECT_EQ(message_of([&] { run(); }), "");
}

TEST_P(LoraFuseTest, RefusesBeforeAnyPromptIsEncoded) {
  const auto refuse = [&](Values more, const std::string& expected) {
    const std::string message = message_of([&] { run(std::move(more)); });
    EXPECT_NE(message.find(expected), std::string::npos) << message;
    EXPECT_EQ(clip_->encoded_prompts, 0);
  };
  refuse({{"loras_2", Bundle(std::make_shared<LoraBundle>())}},
         "'loras_2': these LoRAs hold no concept");
  auto other = bundle({"fox"});
  other->model_fingerprint = "sdxl";
  refuse({{"loras_4", Bundle(other)}}, "'loras_4': these LoRAs were trained on another base model");
  other->model_fingerprint = "";
  other->encoder_fingerprint = "t5";
  refuse({{"loras_4", Bundle(other)}}, "another text encoder");
  refuse({{"loras_2", Bundle(bundle({"CAT"}))}}, "two different LoRAs");
  refuse({{"concept_strengths", std::string("fox = 1")}}, "they hold: cat, owl");
  refuse({{"leave_out", std::string("fox")}}, "they hold: cat, owl");
  refuse({{"leave_out", std::string("cat\nowl")}}, "nothing to fuse");
  refuse({{"clip", std::shared_ptr<TextEncoder>(std::make_shared<FakeTextEncoder>(24, device()))}},
         "width 24");
  auto broken = bundle({"fox"});
  auto item = std::make_shared<ConceptLora>(*broken->concepts[0]);
  item->pairs.clear();
  broken->concepts[0] = item;
  refuse({{"loras_2", Bundle(broken)}}, "'fox' has no LoRA");
  auto twins = bundle({"fox"});
  auto twin = std::make_shared<ConceptLora>(*twins->concepts[0]);
  twin->item.synonyms = {"cat"};
  twins->concepts[0] = twin;
  refuse({{"loras_2", Bundle(twins)}}, "listed twice");
  model_->patchable_ = false;
  refuse({}, "packed");
  for (const char* text : {"cat", "cat = much", "= 1", "cat = -1", "cat = 3", "cat = 1 2",
                           "cat = nan", "cat = 1\nCat = 1"}) {
    const NodeInputs bad(node_.schema(), {{"concept_strengths", std::string(text)}});
    EXPECT_NE(message_of([&] { node_.validate(bad); }).find("concept strengths"), std::string::npos)
        << text;
  }
  EXPECT_NO_THROW(node_.validate(NodeInputs(node_.schema(), {})));
}

TEST_P(LoraFuseTest, CancelAtEveryCheckLeavesModelAndNextRunIntact) {
  LoraFuseNode reference;
  testing::CountingProgress counter;
  const at::Tensor expected = change(reference.run(inputs(), counter));
  LoraFuseNode node;
  for (int64_t at = 1; at <= counter.checks; ++at) {
    testing::CountingProgress progress;
    progress.cancel_at = at;
    try {
      node.run(inputs(), progress);
    } catch (const testing::Cancelled&) {
    }
    progress.cancel_at = -1;
    EXPECT_TRUE(at::equal(change(node.run(inputs(), progress)), expected)) << at;
  }
}

TEST_P(LoraFuseTest, BundlesGoThroughAFile) {
  const testing::TemporaryFolder folder;
  SaveBundleNode save(folder.path(""));
  const NodeResult saved =
      save.run(NodeInputs(save.schema(),
                          {{"loras", Bundle(loras_)}, {"filename_prefix", std::string("x/b")}}),
               progress_);
  ASSERT_TRUE(saved.files.at(0).ends_with("x/b_00001_.safetensors"));
  LoadBundleNode load(folder.path(""));
  const NodeInputs file(load.schema(), {{"file", std::string("x/b_00001_.safetensors")}});
  const NodeResult loaded = load.run(file, progress_);
  const auto& set = *std::get<std::shared_ptr<const ConceptSet>>(loaded.outputs[1]);
  EXPECT_EQ(set.concepts[1].target, "owl");
  EXPECT_EQ(set.preserve, loras_->preserve);
  EXPECT_NE(loaded.text.at(0).find("2 concepts: cat, owl"), std::string::npos);
  EXPECT_LT(relative_difference(change(run({{"loras", loaded.outputs[0]}})), change(run())), 1e-4);

  // A host that keeps results notices that the file is another one now.
  const std::string before = load.outside_state(file);
  EXPECT_EQ(load.outside_state(file), before);
  save_bundle(*bundle({"fox"}), saved.files[0]);
  EXPECT_NE(load.outside_state(file), before);
  std::filesystem::remove(saved.files[0]);
  EXPECT_EQ(load.outside_state(file), "absent");
  EXPECT_EQ(load.outside_state(NodeInputs(load.schema(), {}, {"file"})), "");
  EXPECT_TRUE(load.schema().reads_files);
}

TEST_P(LoraFuseTest, BundleFilesStayInTheirFolder) {
  const testing::TemporaryFolder folder;
  SaveBundleNode save(folder.path("out"));
  LoadBundleNode load(folder.path("out"));
  for (const char* name : {"", "../x.safetensors", "a/../../x.safetensors", "/etc/passwd"}) {
    const NodeInputs file(load.schema(), {{"file", std::string(name)}});
    EXPECT_NE(message_of([&] {
                load.validate(file);
              }).find(*name == '\0' ? "the file name is empty" : "leaves the output folder"),
              std::string::npos);
    EXPECT_NE(message_of([&] { load.run(file, progress_); }), "");
    const NodeInputs prefix(save.schema(), {{"filename_prefix", std::string(name)}});
    EXPECT_NE(message_of([&] { save.validate(prefix); }), "");
  }
  const NodeInputs absent(load.schema(), {{"file", std::string("nope.safetensors")}});
  EXPECT_NO_THROW(load.validate(absent));  // it may be written by the same workflow
  EXPECT_NE(message_of([&] { load.run(absent, progress_); }).find("no file 'nope.safetensors'"),
            std::string::npos);
  const NodeInputs empty(save.schema(), {{"loras", Bundle(std::make_shared<LoraBundle>())}});
  EXPECT_NE(message_of([&] { save.run(empty, progress_); }).find("no concept"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(folder.path("out")));
}

}  // namespace
}  // namespace lacuna
