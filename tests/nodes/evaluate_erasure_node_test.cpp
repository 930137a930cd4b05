// SPDX-License-Identifier: Apache-2.0
// The Evaluate Erasure node: its schema, what it refuses, what it hands on.
#include "nodes/evaluate_erasure_node.h"

#include <cmath>

#include "nodes/node_registry.h"
#include "support/fake_host.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::CountingProgress;
using testing::FakeDenoiser;
using testing::FakeTextEncoder;
using testing::message_of;

using Values = std::map<std::string, Value>;

class EvaluateErasureNodeTest : public testing::DeviceTest {
 protected:
  NodeResult run(Values more = {}) {
    ConceptSet set;
    Concept owl;
    owl.target = "owl";
    owl.anchor = "fog";
    set.concepts = {owl};
    set.preserve = {{"dog", ConceptKind::kObject, 4}};
    for (const auto& [id, value] :
         Values{{"base_model", std::shared_ptr<Denoiser>(model_)},
                {"erased_model",
                 model_->with_weight_deltas({{model_->projections_[0].name, edit_, {}}}, 1.0)},
                {"clip", std::shared_ptr<TextEncoder>(clip_)},
                {"vae", std::shared_ptr<ImageDecoder>(vae_)},
                {"concepts", std::make_shared<const ConceptSet>(set)},
                {"prompts", int64_t{1}},
                {"images", int64_t{1}},
                {"steps", int64_t{2}},
                {"width", int64_t{64}},
                {"height", int64_t{64}},
                {"neighbours",
                 std::string("\xEF\xBB\xBF- eagle # a bird\n\n- c# # a word\n- \"hawk\"\n")}}) {
      more.try_emplace(id, value);
    }
    return node_.run(NodeInputs(node_.schema(), std::move(more)), progress_);
  }

  std::shared_ptr<FakeDenoiser> model_ = std::make_shared<FakeDenoiser>(3, 16, device());
  std::shared_ptr<FakeTextEncoder> clip_ = std::make_shared<FakeTextEncoder>(16, device());
  std::shared_ptr<ImageDecoder> vae_ = std::make_shared<testing::FakeImageDecoder>();
  at::Tensor edit_ = at::randn({8, 16}).to(device());
  EvaluateErasureNode node_;
  CountingProgress progress_;
};
INSTANTIATE_TEST_SUITE_P(Devices, EvaluateErasureNodeTest, ::testing::ValuesIn(testing::devices()));

// Saved workflows store widgets and links by position: these orders may only grow.
TEST(EvaluateErasureSchema, OrderIsFrozen) {
  const NodeSchema& schema = EvaluateErasureNode().schema();
  std::vector<std::string> ids, outputs;
  for (const InputSpec& input : schema.inputs) ids.push_back(input.id);
  for (const OutputSpec& output : schema.outputs) outputs.push_back(output.id);
  EXPECT_EQ(ids, (std::vector<std::string>{"base_model",
                                           "erased_model",
                                           "clip",
                                           "vae",
                                           "concepts",
                                           "level",
                                           "prompts",
                                           "images",
                                           "steps",
                                           "cfg",
                                           "sampler",
                                           "evaluation_seed",
                                           "width",
                                           "height",
                                           "neighbours",
                                           "batch",
                                           "detector",
                                           "clip_vision",
                                           "detector_threshold",
                                           "prompt_file",
                                           "file_prompts"}));
  EXPECT_EQ(outputs,
            (std::vector<std::string>{"sheet", "json", "erased", "synonyms", "neighbours",
                                      "unrelated", "harmonic_mean", "report", "harder_concepts"}));
  EXPECT_TRUE(schema.output_node);
  EXPECT_NE(NodeRegistry::with_lacuna_nodes("output").find("LacunaEvaluateErasure"), nullptr);
}

TEST_P(EvaluateErasureNodeTest, GivesASheetAReportAndNumbers) {
  const NodeResult result = run();
  ASSERT_EQ(result.outputs.size(), node_.schema().outputs.size());
  EXPECT_EQ(std::get<at::Tensor>(result.outputs[0]).dim(), 4);
  const auto json = std::get<std::string>(result.outputs[1]);
  EXPECT_NE(json.find("lacuna.evaluation/1"), std::string::npos);
  EXPECT_NE(json.find("\"eagle\""), std::string::npos);
  EXPECT_NE(json.find("\"hawk\""), std::string::npos);
  EXPECT_NE(json.find("\"c#\""), std::string::npos);
  for (size_t i = 2; i < 7; ++i) {
    const double share = std::get<double>(result.outputs[i]);
    EXPECT_GE(share, 0.0);
    EXPECT_LE(share, 1.0);
  }
  EXPECT_EQ(std::get<std::string>(result.outputs[7]), result.text.at(0));
  EXPECT_EQ(std::get<std::string>(run().outputs[1]), json);  // and again
}

TEST_P(EvaluateErasureNodeTest, PreflightNeedsNoPictures) {
  const NodeResult result = run({{"level", std::string("preflight")}});
  EXPECT_TRUE(std::isnan(std::get<double>(result.outputs[5])));  // nothing unrelated was drawn
  EXPECT_NE(result.text.at(0).find("Read off the weights"), std::string::npos) << result.text[0];
}

TEST_P(EvaluateErasureNodeTest, WidgetsAreJudgedBeforeQueueing) {
  const auto message = [&](Values values) {
    return message_of([&] { node_.validate(NodeInputs(node_.schema(), std::move(values))); });
  };
  EXPECT_EQ(message({}), "");
  EXPECT_NE(message({{"width", int64_t{516}}}).find("multiples of 8"), std::string::npos);
  std::string many;
  for (int i = 0; i < 201; ++i) many += "word" + std::to_string(i) + "\n";
  EXPECT_NE(message({{"neighbours", many}}).find("201 lines"), std::string::npos);
  for (const char* typed : {"hawk -> eagle", "hawk | eagle", "(hawk:1.3)", "a; b", "-"}) {
    EXPECT_NE(message({{"neighbours", std::string(typed)}}).find("'neighbours', line 1"),
              std::string::npos)
        << typed;
  }
}

}  // namespace
}  // namespace lacuna
