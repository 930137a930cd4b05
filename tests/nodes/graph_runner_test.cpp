// SPDX-License-Identifier: Apache-2.0
#include "nodes/graph_runner.h"

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>

#include "lacuna/error.h"
#include "lacuna/files/safetensors_file.h"
#include "nodes/file_name.h"
#include "nodes/host_nodes.h"
#include "support/fake_host.h"
#include "support/message_of.h"
#include "support/random_data.h"
#include "support/worst_json.h"

namespace lacuna {
namespace {

using nlohmann::json;
using testing::message_of;

json good_workflow() {
  return json::parse(R"({
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
    "2": {"class_type": "LacunaConceptSet", "inputs": {"concepts": "black cat -> fog", "kind": "object",
          "default_anchor": "", "preserve": "dog", "general_prior": "none", "templates": 3}},
    "3": {"class_type": "LacunaAttentionRefine", "inputs": {"model": ["1", 0], "clip": ["1", 1],
          "concepts": ["2", 0], "method": "uce", "strength": 1, "lora_rank": 4}},
    "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "a photo of black cat", "clip": ["1", 1]}},
    "5": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}},
    "6": {"class_type": "EmptyLatentImage", "inputs": {"width": 32, "height": 16, "batch_size": 2}},
    "7": {"class_type": "KSampler", "inputs": {"model": ["3", 0], "seed": 18446744073709551615, "steps": 2,
          "cfg": 4, "sampler_name": "euler", "scheduler": "normal", "positive": ["4", 0],
          "negative": ["5", 0], "latent_image": ["6", 0], "denoise": 1.0}, "_meta": {"title": "x"}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["1", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "sub/pic"}},
    "10": {"class_type": "SaveLoRA", "inputs": {"lora": ["3", 2], "prefix": "loras/forget"}},
    "11": {"class_type": "PreviewAny", "inputs": {"source": ["3", 3]}},
    "12": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}},
    "13": {"class_type": "LacunaSaveLoRA", "inputs": {"lora": ["3", 2], "filename_prefix": "ours"}}
  })");
}

class GraphRunnerTest : public testing::SeededTest {
 protected:
  NodeRegistry registry(const std::string& workflow = "{}") {
    NodeRegistry all = NodeRegistry::with_lacuna_nodes(folder_.path(""));
    add_host_nodes(all, application_, workflow);
    return all;
  }
  std::vector<WorkflowOutput> run(const json& workflow, Progress& progress) {
    return run_workflow(parse_workflow(workflow.dump()), registry(workflow.dump()), progress);
  }
  std::string refusal(const json& workflow) {
    SilentProgress progress;
    const std::string message = message_of([&] { run(workflow, progress); });
    return message;
  }
  size_t files() const {
    size_t n = 0;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder_.path(""))) {
      n += entry.is_regular_file();
    }
    return n;
  }

  testing::TemporaryFolder folder_;
  std::shared_ptr<testing::FakeApplication> application_ =
      std::make_shared<testing::FakeApplication>(folder_.path(""));
};

TEST_F(GraphRunnerTest, RunsAWholeWorkflow) {
  testing::CountingProgress progress;
  const auto outputs = run(good_workflow(), progress);
  std::map<std::string, NodeResult> by_node;
  for (const auto& output : outputs) by_node[output.node] = output.result;
  ASSERT_EQ(by_node["9"].images.size(), 2u);
  EXPECT_TRUE(by_node["9"].images[0].ends_with("sub/pic_00001_.png"));
  EXPECT_TRUE(by_node["9"].images[1].ends_with("sub/pic_00002_.png"));
  EXPECT_EQ(by_node["12"].images.size(), 2u);
  EXPECT_NE(by_node["11"].text[0].find("black cat"), std::string::npos);
  const SafetensorsFile lora = load_safetensors(by_node["10"].files[0]);
  EXPECT_EQ(lora.tensors.size(), 18u);
  EXPECT_TRUE(lora.tensors.contains("lora_unet_layer_0_to_k.lora_up.weight"));
  EXPECT_EQ(load_safetensors(by_node["13"].files[0]).tensors.size(), 18u);
  EXPECT_EQ(application_->checkpoints_loaded, 1);
  json old_name = good_workflow();
  old_name["10"]["class_type"] = "SaveLoRANode";
  EXPECT_NO_THROW(plan_workflow(parse_workflow(old_name.dump()), registry()));
  // A second run takes the next free names.
  run(good_workflow(), progress);
  EXPECT_EQ(files(), 12u);
}

TEST_F(GraphRunnerTest, NamesOfFilesAreFilledIn) {
  json workflow = good_workflow();
  workflow["7"]["_meta"]["title"] = "My sampler";
  workflow["9"]["inputs"]["filename_prefix"] =
      "%KSampler.seed%/%My sampler.cfg%_%My sampler.sampler_name%_%width%x%height%_%nobody.x%";
  workflow["10"]["inputs"]["prefix"] = "%LacunaConceptSet.concepts%";
  workflow["13"]["inputs"]["filename_prefix"] = "%LacunaAttentionRefine.method%_%date:yyyy%";
  SilentProgress progress;
  std::map<std::string, NodeResult> by_node;
  for (const auto& output : run(workflow, progress)) by_node[output.node] = output.result;
  const auto ends = [](const std::string& path, const std::string& end) {
    EXPECT_TRUE(path.ends_with(end)) << path;
  };
  ends(by_node["9"].images[0], "/18446744073709551615/4_euler_4x2_%nobody.x%_00001_.png");
  ends(by_node["10"].files[0], "/black cat -_ fog_00001_.safetensors");
  ends(by_node["13"].files[0],
       "/uce_" + std::to_string(local_time().tm_year + 1900) + "_00001_.safetensors");
}

TEST_F(GraphRunnerTest, BadNamesOfFilesAreToldBeforeAnythingRuns) {
  for (const auto& [node, input] : std::map<std::string, std::string>{
           {"9", "filename_prefix"}, {"10", "prefix"}, {"13", "filename_prefix"}}) {
    for (const std::string& prefix : {std::string("../x"), std::string(), std::string(300, 'x'),
                                      std::string("a\0b", 3), std::string("a/..")}) {
      json workflow = good_workflow();
      workflow[node]["inputs"][input] = prefix;
      EXPECT_TRUE(refusal(workflow).starts_with("node " + node + " (")) << refusal(workflow);
      EXPECT_EQ(application_->checkpoints_loaded, 0);
    }
  }
}

TEST_F(GraphRunnerTest, RunsOnlyWhatOutputsNeed) {
  json workflow = good_workflow();
  workflow["20"] = {{"class_type", "CheckpointLoaderSimple"}, {"inputs", {{"ckpt_name", "b"}}}};
  SilentProgress progress;
  run(workflow, progress);
  EXPECT_EQ(application_->checkpoints_loaded, 1);
}

TEST_F(GraphRunnerTest, LoraLoadersChangeTheModel) {
  json workflow = good_workflow();
  workflow["30"] = {{"class_type", "LoraLoader"},
                    {"inputs", {{"model", {"1", 0}}, {"clip", {"1", 1}}, {"lora_name", "x"}}}};
  workflow["31"] = {
      {"class_type", "LoraLoaderModelOnly"},
      {"inputs", {{"model", {"30", 0}}, {"lora_name", "x"}, {"strength_model", 0.5}}}};
  workflow["3"]["inputs"]["model"] = {"31", 0};
  workflow["3"]["inputs"]["clip"] = {"30", 1};
  SilentProgress progress;
  const auto lora_of = [&](const json& graph) {
    for (const auto& output : run(graph, progress)) {
      if (output.node == "10") return load_safetensors(output.result.files[0]);
    }
    return SafetensorsFile{};
  };
  const auto up = "lora_unet_layer_0_to_v.lora_up.weight";
  EXPECT_FALSE(
      at::equal(lora_of(workflow).tensors.at(up), lora_of(good_workflow()).tensors.at(up)));
}

TEST_F(GraphRunnerTest, MalformedWorkflowsNameTheFault) {
  const auto refuse = [&](const std::string& what, const std::function<void(json&)>& change,
                          const std::string& expected) {
    json workflow = good_workflow();
    change(workflow);
    const std::string message = refusal(workflow);
    EXPECT_NE(message.find(expected), std::string::npos) << what << ": '" << message << "'";
    EXPECT_EQ(application_->checkpoints_loaded, 0) << what;
    EXPECT_EQ(files(), 0u) << what;
  };
  refuse("unknown node", [](json& w) { w["3"]["class_type"] = "Magic"; }, "node 3 (Magic)");
  refuse("no class", [](json& w) { w["3"].erase("class_type"); }, "node 3");
  refuse("not an object", [](json& w) { w["3"] = 4; }, "node 3");
  refuse(
      "cycle",
      [](json& w) {
        w["40"] = {{"class_type", "LoraLoaderModelOnly"},
                   {"inputs", {{"model", {"41", 0}}, {"lora_name", "x"}}}};
        w["41"] = {{"class_type", "LoraLoaderModelOnly"},
                   {"inputs", {{"model", {"40", 0}}, {"lora_name", "x"}}}};
        w["3"]["inputs"]["model"] = {"40", 0};
      },
      "cycle");
  refuse("wrong type", [](json& w) { w["3"]["inputs"]["clip"] = {"1", 0}; }, "needs CLIP");
  refuse("missing input", [](json& w) { w["3"]["inputs"].erase("model"); }, "'model' is missing");
  refuse("constant for a socket", [](json& w) { w["3"]["inputs"]["model"] = 3; }, "needs a link");
  refuse(
      "missing file", [](json& w) { w["1"]["inputs"].erase("ckpt_name"); },
      "'ckpt_name' is missing");
  refuse("absent source", [](json& w) { w["3"]["inputs"]["model"] = {"99", 0}; }, "node 99");
  refuse("bad output", [](json& w) { w["3"]["inputs"]["model"] = {"1", 7}; }, "output 7");
  refuse("negative output", [](json& w) { w["3"]["inputs"]["model"] = {"1", -1}; }, "negative");
  refuse("range", [](json& w) { w["3"]["inputs"]["strength"] = 9; }, "'strength' is out of range");
  refuse("option", [](json& w) { w["3"]["inputs"]["method"] = "x"; }, "'method' cannot be 'x'");
  refuse("widget type", [](json& w) { w["7"]["inputs"]["steps"] = "many"; }, "whole number");
  refuse("object value", [](json& w) { w["7"]["inputs"]["steps"] = json::object(); }, "node 7");
  refuse("inputs", [](json& w) { w["7"]["inputs"] = 3; }, "node 7");
  refuse(
      "no output node",
      [](json& w) {
        for (auto id : {"9", "10", "11", "12", "13"}) w.erase(id);
      },
      "no output node");
  refuse(
      "empty concepts", [](json& w) { w["2"]["inputs"]["concepts"] = ""; }, "no concept to erase");
  refuse(
      "target in preserve", [](json& w) { w["2"]["inputs"]["preserve"] = "Black Cat"; },
      "both erased and preserved");
  refuse(
      "mace subject",
      [](json& w) {
        w["3"]["inputs"]["method"] = "mace";
        w["3"]["inputs"]["read_at"] = "subject";
        w["3"]["inputs"]["concepts"] = {"2", 0};
      },
      "read_at");
}

TEST_F(GraphRunnerTest, TextThatIsNotAWorkflow) {
  EXPECT_NE(message_of([] { parse_workflow("{"); }).find("cannot be read as JSON"),
            std::string::npos);
  EXPECT_NE(message_of([] { parse_workflow("[]"); }), "");
  EXPECT_NE(message_of([] { parse_workflow("{}"); }).find("no nodes"), std::string::npos);
  EXPECT_NE(
      message_of([] { parse_workflow(R"({"nodes": [], "links": []})"); }).find("Export (API)"),
      std::string::npos);
  EXPECT_NE(message_of([] { parse_workflow(std::string(9 << 20, ' ')); }).find("8 MiB"),
            std::string::npos);
  EXPECT_NE(message_of([] { parse_workflow(std::string(100'000, '[')); }).find("nested"),
            std::string::npos);
  const auto worst = testing::worst_json(8u << 20);
  for (const char* kind : {"lists", "objects of one parent", "short keys"}) {
    const auto cost = testing::cost_of(
        [&] { EXPECT_NE(message_of([&] { parse_workflow(worst.at(kind)); }), "") << kind; });
    EXPECT_LE(cost.megabytes, 100) << kind;
#ifdef NDEBUG
    EXPECT_LE(cost.seconds, 1.0) << kind;
#endif
  }
  std::string many = "{";
  for (int i = 0; i < 2'001; ++i)
    many += (i ? ",\"" : "\"") + std::to_string(i) + R"(":{"class_type":"X"})";
  EXPECT_NE(message_of([&] { parse_workflow(many + "}"); }).find("2000"), std::string::npos);
}

TEST_F(GraphRunnerTest, ErrorsDuringTheRunNameTheNode) {
  json workflow = good_workflow();
  workflow["9"]["inputs"]["filename_prefix"] = "../out";
  EXPECT_NE(refusal(workflow).find("node 9 (SaveImage)"), std::string::npos);
  workflow = good_workflow();
  workflow["10"]["inputs"]["prefix"] = "/etc/x";
  EXPECT_NE(refusal(workflow).find("leaves the output folder"), std::string::npos);
  workflow = good_workflow();
  workflow["4"]["inputs"]["text"] = "(cat:1.2)";
  EXPECT_NE(refusal(workflow).find("emphasis"), std::string::npos);
  std::string words;
  for (int i = 0; i < 80; ++i) words += "w" + std::to_string(i) + " ";
  workflow["4"]["inputs"]["text"] = words;
  EXPECT_NE(refusal(workflow).find("tokens"), std::string::npos);
  workflow = good_workflow();
  workflow["11"]["inputs"]["source"] = {"1", 0};
  EXPECT_NE(refusal(workflow).find("previewed"), std::string::npos);
  // The host's own exceptions keep their type.
  workflow = good_workflow();
  workflow["1"]["inputs"]["ckpt_name"] = "missing.safetensors";
  SilentProgress progress;
  EXPECT_THROW(run(workflow, progress), std::runtime_error);
  testing::CountingProgress cancelled;
  cancelled.cancel_at = 9;
  EXPECT_THROW(run(good_workflow(), cancelled), testing::Cancelled);
}

TEST_F(GraphRunnerTest, NumbersAndSwitchesCanBePreviewed) {
  json workflow = good_workflow();
  for (const json& value : {json(3), json(2.5), json(true), json("text")}) {
    workflow["11"]["inputs"]["source"] = value;
    SilentProgress progress;
    EXPECT_NO_THROW(run(workflow, progress));
  }
}

// 10,000 damaged workflow files: an error each or a valid plan, never a crash or a hang.
TEST_F(GraphRunnerTest, MutatedWorkflowsNeverCrash) {
  const std::string good = good_workflow().dump();
  const NodeRegistry all = registry();
  std::mt19937_64 random(seed());
  int errors = 0;
  for (int round = 0; round < 10'000; ++round) {
    std::string text = good;
    for (uint64_t edits = 1 + random() % 3; edits > 0; --edits) {
      const size_t at = random() % text.size();
      switch (random() % 3) {
        case 0:
          text[at] = "0123456789\"[]{},:x"[random() % 18];
          break;
        case 1:
          text.erase(at, 1 + random() % 4);
          break;
        default:
          text.insert(at, text.substr(random() % text.size(), random() % 12));
      }
    }
    try {
      plan_workflow(parse_workflow(text), all);
    } catch (const Error&) {
      ++errors;
    }
  }
  EXPECT_GT(errors, 5000);
}

}  // namespace
}  // namespace lacuna
