// SPDX-License-Identifier: Apache-2.0
// The scan of weights: its sums over d x d forms against plain loops over layers.
#include "lacuna/evaluation/residual_scan.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>

#include "support/fake_host.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::CountingProgress;
using testing::FakeDenoiser;
using testing::FakeTextEncoder;
using testing::message_of;

constexpr int64_t kWidth = 16;

class ResidualScanTest : public testing::DeviceTest {
 protected:
  ResidualScanTest() {
    Concept owl;
    owl.target = "owl";
    owl.anchor = "fog";
    owl.synonyms = {"night bird"};
    set_.concepts = {owl};
    set_.preserve = {{"dog", ConceptKind::kObject, 4}};
  }

  ResidualScan scan(const std::shared_ptr<Denoiser>& edited,
                    const std::vector<std::string>& neighbours = {"eagle"}) {
    return scan_residuals(*model_, *edited, *clip_, set_, neighbours, progress_);
  }
  // Rows of "a photo of <phrase>": own tokens, end of text, last position.
  at::Tensor rows(const std::string& phrase) {
    const at::Tensor all = clip_->encode({"a photo of " + phrase})[0].to(at::kDouble).cpu();
    const auto end = static_cast<int64_t>(clip_->tokenize(phrase).size()) + 2;
    return at::cat({all.narrow(0, 4, end - 4), all.narrow(0, end, 1), all.narrow(0, 76, 1)});
  }
  at::Tensor weight(Denoiser& model, const std::string& name) {
    return model.effective_weight(name).to(at::kDouble).cpu();
  }
  std::shared_ptr<Denoiser> with_random_edit(double size) {
    std::vector<WeightDelta> deltas;
    for (const auto& [name, value] : model_->weights_) {
      deltas.push_back({name, size * at::randn_like(value), {}});
    }
    return model_->with_weight_deltas(deltas, 1.0);
  }
  // W' = W + W (A - C) C^+ : the target's rows are read as the anchor's, exactly.
  std::shared_ptr<Denoiser> with_exact_edit() {
    const at::Tensor c = rows("owl").t();
    const at::Tensor map = at::matmul(rows("fog").t() - c, at::linalg_pinv(c));
    std::vector<WeightDelta> deltas;
    for (const auto& [name, value] : model_->weights_) {
      deltas.push_back({name, at::matmul(value.to(at::kDouble).cpu(), map).to(at::kFloat), {}});
    }
    return model_->with_weight_deltas(deltas, 1.0);
  }

  std::shared_ptr<FakeDenoiser> model_ = std::make_shared<FakeDenoiser>(3, kWidth, device());
  std::shared_ptr<FakeTextEncoder> clip_ = std::make_shared<FakeTextEncoder>(kWidth, device());
  ConceptSet set_;
  CountingProgress progress_;
};
INSTANTIATE_TEST_SUITE_P(Devices, ResidualScanTest, ::testing::ValuesIn(testing::devices()));

TEST_P(ResidualScanTest, WithoutAnEditNothingDiffers) {
  const ResidualScan result = scan(model_);
  EXPECT_FALSE(result.weights_differ);
  const ConceptResidual& owl = result.concepts.at(0);
  EXPECT_EQ(owl.phrases.at(0).phrase, "owl");
  EXPECT_EQ(owl.phrases.at(1).form, "synonym");
  for (const PhraseResidual& phrase : owl.phrases) EXPECT_NEAR(phrase.remaining, 1.0, 1e-9);
  ASSERT_EQ(owl.layers.size(), model_->projections_.size());
  EXPECT_EQ(owl.positions, (std::vector<std::string>{"token 1", "end of text", "padding"}));
  for (const LayerResidual& layer : owl.layers) EXPECT_EQ(layer.before, layer.after);
  EXPECT_EQ(result.preserved.at(0).drift, 0.0);
  EXPECT_EQ(result.neighbours.at(0).drift, 0.0);
}

TEST_P(ResidualScanTest, AnExactEditLeavesNothingOfTheTarget) {
  const ResidualScan result = scan(with_exact_edit());
  EXPECT_TRUE(result.weights_differ);
  const ConceptResidual& owl = result.concepts.at(0);
  EXPECT_LT(owl.phrases.at(0).remaining, 2e-3);
  EXPECT_GT(owl.phrases.at(1).remaining, 0.1);  // nobody taught it the synonym
  for (const LayerResidual& layer : owl.layers) {
    for (size_t i = 0; i < layer.after.size(); ++i) {
      EXPECT_LT(layer.after[i], 1e-4) << layer.layer;
      EXPECT_GT(layer.before[i], 0.01) << layer.layer;
    }
  }
  EXPECT_GT(result.preserved.at(0).drift, 0.0);
}

TEST_P(ResidualScanTest, AgreesWithLoopsOverLayers) {
  const auto edited = with_random_edit(0.3);
  const ResidualScan result = scan(edited);
  const auto last_two = [&](const std::string& phrase) {  // last own token and end of text
    const at::Tensor all = rows(phrase);
    return all.narrow(0, all.size(0) - 3, 2);
  };
  for (const PhraseResidual& phrase : result.concepts[0].phrases) {
    const at::Tensor c = rows(phrase.phrase);
    at::Tensor a = rows("fog");  // one token: paired with each of the phrase's
    a = at::cat({a.narrow(0, 0, 1).expand({c.size(0) - 2, kWidth}), a.narrow(0, 1, 2)});
    double before = 0, after = 0;
    for (const auto& [name, unused] : model_->weights_) {
      const at::Tensor w = weight(*model_, name);
      before += at::matmul(c - a, w.t()).square().sum().item<double>();
      after += (at::matmul(c, weight(*edited, name).t()) - at::matmul(a, w.t()))
                   .square()
                   .sum()
                   .item<double>();
    }
    EXPECT_NEAR(phrase.remaining, std::sqrt(after / before), 1e-4) << phrase.phrase;
  }
  const auto ordinary = [&] {
    at::Tensor sum = at::zeros({2, kWidth}, at::kDouble);
    for (const std::string& word : common_words()) sum += last_two(word);
    return sum / static_cast<double>(common_words().size());
  };
  const auto drift = [&](const std::string& word) {
    double change = 0, all = 0;
    for (const auto& [name, unused] : model_->weights_) {
      const at::Tensor w = weight(*model_, name);
      change +=
          at::matmul(last_two(word), (weight(*edited, name) - w).t()).square().sum().item<double>();
      all += at::matmul(last_two(word), w.t()).square().sum().item<double>();
    }
    return std::sqrt(change / all);
  };
  EXPECT_NEAR(result.preserved.at(0).drift, drift("dog"), 1e-4);
  EXPECT_NEAR(result.neighbours.at(0).drift, drift("eagle"), 1e-4);
  for (const WordContent& leak : result.concepts[0].leaks) {
    const at::Tensor a = ordinary(), direction = last_two("owl") - a;
    double before = 0, after = 0, norm = 0;
    for (const auto& [name, unused] : model_->weights_) {
      const at::Tensor w = weight(*model_, name);
      const at::Tensor read = at::matmul(direction, w.t());
      const auto along = [&](const at::Tensor& m) {
        return ((at::matmul(last_two(leak.word), m.t()) - at::matmul(a, w.t())) * read)
            .sum()
            .item<double>();
      };
      before += along(w);
      after += along(weight(*edited, name));
      norm += read.square().sum().item<double>();
    }
    EXPECT_NEAR(leak.before, before / norm, 1e-4) << leak.word;
    EXPECT_NEAR(leak.after, after / norm, 1e-4) << leak.word;
  }
}

TEST_P(ResidualScanTest, AWordThatIsReadAsTheTargetLeaks) {
  // The edit makes the preserved "dog" read as the owl was, and leaves ordinary words alone.
  model_ = std::make_shared<FakeDenoiser>(3, 64, device());
  clip_ = std::make_shared<FakeTextEncoder>(64, device());
  const at::Tensor dog = rows("dog");
  at::Tensor ordinary = at::zeros({2, 64}, at::kDouble);
  for (const std::string& word : common_words()) {
    ordinary += rows(word).narrow(0, 0, 2) / static_cast<double>(common_words().size());
  }
  const at::Tensor from = at::cat({dog, ordinary}).t();
  const at::Tensor change = at::cat({rows("owl") - dog, at::zeros_like(ordinary)}).t();
  const at::Tensor map = at::matmul(change, at::linalg_pinv(from));
  std::vector<WeightDelta> deltas;
  for (const auto& [name, value] : model_->weights_) {
    deltas.push_back({name, at::matmul(value.to(at::kDouble).cpu(), map).to(at::kFloat), {}});
  }
  const ResidualScan result = scan(model_->with_weight_deltas(deltas, 1.0));
  const auto& leaks = result.concepts[0].leaks;
  const auto found =
      std::find_if(leaks.begin(), leaks.end(), [](const auto& leak) { return leak.word == "dog"; });
  ASSERT_NE(found, leaks.end());
  EXPECT_NEAR(found->after, 1.0, 1e-3);
  EXPECT_LT(found->before, 0.9);
  for (size_t i = 1; i < leaks.size(); ++i) EXPECT_GE(leaks[i - 1].after, leaks[i].after);
}

TEST_P(ResidualScanTest, NeighboursAreWordsThatNobodyListed) {
  set_.preserve.push_back({common_words()[5], ConceptKind::kObject, 4});
  const ResidualScan result = scan(with_random_edit(0.1), {});
  const auto& near = result.concepts[0].neighbours;
  EXPECT_EQ(near.size(), 10u);
  for (const std::string& word : near) {
    EXPECT_NE(word, common_words()[5]);
    EXPECT_EQ(word.find("owl"), std::string::npos);
  }
  EXPECT_EQ(result.neighbours.size(), 4u);
  EXPECT_EQ(scan(with_random_edit(0.1), {}).concepts[0].neighbours, near);  // of the base alone
}

TEST_P(ResidualScanTest, CommonWordsAreEncodedOnce) {
  const testing::TemporaryFolder folder;
  clip_->cache_directory_ = folder.path("");
  const ResidualScan first = scan(with_exact_edit());
  const int64_t all = clip_->encoded_prompts;
  const ResidualScan second = scan(with_exact_edit());
  EXPECT_LT(clip_->encoded_prompts - all, 30);
  ASSERT_EQ(second.concepts[0].leaks.size(), first.concepts[0].leaks.size());
  EXPECT_EQ(second.concepts[0].neighbours, first.concepts[0].neighbours);

  // A damaged file is not believed: one bit of the last word's numbers.
  const std::filesystem::path file = *std::filesystem::directory_iterator(folder.path(""));
  std::fstream stream(file, std::ios::binary | std::ios::in | std::ios::out);
  stream.seekg(-20, std::ios::end);
  const int byte = stream.get();
  stream.seekp(-20, std::ios::end);
  stream.put(static_cast<char>(byte ^ 1));
  stream.close();
  const int64_t before = clip_->encoded_prompts;
  scan(with_exact_edit());
  EXPECT_GT(clip_->encoded_prompts - before, 30);
}

// A host that computes no more positions than it is asked for, and counts them.
class StartsOnly final : public FakeTextEncoder {
 public:
  using FakeTextEncoder::FakeTextEncoder;
  at::Tensor encode_start(const std::vector<std::string>& prompts, int64_t length) override {
    positions += static_cast<int64_t>(prompts.size()) * length;
    largest_call = std::max(largest_call, static_cast<int64_t>(prompts.size()) * length);
    return FakeTextEncoder::encode_start(prompts, length);
  }
  int64_t positions = 0;
  int64_t largest_call = 0;
};

TEST_P(ResidualScanTest, PaddingOfCommonWordsIsNotComputed) {
  const ResidualScan whole = scan(with_exact_edit());
  const auto starts = std::make_shared<StartsOnly>(kWidth, device());
  clip_ = starts;
  const ResidualScan result = scan(with_exact_edit());
  const auto words = static_cast<int64_t>(common_words().size());
  EXPECT_EQ(starts->positions, 6 * words);  // start, a photo of, the word, end
  EXPECT_LE(starts->largest_call, 4 * 77);
  EXPECT_LT(starts->encoded_prompts - words, 30);
  EXPECT_EQ(result.concepts[0].neighbours, whole.concepts[0].neighbours);
  EXPECT_EQ(result.concepts[0].closest, whole.concepts[0].closest);
}

TEST_P(ResidualScanTest, RefusesWhatCannotBeCompared) {
  auto other = std::make_shared<FakeDenoiser>(3, kWidth, device());
  other->family_ = "SDXL";
  EXPECT_NE(message_of([&] { scan(other); }).find("SD1.x and SDXL"), std::string::npos);
  EXPECT_NE(message_of([&] {
              scan(std::make_shared<FakeDenoiser>(2, kWidth, device()));
            }).find("the same layers"),
            std::string::npos);
  EXPECT_NE(message_of([&] { scan(with_random_edit(NAN)); }).find("NaN"), std::string::npos);
  clip_ = std::make_shared<FakeTextEncoder>(24, device());
  EXPECT_NE(message_of([&] { scan(model_); }).find("width 24"), std::string::npos);
}

TEST_P(ResidualScanTest, CanBeCancelledAtAnyTime) {
  scan(model_);
  const int64_t checks = progress_.checks;
  EXPECT_GT(checks, 10);
  for (int64_t at = 1; at <= checks; at += 7) {
    progress_ = {};
    progress_.cancel_at = at;
    EXPECT_THROW(scan(model_), testing::Cancelled);
  }
}

TEST(PhraseVariants, AreFormsThatPeopleType) {
  const auto texts = [](const std::string& phrase) {
    std::vector<std::string> out;
    for (const PhraseResidual& variant : phrase_variants(phrase)) out.push_back(variant.phrase);
    return out;
  };
  EXPECT_EQ(texts("puppy"),
            (std::vector<std::string>{"puppies", "puppy style", "by puppy", "ppupy"}));
  EXPECT_EQ(texts("van gogh style").size(), 2u);
  EXPECT_EQ(texts("fox")[0], "foxes");
  EXPECT_EQ(texts("boy")[0], "boys");
  EXPECT_EQ(texts("oo").size(), 3u);  // no typing error to make
}

TEST(CommonWords, AreDistinctAndSeveralHundred) {
  const std::vector<std::string> words = common_words();
  EXPECT_EQ(words.size(), 256u);
  EXPECT_EQ(std::set<std::string>(words.begin(), words.end()).size(), words.size());
}

}  // namespace
}  // namespace lacuna
