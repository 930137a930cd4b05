// SPDX-License-Identifier: Apache-2.0
// Nodes keep work between runs, and hosts run nodes without the GIL: two runs of one node at once
// each give what they give alone.
#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>

#include "concept_sets.h"
#include "nodes/attention_refine_node.h"
#include "nodes/lora_erase_node.h"
#include "nodes/lora_fuse_node.h"
#include "support/fake_host.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::concepts_named;
using testing::FakeDenoiser;
using testing::FakeTextEncoder;

using Values = std::map<std::string, Value>;

constexpr int64_t kSize = 16;

// Calls back once, in the middle of a run.
class Interrupting : public Progress {
 public:
  Interrupting(int64_t at, std::function<void()> call) : at_(at), call_(std::move(call)) {}
  void report(int64_t, int64_t) override { check(); }
  void check() override {
    if (++checks == at_) call_();
  }
  void status(const std::string&) override { check(); }
  void preview(const at::Tensor&) override { check(); }

  int64_t checks = 0;

 private:
  int64_t at_;
  std::function<void()> call_;
};

class ThreadsTest : public testing::SeededTest {
 protected:
  // Everything of its own but the node, as two prompts of a host would have it.
  static Values inputs(const std::vector<std::string>& targets, Values more) {
    more.try_emplace("model", std::shared_ptr<Denoiser>(model()));
    more.try_emplace("clip", std::shared_ptr<TextEncoder>(std::make_shared<FakeTextEncoder>()));
    more.try_emplace("concepts", concepts_named(targets, 2));
    return more;
  }
  static std::shared_ptr<FakeDenoiser> model() {
    static const std::shared_ptr<FakeDenoiser> shared = std::make_shared<FakeDenoiser>(2, kSize);
    return shared;
  }
  static NodeResult run(Node& node, const Values& values, Progress& progress) {
    return node.run(NodeInputs(node.schema(), values), progress);
  }
  static NodeResult run(Node& node, const Values& values) {
    SilentProgress progress;
    return run(node, values, progress);
  }
  // The LoRA or the bundle at `output`, in numbers.
  static at::Tensor numbers(const NodeResult& result, size_t output) {
    std::vector<at::Tensor> parts;
    const Value& value = result.outputs.at(output);
    if (const auto* lora = std::get_if<std::shared_ptr<const LoraTensors>>(&value)) {
      for (const auto& [name, tensor] : **lora) parts.push_back(tensor.flatten().to(at::kDouble));
    } else {
      for (const auto& item : std::get<std::shared_ptr<const LoraBundle>>(value)->concepts) {
        for (const auto& [name, pair] : item->pairs) {
          parts.push_back(at::cat({pair.up.flatten(), pair.down.flatten()}).to(at::kDouble));
        }
      }
    }
    return at::cat(parts);
  }

  // `first` with another run of the same node within, in another thread, at several points; then
  // both at once, again and again.
  static void check(const std::function<std::unique_ptr<Node>()>& make, const Values& first,
                    const Values& second, size_t output) {
    Interrupting never(-1, [] {});
    const at::Tensor alone = numbers(run(*make(), first, never), output);
    const at::Tensor other = numbers(run(*make(), second), output);
    for (const int64_t tenths : {1, 3, 5, 6, 7, 9, 10}) {
      const std::unique_ptr<Node> node = make();
      Interrupting progress(std::max<int64_t>(1, tenths * never.checks / 10), [&] {
        std::thread([&] {
          EXPECT_TRUE(at::equal(numbers(run(*node, second), output), other));
        }).join();
      });
      EXPECT_TRUE(at::equal(numbers(run(*node, first, progress), output), alone)) << tenths;
    }
    const std::unique_ptr<Node> node = make();
    std::atomic<int> wrong = 0;
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&, i] {
        for (int round = 0; round < 5; ++round) {
          const bool even = (i + round) % 2 == 0;
          const at::Tensor found = numbers(run(*node, even ? first : second), output);
          if (!at::equal(found, even ? alone : other)) ++wrong;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
  }

  static Values training(const std::vector<std::string>& targets, int64_t seed) {
    return inputs(targets, {{"steps", int64_t{2}},
                            {"images", int64_t{1}},
                            {"sampling_steps", int64_t{2}},
                            {"width", int64_t{64}},
                            {"height", int64_t{64}},
                            {"batch", int64_t{1}},
                            {"training_seed", seed}});
  }
};

TEST_F(ThreadsTest, AttentionRefine) {
  check([] { return std::make_unique<AttentionRefineNode>(); },
        inputs({"owl", "cat", "ship"}, {{"lora_rank", int64_t{4}}}),
        inputs({"tree", "cat"}, {{"lora_rank", int64_t{4}}}), 2);
}

TEST_F(ThreadsTest, LoraErase) {
  check([] { return std::make_unique<LoraEraseNode>(); }, training({"owl", "cat"}, 1),
        training({"owl", "ship"}, 2), 0);
}

TEST_F(ThreadsTest, LoraFuse) {
  LoraEraseNode erase;
  const auto trained = [&](const std::vector<std::string>& targets) {
    Values values = inputs({}, {{"loras", run(erase, training(targets, 3)).outputs.at(0)}});
    values.erase("concepts");
    return values;
  };
  check([] { return std::make_unique<LoraFuseNode>(); }, trained({"owl", "cat", "ship"}),
        trained({"tree", "cat"}), 1);
}

}  // namespace
}  // namespace lacuna
