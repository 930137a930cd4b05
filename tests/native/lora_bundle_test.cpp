// SPDX-License-Identifier: Apache-2.0
#include "lacuna/training/lora_bundle.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>

#include "lacuna/error.h"
#include "lacuna/files/safetensors_file.h"
#include "support/fake_host.h"
#include "support/message_of.h"
#include "support/random_concepts.h"

namespace lacuna {
namespace {

using testing::embeddings;
using testing::message_of;
using testing::random_concept;
using testing::relative_difference;

constexpr int64_t kWidth = 16;
const std::map<std::string, int64_t> kRows{
    {"lora_unet_layer_0_to_k", 8}, {"lora_unet_layer_0_to_v", 8}, {"lora_unet_layer_1_to_k", 12}};

class LoraBundleTest : public testing::SeededTest {
 protected:
  std::shared_ptr<ConceptLora> item(const std::string& target, bool mapped = true) const {
    return random_concept(target, kRows, embeddings(30, kWidth), mapped, 2);
  }
  LoraBundle bundle() const {
    LoraBundle bundle;
    bundle.concepts = {item("caf\xC3\xA9"), item("dog", false)};
    bundle.preserve = {{"wolf", ConceptKind::kObject, 3}};
    bundle.general_prior = GeneralPriorSize::kFull;
    bundle.model_fingerprint = "fake-model";
    bundle.encoder_fingerprint = "fake";
    bundle.model_samples = {{"lora_unet_layer_0_to_k", {0.1f, -3e-9f}}};
    bundle.encoder_samples = {{"clip_l.mlp", {0.25f, 1.0f}}};
    return bundle;
  }
  static std::string bytes_of(const std::string& path) {
    std::ifstream stream(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
  }
  static bool equal(const LoraBundle& a, const LoraBundle& b) {
    return a.preserve == b.preserve && a.general_prior == b.general_prior &&
           a.model_fingerprint == b.model_fingerprint &&
           a.encoder_fingerprint == b.encoder_fingerprint && a.model_samples == b.model_samples &&
           a.encoder_samples == b.encoder_samples &&
           std::equal(
               a.concepts.begin(), a.concepts.end(), b.concepts.begin(), b.concepts.end(),
               [](auto& x, auto& y) { return identical(*x, *y) && x->training == y->training; });
  }
  void refuse(const std::function<void()>& call, const std::string& part) const {
    const std::string message = message_of(call);
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }
  testing::TemporaryFolder folder_;
};

TEST_F(LoraBundleTest, SurvivesTheFile) {
  const LoraBundle original = bundle();
  save_bundle(original, folder_.path("sub/a.safetensors"));
  const LoraBundle loaded = load_bundle(folder_.path("sub/a.safetensors"));
  ASSERT_EQ(loaded.concepts.size(), 2u);
  EXPECT_EQ(loaded.preserve, original.preserve);
  EXPECT_EQ(loaded.general_prior, GeneralPriorSize::kFull);
  EXPECT_EQ(loaded.model_fingerprint, "fake-model");
  EXPECT_EQ(loaded.encoder_fingerprint, "fake");
  EXPECT_EQ(loaded.model_samples, original.model_samples);
  EXPECT_EQ(loaded.encoder_samples, original.encoder_samples);
  for (size_t i = 0; i < 2; ++i) {
    const ConceptLora& a = *original.concepts[i];
    const ConceptLora& b = *loaded.concepts[i];
    EXPECT_EQ(b.item, a.item);
    EXPECT_EQ(b.training, a.training);
    EXPECT_EQ(b.prompt_gram.scalar_type(), at::kFloat);
    EXPECT_TRUE(at::equal(b.prompt_gram, a.prompt_gram.to(at::kFloat)));
    EXPECT_EQ(b.refinement_gram.defined(), a.refinement_gram.defined());
    if (a.refinement_gram.defined()) {
      EXPECT_TRUE(at::equal(b.refinement_gram, a.refinement_gram.to(at::kFloat)));
      EXPECT_TRUE(at::equal(b.refinement_shift, a.refinement_shift.to(at::kFloat)));
    }
    ASSERT_EQ(b.pairs.size(), kRows.size());
    for (const auto& [name, pair] : a.pairs) {
      EXPECT_TRUE(at::equal(b.pairs.at(name).up, pair.up.to(at::kFloat)));
      EXPECT_TRUE(at::equal(b.pairs.at(name).down, pair.down.to(at::kFloat)));
    }
  }
  // What came from a file goes into a file unchanged.
  save_bundle(loaded, folder_.path("b.safetensors"));
  EXPECT_TRUE(equal(load_bundle(folder_.path("b.safetensors")), loaded));
  EXPECT_EQ(bytes_of(folder_.path("b.safetensors")), bytes_of(folder_.path("sub/a.safetensors")));
}

// Anywhere in the file, data included: an error, or what was written.
TEST_F(LoraBundleTest, MutatedFilesNeverCrashNorChangeWhatIsRead) {
  const std::string path = folder_.path("m.safetensors");
  save_bundle(bundle(), path);
  const LoraBundle good = load_bundle(path);
  const std::string bytes = bytes_of(path);
  std::mt19937_64 random(seed());
  int errors = 0;
  for (int round = 0; round < 10'000; ++round) {
    std::string changed = bytes;
    // Half of the edits in the header, where they do most.
    const size_t range = random() % 2 == 0 ? bytes.size() : std::min<size_t>(bytes.size(), 3000);
    for (uint64_t edits = 1 + random() % 3; edits > 0; --edits) {
      const size_t at = random() % std::min(range, changed.size());
      if (random() % 10 == 0) {
        changed.resize(at + 1);
      } else if (random() % 10 == 0) {
        changed.insert(at, 1, static_cast<char>(random()));
      } else {
        changed[at] = static_cast<char>(random());
      }
    }
    std::ofstream(path, std::ios::binary) << changed;
    try {
      ASSERT_TRUE(equal(load_bundle(path), good)) << "round " << round;
    } catch (const Error&) {
      ++errors;
    }
  }
  EXPECT_GT(errors, 9000);
}

// Files with a right checksum and wrong content: what a careless tool would write.
TEST_F(LoraBundleTest, InconsistentFilesAreErrors) {
  const std::string path = folder_.path("x.safetensors");
  refuse([&] { load_bundle(folder_.path("absent")); }, "cannot open");
  save_safetensors({{{"lora_unet_x.lora_up.weight", at::zeros({2, 1})}}, {}}, path);
  refuse([&] { load_bundle(path); }, "only a bundle");
  save_bundle(bundle(), path);
  SafetensorsFile file = load_safetensors(path);
  file.tensors.begin()->second.view({-1})[0] = 7.0;
  save_safetensors(file, path);
  refuse([&] { load_bundle(path); }, "checksum");
  // Empty tensors have no address: the sanitizers watch what the checksum does with them.
  file.tensors["empty"] = at::zeros({0, 2});
  save_safetensors(file, path);
  refuse([&] { load_bundle(path); }, "checksum");
}

TEST_F(LoraBundleTest, NothingIsSavedThatCouldNotBeLoaded) {
  const std::string path = folder_.path("x.safetensors");
  const auto refuse_bundle = [&](const std::function<void(LoraBundle&, ConceptLora&)>& spoil,
                                 const std::string& part) {
    LoraBundle spoilt = bundle();
    auto copy = std::make_shared<ConceptLora>(*spoilt.concepts[0]);
    copy->item.target = "owl";
    spoil(spoilt, *copy);
    spoilt.concepts.push_back(copy);
    refuse([&] { save_bundle(spoilt, path); }, part);
    EXPECT_FALSE(std::filesystem::exists(path));
  };
  refuse([&] { save_bundle({}, path); }, "no concept");
  refuse_bundle([](auto&, auto& c) { c.pairs.clear(); }, "'owl' has no LoRA");
  refuse_bundle([](auto&, auto& c) { c.prompt_gram.reset(); }, "'owl' has no statistics");
  refuse_bundle([](auto&, auto& c) { c.prompt_gram = at::zeros({kWidth, 3}); }, "do not fit");
  refuse_bundle([](auto&, auto& c) { c.refinement_shift = at::zeros({3, 3}); }, "refinement_shift");
  refuse_bundle([](auto&, auto& c) { c.refinement_shift = at::full({kWidth, kWidth}, NAN); },
                "NaN");
  refuse_bundle([](auto&, auto& c) { c.refinement_gram.reset(); }, "only half");
  refuse_bundle([](auto&, auto& c) { c.pairs.begin()->second.down.reset(); }, "does not fit");
  refuse_bundle([](auto&, auto& c) { c.pairs.begin()->second.down = at::zeros({3, kWidth}); },
                "does not fit");
  refuse_bundle([](auto&, auto& c) { c.pairs.begin()->second.up = at::full({8, 2}, INFINITY); },
                "NaN or infinity in its LoRA");
  refuse_bundle([](auto&, auto& c) { c.pairs.begin()->second.up = at::full({8, 2}, 1e30); },
                "'owl' has values up to 1e+30 in its LoRA (lora_unet_layer_0_to_k)");
  refuse_bundle([](auto&, auto& c) { c.prompt_gram = at::full({kWidth, kWidth}, 3e38); },
                "'owl' has values up to 3e+38 in its statistics");
  refuse_bundle([](auto&, auto& c) { c.item.target = "Dog"; }, "listed twice");
  refuse_bundle([](auto&, auto& c) { c.item.templates = 1'000'000; }, "templates");
  refuse_bundle([](auto& b, auto&) { b.preserve.push_back({"owl", ConceptKind::kObject, 3}); },
                "both erased and preserved");
  refuse_bundle([](auto&, auto& c) { c.training = "\xff"; }, "UTF-8");
  refuse_bundle(
      [](auto&, auto& c) { c = *random_concept("owl", kRows, embeddings(9, kWidth + 2)); },
      "different width");
}

TEST_F(LoraBundleTest, MergeKeepsEveryConceptAndPhraseOnce) {
  const auto a = std::make_shared<const LoraBundle>(bundle());
  LoraBundle other;
  other.concepts = {a->concepts[1], item("wolf")};
  other.preserve = {{"Wolf", ConceptKind::kObject, 2}, {"cat", ConceptKind::kObject, 2}};
  other.general_prior = GeneralPriorSize::kSmall;
  const auto b = std::make_shared<const LoraBundle>(other);
  const LoraBundle merged = merge({a, b});
  ASSERT_EQ(merged.concepts.size(), 3u);
  EXPECT_EQ(merged.concepts[2]->item.target, "wolf");
  // a preserves the wolf, b erases it: it is erased.
  ASSERT_EQ(merged.preserve.size(), 1u);
  EXPECT_EQ(merged.preserve[0].phrase, "cat");
  EXPECT_EQ(merged.general_prior, GeneralPriorSize::kFull);
  EXPECT_EQ(merged.model_fingerprint, "fake-model");
  check(merged);

  refuse([&] { merge({}); }, "no LoRA");
  refuse([&] { merge({a, std::make_shared<const LoraBundle>()}); }, "holds no concept");
  const auto with = [&](const std::function<void(LoraBundle&)>& change) {
    LoraBundle changed = other;
    change(changed);
    return std::make_shared<const LoraBundle>(changed);
  };
  refuse([&] { merge({a, with([](auto& x) { x.model_fingerprint = "y"; })}); }, "base models");
  refuse([&] { merge({a, with([](auto& x) { x.encoder_fingerprint = "y"; })}); }, "text encoders");
  // The same weights in fp8: of 0.1 that is 0.1015625.
  const auto stored = [&](const char* fingerprint, float first) {
    return with([=](auto& x) {
      x.model_fingerprint = fingerprint;
      x.model_samples = {{"lora_unet_layer_0_to_k", {first, 0.0f}}};
    });
  };
  const auto fp8 = stored("y-model", 0.1015625f);
  EXPECT_EQ(merge({a, fp8}).model_fingerprint, "fake-model");
  refuse([&] { merge({fp8, stored("z-model", 0.2f)}); }, "y in fp8_e4m3 and z in fp32");
  refuse([&] { merge({a, with([&](auto& x) { x.concepts[0] = item("DOG"); })}); },
         "two different LoRAs");
}

TEST_F(LoraBundleTest, FitsOnlyItsOwnModelAndEncoder) {
  testing::FakeDenoiser model(3, kWidth);
  testing::FakeTextEncoder encoder(kWidth);
  const auto projections = model.text_entries();
  LoraBundle good = bundle();
  EXPECT_NO_THROW(check_fits(good, model, encoder, projections));
  LoraBundle other = good;
  // The model in another weight type, and another one.
  other.model_fingerprint = "y-model";
  model.samples_ = {{"lora_unet_layer_0_to_k", {0.1015625f, 0.0f}}};
  EXPECT_NO_THROW(check_fits(other, model, encoder, projections));
  model.samples_.begin()->second[0] = 0.125f;
  refuse([&] { check_fits(other, model, encoder, projections); },
         "another base model than the one connected (y in fp32 and fake in fp8_e5m2, ");
  // A file of an earlier version fits to the last bit only, and learns the rest then.
  other.model_samples.clear();
  refuse([&] { check_fits(other, model, encoder, projections); }, "in another weight type");
  other.model_fingerprint = "fake-model";
  EXPECT_NO_THROW(check_fits(other, model, encoder, projections));
  add_samples(other, model, encoder);
  EXPECT_EQ(other.model_samples, model.samples_);
  // So it is with the text encoder.
  encoder.samples_ = {{"clip_l.mlp", {0.25f, 1.0f}}};
  encoder.fingerprint_ = "half";
  EXPECT_NO_THROW(check_fits(other, model, encoder, projections));
  encoder.fingerprint_ = "half-skip";
  refuse([&] { check_fits(other, model, encoder, projections); }, "another clip skip");
  encoder.samples_.begin()->second[0] = 0.5f;
  refuse([&] { check_fits(other, model, encoder, projections); }, "another text encoder");
  encoder.fingerprint_ = "fake";
  model.samples_.clear();
  other = good;
  other.model_fingerprint = "y";
  refuse([&] { check_fits(other, model, encoder, projections); }, "another base model");
  other.model_fingerprint = "";  // unknown: not compared
  EXPECT_NO_THROW(check_fits(other, model, encoder, projections));
  other.encoder_fingerprint = "y";
  refuse([&] { check_fits(other, model, encoder, projections); }, "another text encoder");
  encoder.fingerprint_ = "";
  EXPECT_NO_THROW(check_fits(other, model, encoder, projections));
  testing::FakeTextEncoder wide(kWidth + 8);
  wide.fingerprint_ = "";
  refuse([&] { check_fits(good, model, wide, projections); }, "width 16");
  testing::FakeDenoiser shallow(1, kWidth);
  refuse([&] { check_fits(good, shallow, encoder, shallow.text_entries()); },
         "lora_unet_layer_1_to_k");
}

}  // namespace
}  // namespace lacuna
