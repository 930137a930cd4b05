// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <sys/wait.h>
#include <unistd.h>

#include <ctime>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>

#include "drawn.h"
#include "lacuna/error.h"
#include "lacuna/files/safetensors_file.h"
#include "nodes/attention_refine_node.h"
#include "nodes/concept_set_node.h"
#include "nodes/edit_report.h"
#include "nodes/file_name.h"
#include "nodes/node_registry.h"
#include "nodes/save_lora_node.h"
#include "support/fake_host.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::FakeDenoiser;
using testing::FakeTextEncoder;
using testing::message_of;
using testing::relative_difference;

using Values = std::map<std::string, Value>;

std::shared_ptr<const ConceptSet> concepts_of(const std::string& text, Values more = {}) {
  ConceptSetNode node;
  more["concepts"] = text;
  more.try_emplace("general_prior", std::string("none"));
  more.try_emplace("templates", int64_t{4});
  SilentProgress progress;
  return std::get<std::shared_ptr<const ConceptSet>>(
      node.run(NodeInputs(node.schema(), std::move(more)), progress).outputs[0]);
}

TEST(Schemas, AreCompleteAndSerialise) {
  const NodeRegistry registry = NodeRegistry::with_lacuna_nodes("output");
  const auto json = nlohmann::json::parse(to_json(registry.schemas()));
  ASSERT_EQ(json.size(), registry.schemas().size());
  std::set<std::string> ids;
  for (const auto& node : json) {
    EXPECT_TRUE(ids.insert(node["id"]).second);
    EXPECT_TRUE(node["id"].get<std::string>().starts_with("Lacuna"));
    EXPECT_EQ(node["category"], "lacuna");
    EXPECT_FALSE(node["description"].get<std::string>().empty());
    for (const auto& input : node["inputs"]) {
      EXPECT_FALSE(input["tooltip"].get<std::string>().empty()) << input["id"];
      if (input["type"] == "COMBO") {
        const auto& options = input["options"];
        EXPECT_NE(std::find(options.begin(), options.end(), input["default"]), options.end());
      }
    }
    for (const auto& output : node["outputs"]) {
      EXPECT_FALSE(output["tooltip"].get<std::string>().empty()) << output["id"];
    }
  }
  EXPECT_EQ(registry.find("nope"), nullptr);
  EXPECT_NE(message_of([&] { registry.at("nope"); }).find("LacunaConceptSet"), std::string::npos);
}

// Saved workflows store widgets by position: this order may only grow.
TEST(Schemas, InputOrderIsFrozen) {
  const auto ids = [](const NodeSchema& schema) {
    std::vector<std::string> list;
    for (const InputSpec& input : schema.inputs) list.push_back(input.id);
    return list;
  };
  EXPECT_EQ(ids(ConceptSetNode().schema()),
            (std::vector<std::string>{"concepts", "kind", "default_anchor", "preserve",
                                      "general_prior", "templates", "previous"}));
  EXPECT_EQ(ids(AttentionRefineNode().schema()),
            (std::vector<std::string>{"model", "clip", "concepts", "method", "strength", "matrices",
                                      "read_at", "regularization", "preserve_weight",
                                      "prior_weight", "adversarial_rounds", "apply_as", "lora_rank",
                                      "lora_rank_limit", "pooled_text", "retain_set", "where"}));
  EXPECT_EQ(ids(SaveLoraNode("output").schema()),
            (std::vector<std::string>{"lora", "filename_prefix"}));
}

TEST(SaveLoraNodeTest, WritesNumberedFilesBelowItsFolder) {
  const testing::TemporaryFolder folder;
  SaveLoraNode node(folder.path(""));
  const auto lora = std::make_shared<const LoraTensors>(
      LoraTensors{{"lora_unet_x.lora_up.weight", at::ones({3, 1}, at::kHalf)}});
  const NodeInputs inputs(node.schema(), {{"lora", lora}, {"filename_prefix", std::string("a/b")}});
  SilentProgress progress;
  const NodeResult first = node.run(inputs, progress);
  EXPECT_TRUE(node.run(inputs, progress).files.at(0).ends_with("b_00002_.safetensors"));
  const SafetensorsFile file = load_safetensors(first.files.at(0));
  EXPECT_TRUE(
      at::equal(file.tensors.at("lora_unet_x.lora_up.weight"), at::ones({3, 1}, at::kHalf)));
  EXPECT_NE(std::get<std::string>(first.outputs.at(0)).find(first.files[0]), std::string::npos);
  const std::vector<std::pair<std::string, std::string>> refused{
      {"../x", "leaves the output folder"},
      {"/x", "leaves the output folder"},
      {"", "the filename prefix is empty"},
      {"a/..", "is a folder"},
      {"   ", "is blank; write a name"},
      {"\u00a0\u200b", "is blank; write a name"},
      {"loras/a\nb", "'loras/a\\nb' holds a line break or another control character"},
      {"a\x07", "control character"},
      {std::string("loras/a\0b", 9), "'loras/a?b' holds a NUL character"},
      {std::string(260, 'x'), "too long: 279 bytes with its number, and 255 is the limit"},
      {std::string(90, 'x') + std::string(150, 'y') + "%date:yyyy-MM-dd%", "is too long"},
      {std::string(300, 'x') + "/a", "is too long"},
  };
  for (const auto& [prefix, expected] : refused) {
    const NodeInputs bad(node.schema(), {{"lora", lora}, {"filename_prefix", prefix}});
    for (const auto& call : std::vector<std::function<void()>>{[&] { node.validate(bad); },
                                                               [&] { node.run(bad, progress); }}) {
      const std::string message = message_of(call);
      EXPECT_NE(message.find(expected), std::string::npos) << message;
      EXPECT_LT(message.size(), 400u);
    }
  }
  // The longest that fits, and no longer.
  const std::string longest(255 - std::string("_00001_.safetensors").size(), 'x');
  EXPECT_EQ(
      node.run(NodeInputs(node.schema(), {{"lora", lora}, {"filename_prefix", longest}}), progress)
          .files.size(),
      1u);
}

// Two ComfyUIs on one output folder: every save keeps its file.
TEST(SaveLoraNodeTest, TwoProcessesNeverTakeOneName) {
  constexpr int kSaves = 40;
  const testing::TemporaryFolder folder;
  SaveLoraNode node(folder.path(""));
  const NodeInputs inputs(node.schema(), {{"lora", std::make_shared<const LoraTensors>(LoraTensors{
                                                       {"x.lora_up.weight", at::ones({30, 10})}})},
                                          {"filename_prefix", std::string("loras/one")}});
  int start[2];  // closed by this process: both begin at once
  ASSERT_EQ(pipe(start), 0);
  std::vector<pid_t> children;
  for (int i = 0; i < 2; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      SilentProgress progress;
      close(start[1]);
      char byte = 0;
      bool saved = read(start[0], &byte, 1) == 0;
      for (int n = 0; n < kSaves; ++n) {
        saved = std::filesystem::exists(node.run(inputs, progress).files.at(0)) && saved;
      }
      _exit(saved ? 0 : 1);
    }
    children.push_back(child);
  }
  close(start[0]);
  close(start[1]);
  for (const pid_t child : children) {
    int status = -1;
    waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
  }
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path("loras"))) {
    EXPECT_EQ(entry.path().extension(), ".safetensors");
    ++files;
  }
  EXPECT_EQ(files, 2 * kSaves);
}

TEST(FileNames, AreFilledInAsComfyUIDoes) {
  std::tm now{};
  now.tm_year = 2026 - 1900;
  now.tm_mon = 2;
  now.tm_mday = 7;
  now.tm_hour = 4;
  now.tm_min = 5;
  now.tm_sec = 59;
  const auto named = [&](const std::string& name) { return with_time(name, now, 64, 32); };
  EXPECT_EQ(named("%year%-%month%-%day%/%hour%%minute%%second%"), "2026-03-07/040559");
  EXPECT_EQ(named("%width%x%height%"), "64x32");
  EXPECT_EQ(named("a_%date:yyyy-MM-dd%_%date:hhmmss%"), "a_2026-03-07_040559");
  EXPECT_EQ(named("%date:hh:mm:ss%"), "04_05_59");  // Windows allows no ':'
  EXPECT_EQ(named("%date:d.M.yy h-m-s yyy dddd%"), "7.3.26 4-5-59 yyy 0707");
  for (const char* plain : {"100%", "%%", "50% of %it", "%Year%", "%unknown% %", "%date%", ""}) {
    EXPECT_EQ(named(plain), plain);
  }
  EXPECT_EQ(named("5%_%year%"), "5%_2026");
  EXPECT_EQ(with_time("%width%", now), "0");  // as ComfyUI's own savers without a picture

  const WidgetTexts widgets{{"KSampler.seed", "7"}, {"Words.text", "../a:b\n\"c\"%"}};
  EXPECT_EQ(with_widgets("x_%KSampler.seed%_%KSampler.cfg%", widgets), "x_7_%KSampler.cfg%");
  EXPECT_EQ(with_widgets("%Words.text%", widgets), ".._a_b__c_%");
}

TEST(FileNames, ThatEverySystemTakesAreTaken) {
  for (const char* name : {"a", "loras/forget me not", "a/./b", "controls/console", "com10",
                           "aux_1", ".hidden", "100%", "梟", "an owl.", "a/b "}) {
    EXPECT_EQ(message_of([&] { check_file_name(name, true); }), "") << name;
  }
}

TEST(FileNames, ThatWindowsRefusesAreToldThere) {
  const std::vector<std::pair<std::string, std::string>> refused{
      {"CON", "'CON', which Windows keeps for a device"},
      {"a/aux.txt", "'aux.txt', which Windows keeps"},
      {"lpt1/a", "'lpt1', which Windows keeps"},
      {"nul .x", "which Windows keeps"},
      {"a./b", "a folder that ends with a dot or a space"},
      {"a /b", "a folder that ends with a dot or a space"},
      {"a<b", "holds '<', which Windows"},
      {"a>b", "holds '>'"},
      {"a:b", "holds ':'"},
      {"a\"b", "holds '\"'"},
      {"a|b", "holds '|'"},
      {"a?", "holds '?'"},
      {"*", "holds '*'"},
  };
  for (const auto& [name, expected] : refused) {
    const std::string message = message_of([&] { check_file_name(name, true); });
    EXPECT_NE(message.find(expected), std::string::npos) << message;
    // Elsewhere graphs that saved under such a name go on doing so.
    EXPECT_EQ(message_of([&] { check_file_name(name, false); }), "") << name;
  }
}

TEST(NodeInputsTest, TypesRangesAndOptions) {
  const AttentionRefineNode node;
  const auto refuse = [&](Values values, const std::string& expected) {
    const std::string message = message_of([&] { NodeInputs(node.schema(), values); });
    EXPECT_NE(message.find(expected), std::string::npos) << message;
  };
  refuse({{"strength", std::string("much")}}, "must be a number");
  refuse({{"strength", 3.0}}, "out of range (0 to 2)");
  refuse({{"strength", std::nan("")}}, "out of range");
  refuse({{"adversarial_rounds", 1.5}}, "whole number");
  refuse({{"adversarial_rounds", std::string("1")}}, "whole number");
  refuse({{"method", std::string("magic")}}, "mace, uce");
  refuse({{"method", 1.0}}, "must be text");
  const NodeInputs inputs(node.schema(), {{"strength", int64_t{1}}, {"lora_rank", 8.0}});
  EXPECT_EQ(inputs.number("strength"), 1.0);
  EXPECT_EQ(inputs.integer("lora_rank"), 8);
  EXPECT_EQ(inputs.string("method"), "uce");
  EXPECT_NE(message_of([&] { inputs.get<std::shared_ptr<Denoiser>>("model"); }).find("missing"),
            std::string::npos);
  EXPECT_NE(message_of([&] { inputs.any("model"); }), "");
  const NodeSchema flag{.id = "x",
                        .display_name = "X",
                        .inputs = {{.id = "on", .type = socket::kBoolean, .default_value = true}}};
  EXPECT_TRUE(NodeInputs(flag, {}).boolean("on"));
  EXPECT_NE(message_of([&] { NodeInputs(flag, {{"on", int64_t{1}}}); }), "");
}

TEST(ConceptSetNodeTest, ReadsWidgetsAndChains) {
  const auto first = concepts_of("van gogh style", {{"kind", std::string("style")}});
  EXPECT_EQ(first->concepts[0].anchor, "art");
  const auto both = concepts_of("church", {{"previous", first}, {"preserve", std::string("barn")}});
  ASSERT_EQ(both->concepts.size(), 2u);
  EXPECT_EQ(both->concepts[0].kind, ConceptKind::kStyle);
  EXPECT_EQ(both->preserve[0].phrase, "barn");
  // The rules hold across the chain, too.
  EXPECT_NE(message_of([&] { concepts_of("Van Gogh style", {{"previous", first}}); }), "");
}

TEST(ConceptSetNodeTest, ReportsWhatItRead) {
  ConceptSetNode node;
  SilentProgress progress;
  const NodeResult result = node.run(
      NodeInputs(node.schema(), {{"concepts", std::string("- hamburger => apple | burger\n- a, b")},
                                 {"preserve", std::string("\"pizza\"")}}),
      progress);
  EXPECT_EQ(std::get<std::string>(result.outputs[2]),
            "Erases 2 concepts, keeps 1 phrase.\n"
            "'hamburger' -> 'apple', with 'burger'\n"
            "'a, b' -> 'scenery'\n"
            "In 'concepts':\n"
            "Lines 1, 2: bullets left out.\n"
            "Line 1: '=>' read as '->'.\n"
            "Check line 2: 'a, b' is read as one phrase, commas and all; write each on a line of "
            "its own if these are several, or target -> anchor if these are two columns.\n"
            "In 'preserve':\n"
            "Line 1: quotes left out.");
  EXPECT_EQ(result.text, std::vector<std::string>{std::get<std::string>(result.outputs[2])});
}

TEST(ConceptSetNodeTest, ValidatesBeforeQueueing) {
  const ConceptSetNode node;
  const auto message = [&](Values values) {
    return message_of([&] { node.validate(NodeInputs(node.schema(), std::move(values))); });
  };
  EXPECT_NE(message({{"concepts", std::string(" ")}}).find("no concept"), std::string::npos);
  EXPECT_NE(message({{"concepts", std::string("{\"format\": 1}")}}), "");
  EXPECT_EQ(message({{"concepts", std::string("church")}}), "");
  // A linked widget is not judged by its default ("church").
  const NodeInputs linked(node.schema(), {{"preserve", std::string("church")}}, {"concepts"});
  EXPECT_NO_THROW(node.validate(linked));
}

TEST(ConceptSetNodeTest, ItsJsonOutputIsItsInputFormat) {
  ConceptSetNode node;
  SilentProgress progress;
  const auto result = node.run(
      NodeInputs(node.schema(), {{"concepts", std::string("church -> field | abbey")}}), progress);
  const auto json = std::get<std::string>(result.outputs[1]);
  const auto again = concepts_of(json, {{"general_prior", std::string("small")}});
  EXPECT_EQ(*again, *std::get<std::shared_ptr<const ConceptSet>>(result.outputs[0]));
}

class AttentionRefineTest : public testing::DeviceTest {
 protected:
  Values inputs(Values more = {}) {
    more.try_emplace("model", std::shared_ptr<Denoiser>(model_));
    more.try_emplace("clip", std::shared_ptr<TextEncoder>(clip_));
    more.try_emplace("concepts",
                     concepts_of("black cat -> fog\nowl", {{"preserve", std::string("dog")}}));
    return more;
  }
  NodeResult run(Values more = {}) {
    return node_.run(NodeInputs(node_.schema(), inputs(std::move(more))), progress_);
  }
  static std::shared_ptr<FakeDenoiser> model_of(const NodeResult& result) {
    return std::dynamic_pointer_cast<FakeDenoiser>(
        std::get<std::shared_ptr<Denoiser>>(result.outputs[0]));
  }
  static std::string report_of(const NodeResult& result) {
    return std::get<std::string>(result.outputs[3]);
  }
  static const Refinement& refinement_of(const NodeResult& result) {
    return *std::get<std::shared_ptr<const Refinement>>(result.outputs[1]);
  }

  std::shared_ptr<FakeDenoiser> model_ = std::make_shared<FakeDenoiser>(3, 16, device());
  std::shared_ptr<FakeTextEncoder> clip_ = std::make_shared<FakeTextEncoder>(16, device());
  AttentionRefineNode node_;
  testing::CountingProgress progress_;
};
INSTANTIATE_TEST_SUITE_P(Devices, AttentionRefineTest, ::testing::ValuesIn(testing::devices()));

TEST_P(AttentionRefineTest, EveryMatrixGetsTheSameEditAndTheInputStays) {
  std::map<std::string, at::Tensor> before;
  for (const auto& [name, weight] : model_->weights_) before[name] = weight.clone();
  const NodeResult result = run();
  const at::Tensor delta = refinement_of(result).delta;
  for (const auto& [name, weight] : model_->weights_) {
    EXPECT_TRUE(at::equal(weight, before[name]));
    const at::Tensor w = weight.cpu().to(at::kDouble);
    const at::Tensor patched = model_of(result)->weights_.at(name);
    EXPECT_EQ(patched.device().type(), device().type());
    EXPECT_LT(relative_difference(patched, w + at::matmul(w, delta)), 2e-6);
  }
  EXPECT_EQ(result.outputs.size(), node_.schema().outputs.size());
  EXPECT_NE(std::get<std::string>(result.outputs[3]).find("black cat -> fog"), std::string::npos);
}

TEST_P(AttentionRefineTest, LinearInStrengthAndZeroIsTheModel) {
  const auto full = model_of(run());
  const auto half = model_of(run({{"strength", 0.5}}));
  const auto none = model_of(run({{"strength", 0.0}}));
  for (const auto& [name, weight] : model_->weights_) {
    EXPECT_TRUE(at::equal(none->weights_.at(name), weight));
    EXPECT_LT(relative_difference(half->weights_.at(name) - weight,
                                  0.5 * (full->weights_.at(name) - weight)),
              1e-4);
  }
}

TEST_P(AttentionRefineTest, ConditioningFormGivesTheSamePictures) {
  const NodeResult weights = run({{"apply_as", std::string("weights")}});
  model_->patchable_ = false;
  const NodeResult conditioning = run();  // auto
  EXPECT_EQ(model_of(conditioning)->input_maps_.size(), model_->projections_.size());
  SamplingRequest request;
  request.steps = 1;
  request.positive = clip_->encode({"a photo of black cat"});
  request.latent = at::zeros({1, 4, 2, 2});
  const auto sample = [&](Denoiser& model) {
    return model.sample(request, [](int64_t, int64_t) {});
  };
  EXPECT_LT(relative_difference(sample(*model_of(conditioning)), sample(*model_of(weights))), 1e-4);
  EXPECT_GT(relative_difference(sample(*model_), sample(*model_of(weights))), 1e-3);
  EXPECT_NE(message_of([&] { run({{"apply_as", std::string("weights")}}); }).find("packed"),
            std::string::npos);
}

TEST_P(AttentionRefineTest, TheReportSaysWhatSavingMeans) {
  const auto says = [&](Values more, const std::string& part) {
    const std::string text = run(std::move(more)).text[0];
    EXPECT_NE(text.find(part), std::string::npos) << text;
    return text;
  };
  EXPECT_EQ(says({}, "Applied to the weights.").find("Save Checkpoint"), std::string::npos);
  const std::string chosen =
      says({{"apply_as", std::string("conditioning")}}, "as 'apply as' says");
  EXPECT_EQ(chosen.find("packed"), std::string::npos) << chosen;
  EXPECT_NE(chosen.find("Save Checkpoint writes the model with the concepts still in it"),
            std::string::npos);
  model_->patchable_ = false;
  EXPECT_NE(says({}, "because this model's weights are packed").find("save the LoRA"),
            std::string::npos);
  says({{"strength", 0.0}}, "the model is unchanged");
}

TEST_P(AttentionRefineTest, TheReportWarnsOfViolentEdits) {
  const auto report = [&](Values more) { return run(std::move(more)).text[0]; };
  EXPECT_EQ(report({}).find("Warning"), std::string::npos);
  // What the prompts hardly ever hold is turned around when nothing resists.
  const std::string violent = report({{"regularization", 0.0},
                                      {"strength", 2.0},
                                      {"concepts", concepts_of("black cat -> fog\nowl -> tree")}});
  for (const char* part : {"Warning: ", "damages pictures", "raise 'regularization' to 10",
                           "lower 'strength'", "'general prior'", "'preserve'"}) {
    EXPECT_NE(violent.find(part), std::string::npos) << violent;
  }
}

TEST(ViolenceWarningTest, JudgesByWhatHoldsTheRestOfTheModel) {
  const auto warning = [](double relative, RetainSetSize asked, int64_t retained,
                          GeneralPriorSize prior) {
    return violence_warning({.relative = relative,
                             .concepts = 1,
                             .preserved = 0,
                             .retain_asked = asked,
                             .retained = retained,
                             .general_prior = prior,
                             .regularization = 10.0});
  };
  const auto none = RetainSetSize::kNone, small = RetainSetSize::kSmall;
  const auto prior = GeneralPriorSize::kSmall, no_prior = GeneralPriorSize::kNone;
  EXPECT_EQ(warning(0.3, none, 0, no_prior), "");
  EXPECT_NE(warning(0.5, none, 0, no_prior), "");
  EXPECT_EQ(warning(1.4, none, 0, prior), "");
  EXPECT_NE(warning(2.0, none, 0, prior).find("set 'retain set' to small"), std::string::npos);
  EXPECT_EQ(warning(6.3, small, 199, prior), "");
  EXPECT_NE(warning(8.0, small, 199, prior), "");
  // A style is erased without the words that were asked for.
  const std::string style = warning(2.0, small, 0, prior);
  EXPECT_NE(style, "");
  EXPECT_EQ(style.find("retain set"), std::string::npos) << style;
}

TEST_P(AttentionRefineTest, ValueOnlyLeavesKeysAlone) {
  const auto patched = model_of(run({{"matrices", std::string("value")}}));
  for (const auto& projection : model_->projections_) {
    EXPECT_EQ(
        at::equal(patched->weights_.at(projection.name), model_->weights_.at(projection.name)),
        projection.role == EntryRole::kKey);
  }
  model_->patchable_ = false;
  const auto mapped = model_of(run({{"matrices", std::string("value")}}));
  for (const auto& projection : model_->projections_) {
    EXPECT_EQ(mapped->input_maps_.contains(projection.name), projection.role == EntryRole::kValue);
  }
}

TEST_P(AttentionRefineTest, UpstreamPatchesChangeTheWeightsButNotTheMatrix) {
  const NodeResult plain = run();
  std::vector<WeightDelta> lora;
  for (const auto& [name, weight] : model_->weights_)
    lora.push_back({name, 0.3 * at::ones_like(weight), {}});
  const auto upstream = model_->with_weight_deltas(lora, 1.0);
  const NodeResult result = run({{"model", upstream}});
  EXPECT_TRUE(at::equal(refinement_of(result).delta, refinement_of(plain).delta));
  for (const auto& [name, weight] : model_->weights_) {
    const at::Tensor w = (weight + 0.3).cpu().to(at::kDouble);
    EXPECT_LT(relative_difference(model_of(result)->weights_.at(name),
                                  w + at::matmul(w, refinement_of(plain).delta)),
              2e-6);
  }
}

TEST_P(AttentionRefineTest, SameInputsSameResultAndStrengthNeedsNoEncoding) {
  const NodeResult first = run();
  const int64_t encoded = clip_->encoded_prompts;
  const NodeResult second = run({{"strength", 0.7}, {"regularization", 1.0}});
  EXPECT_EQ(clip_->encoded_prompts, encoded);
  AttentionRefineNode fresh;
  const NodeResult third = fresh.run(NodeInputs(fresh.schema(), inputs()), progress_);
  EXPECT_LT(relative_difference(refinement_of(third).delta, refinement_of(first).delta), 1e-12);
}

// What a strength does not change is kept, for as long as the model's weights are the same.
TEST_P(AttentionRefineTest, AnotherStrengthComputesNothingAnew) {
  const auto lora_of = [](const NodeResult& result) {
    return *std::get<std::shared_ptr<const LoraTensors>>(result.outputs[2]);
  };
  const std::string up = model_->projections_.front().lora_name + ".lora_up.weight";
  model_->revision_ = "first";
  const NodeResult first = run();
  const NodeResult half = run({{"strength", 0.5}});
  EXPECT_EQ(&refinement_of(half), &refinement_of(first)) << "the same edit";
  AttentionRefineNode fresh;
  const NodeResult anew =
      fresh.run(NodeInputs(fresh.schema(), inputs({{"strength", 0.5}})), progress_);
  EXPECT_NE(&refinement_of(anew), &refinement_of(first));
  for (const auto& [name, weight] : model_of(anew)->weights_) {
    EXPECT_TRUE(at::equal(model_of(half)->weights_.at(name), weight)) << name;
  }
  EXPECT_LT(relative_difference(lora_of(half).at(up), 0.5 * lora_of(first).at(up).to(at::kFloat)),
            1e-3);
  EXPECT_EQ(report_of(half), report_of(anew));

  for (auto& [name, weight] : model_->weights_) weight = 2 * weight;  // a LoRA upstream, say
  model_->revision_ = "second";
  const NodeResult other = run();
  EXPECT_NE(&refinement_of(other), &refinement_of(first));
  EXPECT_GT(relative_difference(lora_of(other).at(up), lora_of(first).at(up)), 0.1);
  EXPECT_NE(&refinement_of(run({{"lora_rank", int64_t{1}}})), &refinement_of(other));
  model_->revision_ = "";  // nobody can say: never kept
  EXPECT_NE(&refinement_of(run()), &refinement_of(run()));
}

TEST(Schemas, SavedGraphsKeepWhatTheyDid) {
  const AttentionRefineNode node;
  const NodeInputs saved(node.schema(), {});  // from before these inputs were there
  EXPECT_EQ(saved.string("retain_set"), "none");
  EXPECT_EQ(saved.string("where"), "every prompt");
  for (const char* id : {"retain_set", "where"}) {
    EXPECT_TRUE(find_input(node.schema(), id)->optional) << id;
  }
  const auto declared = nlohmann::json::parse(to_json({node.schema()}))[0]["inputs"];
  EXPECT_EQ(declared.back()["default"], "prompts that name it");
  EXPECT_EQ(declared.back()["saved"], "every prompt");
}

// The edit on prompts that name a concept, and what stays as it was.
TEST_P(AttentionRefineTest, ActsWhereAPromptNamesAConcept) {
  clip_ = std::make_shared<FakeTextEncoder>(96, device());
  model_ = std::make_shared<FakeDenoiser>(3, 96, device());
  clip_->vocabulary_ = testing::vocabulary(60);
  const Values named{{"where", std::string("prompts that name it")},
                     {"retain_set", std::string("small")}};
  const NodeResult result = run(named);
  EXPECT_TRUE(model_of(result)->gate_ != nullptr);
  for (const auto& [name, weight] : model_->weights_) {
    EXPECT_TRUE(at::equal(model_of(result)->weights_.at(name), weight)) << "no weight is patched";
  }
  const auto drawn = [&](Denoiser& model, const std::string& prompt) {
    return testing::drawn(model, *clip_, prompt);
  };
  EXPECT_TRUE(at::equal(drawn(*model_of(result), "a photo of wordac"),
                        drawn(*model_, "a photo of wordac")));
  EXPECT_FALSE(
      at::equal(drawn(*model_of(result), "a photo of owl"), drawn(*model_, "a photo of owl")));
  const std::string report = report_of(result);
  EXPECT_NE(report.find("Acts on prompts that name a concept"), std::string::npos);
  EXPECT_NE(report.find("Retain set: "), std::string::npos);
  EXPECT_FALSE(std::get<std::shared_ptr<const LoraTensors>>(result.outputs[2])->empty());

  // The prompts' own CLIP: what names a concept word for word, beside anything else.
  const auto clip_of = [](const NodeResult& given) {
    return std::get<std::shared_ptr<TextEncoder>>(given.outputs[4]);
  };
  const std::shared_ptr<TextEncoder> edited = clip_of(result);
  for (const char* prompt : {"a photo of owl", "wordaf wordba owl and wordac", "two owls"}) {
    EXPECT_FALSE(at::equal(edited->conditioning({prompt}), clip_->conditioning({prompt})))
        << prompt;
    EXPECT_TRUE(at::equal(edited->encode({prompt}), clip_->encode({prompt}))) << prompt;
  }
  EXPECT_TRUE(at::equal(edited->conditioning({"a photo of wordac"}),
                        clip_->conditioning({"a photo of wordac"})));
  EXPECT_NE(report.find("this node's clip"), std::string::npos);
  // As the map on the model makes it.
  const at::Tensor delta = model_of(result)->input_maps_.begin()->second;
  const at::Tensor rows = clip_->encode({"a photo of owl"});
  EXPECT_LT(relative_difference(edited->conditioning({"a photo of owl"}),
                                rows + at::matmul(rows, delta.t().to(rows))),
            1e-5);
  for (Values other : {Values{{"where", std::string("every prompt")}},
                       Values{{"where", std::string("prompts that name it")}, {"strength", 0.0}},
                       Values{{"where", std::string("prompts that name it")}, {"strength", 0.5}},
                       Values{{"where", std::string("prompts that name it")},
                              {"matrices", std::string("value")}}}) {
    EXPECT_EQ(clip_of(run(std::move(other))), clip_) << "no embedding is mapped";
  }

  Values weights = named;
  weights["apply_as"] = std::string("weights");
  EXPECT_NE(message_of([&] { run(weights); }).find("weights act on every prompt"),
            std::string::npos);
  Values pooled = named;
  pooled["pooled_text"] = true;
  EXPECT_NE(message_of([&] { run(pooled); }).find("turn 'pooled text' off"), std::string::npos);
}

// What keeps all words keeps the style that stands behind them.
TEST_P(AttentionRefineTest, TheRetainSetIsNotHeldAgainstAStyle) {
  clip_->vocabulary_ = {"house", "tree", "river", "boat", "stone", "cloud"};
  const auto edit = [&](const char* kind, const char* size, const char* where) {
    return run({{"concepts", concepts_of("fauve style", {{"kind", std::string(kind)}})},
                {"retain_set", std::string(size)},
                {"where", std::string(where)}});
  };
  const NodeResult none = edit("style", "none", "every prompt");
  for (const char* where : {"every prompt", "prompts that name it"}) {
    const NodeResult small = edit("style", "small", where);
    EXPECT_TRUE(at::equal(refinement_of(small).delta, refinement_of(none).delta)) << where;
    EXPECT_NE(report_of(small).find("Retain set: none, because it would keep the style alive"),
              std::string::npos);
  }
  EXPECT_EQ(report_of(none).find("Retain set"), std::string::npos);
  EXPECT_GT(relative_difference(refinement_of(edit("object", "small", "every prompt")).delta,
                                refinement_of(edit("object", "none", "every prompt")).delta),
            0.01);
}

TEST_P(AttentionRefineTest, AnEditOfWordsThatTheEncoderDoesNotKnowIsNoSuccess) {
  class Deaf final : public FakeTextEncoder {
   public:
    using FakeTextEncoder::FakeTextEncoder;
    std::string fingerprint() override { return "deaf"; }
    at::Tensor encode(const std::vector<std::string>& prompts) override {
      return at::ones_like(FakeTextEncoder::encode(prompts));
    }
  };
  const char* warning = "Warning: nothing was changed";
  const auto deaf = std::make_shared<Deaf>(16, device());
  const std::string report = report_of(run({{"clip", std::shared_ptr<TextEncoder>(deaf)}}));
  EXPECT_NE(report.find(warning), std::string::npos) << report;
  EXPECT_EQ(report_of(run()).find(warning), std::string::npos);
}

// SDXL's pooled vector: edited in its own columns, and only when asked.
TEST_P(AttentionRefineTest, PooledTextIsAnotherStream) {
  class Encoder final : public FakeTextEncoder {
   public:
    using FakeTextEncoder::FakeTextEncoder;
    TextEmbedding embed(const std::vector<std::string>& prompts) override {
      const at::Tensor context = encode(prompts);
      return {context, context.select(1, 76).narrow(1, 0, 12).clone()};
    }
  };
  const auto encoder = std::make_shared<Encoder>(16, device());
  const Values with{{"clip", std::shared_ptr<TextEncoder>(encoder)}, {"pooled_text", true}};
  EXPECT_NE(report_of(run(with)).find("Pooled text: this model (SD1.x) reads none"),
            std::string::npos);
  model_->weights_["label_emb"] =
      testing::random_matrix(20, 15).to(at::TensorOptions(at::kFloat).device(device()));
  model_->projections_.push_back({.name = "label_emb",
                                  .lora_name = "lora_unet_label_emb",
                                  .role = EntryRole::kInput,
                                  .stream = std::string(kPooledStream),
                                  .first_column = 0,
                                  .columns = 12});
  const at::Tensor base = model_->weights_.at("label_emb");
  EXPECT_TRUE(at::equal(model_of(run())->weights_.at("label_emb"), base)) << "not asked for";
  const NodeResult result = run(with);
  const at::Tensor change = model_of(result)->weights_.at("label_emb") - base;
  EXPECT_GT(change.narrow(1, 0, 12).norm().item<double>(), 0.01 * base.norm().item<double>());
  EXPECT_EQ(change.narrow(1, 12, 3).abs().max().item<double>(), 0.0);
  EXPECT_NE(report_of(result).find("Pooled text: edited"), std::string::npos);
  const auto& lora = *std::get<std::shared_ptr<const LoraTensors>>(result.outputs[2]);
  const at::Tensor product =
      at::matmul(lora.at("lora_unet_label_emb.lora_up.weight").to(at::kFloat),
                 lora.at("lora_unet_label_emb.lora_down.weight").to(at::kFloat));
  EXPECT_EQ(product.size(1), 15);
  EXPECT_LT(relative_difference(product, change.cpu()), 0.011);
  EXPECT_NE(message_of([&] { run({{"pooled_text", true}}); }).find("CLIP gives none"),
            std::string::npos);
}

TEST_P(AttentionRefineTest, RefusesBeforeAnyPromptIsEncoded) {
  const auto refuse = [&](Values more, const std::string& expected) {
    const std::string message = message_of([&] { run(std::move(more)); });
    EXPECT_NE(message.find(expected), std::string::npos) << message;
    EXPECT_EQ(clip_->encoded_prompts, 0);
  };
  refuse({{"concepts", std::make_shared<const ConceptSet>()}}, "no concept to erase");
  refuse({{"method", std::string("mace")}, {"read_at", std::string("subject")}}, "read_at");
  refuse({{"clip", std::shared_ptr<TextEncoder>(std::make_shared<FakeTextEncoder>(24, device()))}},
         "width 24");
  std::string words;
  for (int i = 0; i < 80; ++i) words += "w" + std::to_string(i) + " ";
  refuse({{"concepts", concepts_of(words)}}, "too long");
  model_->weights_.begin()->second[0][0] = NAN;
  refuse({}, "NaN");
  model_->projections_.clear();
  model_->family_ = "SD3";
  refuse({}, "SD3");
  const AttentionRefineNode node;
  EXPECT_NE(message_of([&] {
              node.validate(NodeInputs(node.schema(), {{"method", std::string("mace")},
                                                       {"read_at", std::string("subject")}}));
            }),
            "");
}

TEST_P(AttentionRefineTest, CancelAtEveryCheckLeavesModelAndNextRunIntact) {
  std::map<std::string, at::Tensor> before;
  for (const auto& [name, weight] : model_->weights_) before[name] = weight.clone();
  AttentionRefineNode reference;
  testing::CountingProgress counter;
  const NodeResult expected = reference.run(NodeInputs(reference.schema(), inputs()), counter);
  for (int64_t at = 1; at <= counter.checks; ++at) {
    AttentionRefineNode node;
    testing::CountingProgress progress;
    progress.cancel_at = at;
    EXPECT_THROW(node.run(NodeInputs(node.schema(), inputs()), progress), testing::Cancelled);
    progress.cancel_at = -1;
    const NodeResult again = node.run(NodeInputs(node.schema(), inputs()), progress);
    EXPECT_LT(relative_difference(refinement_of(again).delta, refinement_of(expected).delta),
              1e-12);
  }
  for (const auto& [name, weight] : model_->weights_) EXPECT_TRUE(at::equal(weight, before[name]));
}

TEST_P(AttentionRefineTest, LongListsAreSummarised) {
  std::string text;
  for (int i = 0; i < 12; ++i) text += "thing" + std::to_string(i) + "\n";
  const NodeResult result = run({{"concepts", concepts_of(text, {{"templates", int64_t{1}}})}});
  EXPECT_NE(result.text[0].find("and 2 more"), std::string::npos);
}

}  // namespace
}  // namespace lacuna
