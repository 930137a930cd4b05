// SPDX-License-Identifier: Apache-2.0
// Evaluation: what is drawn, what is counted, what is said, and the sheet and report made of it.
#include "lacuna/evaluation/evaluation.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "lacuna/error.h"
#include "lacuna/evaluation/attack.h"
#include "lacuna/evaluation/benchmark_lines.h"
#include "lacuna/evaluation/contact_sheet.h"
#include "lacuna/evaluation/evaluation_report.h"
#include "support/fake_host.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::CountingProgress;
using testing::FakeDenoiser;
using testing::FakeTextEncoder;
using testing::message_of;

// Sees every name in the pictures before the edit, none in those after it.
class FakeDetector final : public Detector {
 public:
  std::string name() override { return "fake"; }
  std::string version() override { return "7"; }
  at::Tensor score(const at::Tensor& images, const std::vector<std::string>& names) override {
    ++calls;
    EXPECT_EQ(images.size(0), 2);
    EXPECT_EQ(names.size(), 1u);
    if (names[0] == "dog") throw Error("cannot see dogs");
    const double unknown = names[0] == "eagle" ? kUnknown : 0.0;
    at::Tensor scores = at::zeros({2, 1}, at::kDouble);
    scores[0][0] = 0.9 + unknown;
    scores[1][0] = 0.1 + unknown;
    return scores;
  }
  int64_t calls = 0;
};

// Sound weights, but pictures that overflow.
class BrokenDenoiser final : public FakeDenoiser {
 public:
  using FakeDenoiser::FakeDenoiser;
  at::Tensor denoise(const DenoiseRequest& request, AttentionTap* tap) override {
    return FakeDenoiser::denoise(request, tap) * NAN;
  }
};

class WrongDecoder final : public testing::FakeImageDecoder {
 public:
  at::Tensor decode(const at::Tensor& latent) override { return latent.unsqueeze(0); }
};

class EvaluationTest : public testing::DeviceTest {
 protected:
  EvaluationTest() {
    Concept owl;
    owl.target = "owl";
    owl.anchor = "fog";
    owl.synonyms = {"night bird"};
    set_.concepts = {owl};
    set_.preserve = {{"dog", ConceptKind::kObject, 4}};
    options_.prompts = 2;
    options_.steps = 3;
    options_.cfg = 3.0;
    options_.width = options_.height = 64;
    options_.neighbours = {"eagle"};
  }
  Evaluation run(Denoiser& edited, Detector* detector = nullptr) {
    const EvaluationInputs inputs{*model_, edited, *clip_, *vae_, detector};
    return evaluate(inputs, set_, options_, progress_);
  }
  std::shared_ptr<Denoiser> edited(double size) {
    std::vector<WeightDelta> deltas;
    for (const auto& [name, value] : model_->weights_) {
      deltas.push_back({name, size * at::randn_like(value), {}});
    }
    return model_->with_weight_deltas(deltas, 1.0);
  }

  std::shared_ptr<FakeDenoiser> model_ = std::make_shared<FakeDenoiser>(3, 16, device());
  std::shared_ptr<FakeTextEncoder> clip_ = std::make_shared<FakeTextEncoder>(16, device());
  std::shared_ptr<ImageDecoder> vae_ = std::make_shared<testing::FakeImageDecoder>();
  ConceptSet set_;
  EvaluationOptions options_;
  CountingProgress progress_;
};
INSTANTIATE_TEST_SUITE_P(Devices, EvaluationTest, ::testing::ValuesIn(testing::devices()));

TEST_P(EvaluationTest, ADoNothingEditIsCalledWhatItIs) {
  const Evaluation result = run(*model_);
  EXPECT_TRUE(result.identical);
  ASSERT_EQ(result.pairs.size(), 2 * result.prompts.size());
  for (const PicturePair& pair : result.pairs) {
    EXPECT_EQ(pair.latent_change, 0.0);
    EXPECT_EQ(pair.pixel_change, 0.0);
    EXPECT_EQ(pair.likelihood_before, pair.likelihood_after);
    EXPECT_EQ(pair.seen_before, pair.seen_after);
    EXPECT_EQ(pair.noise_shift, 0.0);
    EXPECT_NEAR(pair.implausibility, 1.0, 1e-9);
  }
  const EvaluationSummary summary = summarize(result);
  EXPECT_NE(summary.verdict.at(0).find("Nothing was erased"), std::string::npos);
  for (const ListSummary& list : summary.lists) EXPECT_EQ(list.p, 1.0);
  EXPECT_EQ(progress_.last_done, progress_.last_total);
}

TEST_P(EvaluationTest, DrawsEveryListAndMeasuresEveryPair) {
  const auto model = edited(0.5);
  const Evaluation result = run(*model);
  std::map<PromptList, int64_t> prompts;
  for (const EvaluationPrompt& prompt : result.prompts) ++prompts[prompt.list];
  for (const PromptList list : kPromptLists) {
    const int64_t wanted = list == PromptList::kAttacks ? 3 : list == PromptList::kFile ? 0 : 2;
    EXPECT_EQ(prompts[list], wanted) << to_string(list);
  }
  EXPECT_FALSE(result.identical);
  for (const PicturePair& pair : result.pairs) {
    const EvaluationPrompt& prompt = result.prompts[pair.prompt];
    EXPECT_GT(pair.latent_change, 0.0);
    EXPECT_TRUE(std::isfinite(pair.likelihood_before) && std::isfinite(pair.likelihood_edited));
    EXPECT_TRUE(std::isnan(pair.score_after));
    EXPECT_GT(pair.noise_shift, 0.0);
    EXPECT_EQ(std::isnan(pair.attention_before),
              prompt.list == PromptList::kUnrelated || prompt.list == PromptList::kAttacks);
    EXPECT_FALSE(pair.attention_before <= 0.0);
    if (prompt.list == PromptList::kTarget) {
      EXPECT_NE(prompt.text.find("owl"), std::string::npos);
      EXPECT_NE(prompt.alternative.find("fog"), std::string::npos);
    }
  }
}

TEST_P(EvaluationTest, APictureDependsOnItsPromptNumberAndSeedAlone) {
  const auto model = edited(0.5);
  const Evaluation reference = run(*model);
  options_.batch = 1;
  options_.prompts = 1;
  const Evaluation alone = run(*model);
  const auto difference = [&](const Evaluation& other) {
    return (other.after[0].to(at::kFloat) - reference.after[0].to(at::kFloat))
        .abs()
        .max()
        .item<double>();
  };
  EXPECT_LE(difference(alone), 1.0);  // batches round differently
  options_.seed = 1;
  EXPECT_GT(difference(run(*model)), 1.0);
}

TEST_P(EvaluationTest, ADetectorDecidesWhereItKnowsTheName) {
  FakeDetector detector;
  const Evaluation result = run(*edited(0.5), &detector);
  EXPECT_EQ(detector.calls, 22);  // all but the captions
  for (const PicturePair& pair : result.pairs) {
    const EvaluationPrompt& prompt = result.prompts[pair.prompt];
    if (should_vanish(prompt.list)) {
      EXPECT_TRUE(pair.seen_before);
      EXPECT_FALSE(pair.seen_after);
    } else {
      EXPECT_EQ(pair.seen_after, pair.likelihood_after > 0);
    }
    EXPECT_EQ(pair.detector_error.empty(), prompt.phrase != "dog");
  }
  const EvaluationSummary summary = summarize(result);
  EXPECT_EQ(summary.scores.erased, 1.0);
  EXPECT_EQ(summary.scores.synonyms, 1.0);
  const auto json = nlohmann::json::parse(to_json(result, summary));
  EXPECT_EQ(json.at("counts").at("erased"), (nlohmann::json{4, 4}));
  EXPECT_EQ(json.at("protocol").at("detector").at("version"), "7");
  EXPECT_NE(json.dump().find("cannot see dogs"), std::string::npos);
}

// Returns scores that are none.
class WrongDetector final : public Detector {
 public:
  std::string name() override { return "wrong"; }
  std::string version() override { return "1"; }
  at::Tensor score(const at::Tensor&, const std::vector<std::string>&) override {
    return shape_is_wrong ? at::zeros({1}) : 3 * at::ones({2, 1});
  }
  bool shape_is_wrong = true;
};

TEST_P(EvaluationTest, ADetectorThatFailsIsReportedAndTheRunGoesOn) {
  WrongDetector detector;
  for (const char* expected : {"unexpected shape", "does not lie between 0 and 1"}) {
    const Evaluation result = run(*edited(0.5), &detector);
    for (const PicturePair& pair : result.pairs) {
      const EvaluationPrompt& prompt = result.prompts[pair.prompt];
      EXPECT_EQ(pair.detector_error.find(expected) != std::string::npos, !prompt.name.empty());
      EXPECT_EQ(pair.seen_after, pair.likelihood_after > 0);
    }
    const EvaluationSummary summary = summarize(result);
    EXPECT_EQ(summary.verdict.back(),
              "The detector failed on 4 pairs of pictures; see the report.");
    detector.shape_is_wrong = false;
  }
}

// Means of the colours; one number too few when told so.
class ColourEncoder final : public ImageEncoder {
 public:
  at::Tensor embed(const at::Tensor& images) override {
    return flat ? images.mean({1, 2, 3}) : images.mean({1, 2});
  }
  bool flat = false;
};

// SDXL's: a pooled vector of the image encoder's width.
class PooledTextEncoder final : public FakeTextEncoder {
 public:
  using FakeTextEncoder::FakeTextEncoder;
  TextEmbedding embed(const std::vector<std::string>& prompts) override {
    return {encode(prompts), at::ones({static_cast<int64_t>(prompts.size()), pooled_width})};
  }
  int64_t pooled_width = 3;
};

TEST_P(EvaluationTest, AnImageEncoderComparesWhatPicturesMean) {
  ColourEncoder colours;
  const auto run_with = [&](TextEncoder& encoder, Denoiser& erased) {
    const EvaluationInputs inputs{*model_, erased, encoder, *vae_, nullptr, &colours};
    return evaluate(inputs, set_, options_, progress_);
  };
  const auto model = edited(0.5);
  const Evaluation images = run_with(*clip_, *model);
  EXPECT_TRUE(images.compares_images && !images.compares_texts);
  for (size_t i = 0; i < images.pairs.size(); ++i) {
    const auto mean = [&](const at::Tensor& pictures) {
      return pictures[static_cast<int64_t>(i)].to(at::kDouble).mean(at::IntArrayRef{0, 1});
    };
    const at::Tensor a = mean(images.before), b = mean(images.after);
    EXPECT_NEAR(images.pairs[i].image_similarity,
                ((a * b).sum() / (a.norm() * b.norm())).item<double>(), 1e-6);
    EXPECT_TRUE(std::isnan(images.pairs[i].text_similarity_after));
  }
  const EvaluationSummary summary = summarize(images);
  const auto says = [&](const EvaluationSummary& of, const char* part) {
    return std::any_of(of.verdict.begin(), of.verdict.end(), [&](const std::string& line) {
      return line.find(part) != std::string::npos;
    });
  };
  EXPECT_TRUE(says(summary, "By CLIP") && says(summary, "were not trained together"));

  PooledTextEncoder pooled(16, device());
  const Evaluation both = run_with(pooled, *model);
  EXPECT_TRUE(both.compares_texts);
  EXPECT_FALSE(says(summarize(both), "were not trained together"));
  const at::Tensor after = both.after[0].to(at::kDouble).mean(at::IntArrayRef{0, 1});
  EXPECT_NEAR(both.pairs[0].text_similarity_after,
              (after.sum() / (after.norm() * std::sqrt(3.0))).item<double>(), 1e-6);
  const auto json = nlohmann::json::parse(to_json(both, summarize(both)));
  EXPECT_EQ(json.at("protocol").at("clip_vision"), "images and texts");
  EXPECT_TRUE(json.at("lists")[0].contains("text_similarity_change"));
  const std::vector<BenchmarkLine> lines = benchmark_lines(both);
  const auto content = std::find_if(lines.begin(), lines.end(),
                                    [](const auto& line) { return line.name == "content score"; });
  ASSERT_NE(content, lines.end());
  double sum = 0.0;
  for (const PicturePair& pair : both.pairs) {
    if (!should_vanish(both.prompts[pair.prompt].list)) sum += 100 * pair.text_similarity_after;
  }
  EXPECT_NEAR(content->after, sum / static_cast<double>(content->pictures), 1e-9);
  EXPECT_EQ(json.at("benchmarks").size(), lines.size());
  pooled.pooled_width = 4;  // another family's
  EXPECT_FALSE(run_with(pooled, *model).compares_texts);

  colours.flat = true;
  EXPECT_NE(message_of([&] { run_with(*clip_, *model); }).find("clip vision"), std::string::npos);
}

TEST_P(EvaluationTest, ThoroughAttacksAndListsWhatCameThrough) {
  options_.level = EvaluationLevel::kThorough;
  const auto model = edited(0.5);
  Evaluation result = run(*model);
  EXPECT_EQ(result.thorough_pairs, static_cast<int64_t>(result.pairs.size()));
  EXPECT_LT(result.quick_pairs, result.thorough_pairs);
  const size_t attacks =
      static_cast<size_t>(std::count_if(result.prompts.begin(), result.prompts.end(),
                                        [](const auto& p) { return p.attack.has_value(); }));
  EXPECT_EQ(attacks, 6u + 2 + 2 + 1 + 8 + 2 + 1);
  // One similar word and one embedding bring it back in both pictures, nothing else does.
  size_t word = 0, embedding = 0;
  for (size_t i = 0; i < result.prompts.size(); ++i) {
    if (result.prompts[i].attack == Attack::kSimilarWord) word = i;
    if (result.prompts[i].attack == Attack::kAdversarial) embedding = i;
  }
  for (PicturePair& pair : result.pairs) {
    pair.seen_after = !should_vanish(result.prompts[pair.prompt].list) || pair.prompt == word ||
                      pair.prompt == embedding;
  }
  const EvaluationSummary summary = summarize(result);
  ASSERT_EQ(summary.failing.size(), 2u);
  std::string sentence;
  for (const std::string& line : summary.verdict) {
    if (line.find("under attack") != std::string::npos) sentence = line;
  }
  EXPECT_EQ(sentence,
            "'owl' under attack: gone in 40 of 44 pictures; it came back by adversarial embedding "
            "(2 of 4), similar word (2 of 16).");
  const ConceptSet harder = with_failing_prompts(result, summary);
  EXPECT_EQ(harder.concepts[0].synonyms,
            (std::vector<std::string>{"night bird", result.prompts[word].phrase}));
  EXPECT_NO_THROW(validate(harder));
  const auto json = nlohmann::json::parse(to_json(result, summary));
  EXPECT_EQ(json.at("failing_prompts").size(), 2u);
  EXPECT_EQ(json.at("counts").at("attacks"), (nlohmann::json{40, 44}));
  EXPECT_EQ(json.at("attacks").size(), 7u);
  EXPECT_EQ(json.at("cost").at("pairs"), result.pairs.size());
  EXPECT_NE(to_html(json.dump(), {}).find("Prompts that still show"), std::string::npos);
  EXPECT_EQ(draw_contact_sheet(result, summary).dim(), 4);
}

TEST_P(EvaluationTest, ABrokenModelIsCalledBrokenAtEveryLevel) {
  BrokenDenoiser model(3, 16, device());
  for (const EvaluationLevel level : {EvaluationLevel::kQuick, EvaluationLevel::kThorough}) {
    options_.level = level;
    EXPECT_NE(summarize(run(model)).verdict.at(0).find("is broken"), std::string::npos);
  }
}

TEST_P(EvaluationTest, CountsUnderTheNamesOfPublishedBenchmarks) {
  set_.concepts[0].kind = ConceptKind::kStyle;
  Evaluation result = run(*edited(0.5));
  // Of the concept's own pictures one of four still shows it, of what should stay all do, and of
  // the attacks all come through.
  int64_t own = 0;
  for (PicturePair& pair : result.pairs) {
    pair.seen_before = true;
    pair.seen_after = result.prompts[pair.prompt].list != PromptList::kTarget || own++ % 4 == 0;
    pair.text_similarity_before = 0.3;
    pair.text_similarity_after = 0.2;
  }
  const auto lines_of = [&] {
    std::map<std::string, BenchmarkLine> lines;
    for (const BenchmarkLine& line : benchmark_lines(result)) lines[line.name] = line;
    return lines;
  };
  std::map<std::string, BenchmarkLine> lines = lines_of();
  EXPECT_EQ(lines.size(), 4u);  // no image encoder, no scores
  const BenchmarkLine& accuracy = lines["unlearning accuracy"];
  EXPECT_EQ(accuracy.pictures, 4);
  EXPECT_EQ(accuracy.before, 0.0);
  EXPECT_EQ(accuracy.after, 0.75);
  EXPECT_EQ(accuracy.interval.high, wilson_interval({3, 4}).high);
  EXPECT_EQ(lines["in-domain retain accuracy"].pictures, 8);
  EXPECT_EQ(lines["cross-domain retain accuracy"].after, 1.0);
  EXPECT_EQ(lines["attack success rate"].after, 1.0);
  EXPECT_TRUE(lines["attack success rate"].lower_is_better);
  result.compares_texts = true;
  lines = lines_of();
  EXPECT_EQ(lines["style score"].pictures, 4);
  EXPECT_NEAR(lines["style score"].before, 30.0, 1e-9);
  EXPECT_NEAR(lines["style score"].after, 20.0, 1e-9);
  EXPECT_EQ(lines["content score"].pictures, 12);
  result.concepts.concepts[0].kind = ConceptKind::kObject;
  EXPECT_FALSE(lines_of().contains("style score"));
}

TEST_P(EvaluationTest, AttacksDoNotChangeWhatElseIsMeasured) {
  const auto model = edited(0.5);
  const Evaluation quick = run(*model);
  options_.level = EvaluationLevel::kThorough;
  const Evaluation thorough = run(*model);
  const auto changes = [](const Evaluation& evaluation) {
    std::vector<double> values;
    for (const PicturePair& pair : evaluation.pairs) {
      const PromptList list = evaluation.prompts[pair.prompt].list;
      if (list != PromptList::kAttacks) values.push_back(pair.latent_change);
    }
    return values;
  };
  const std::vector<double> expected = changes(quick), found = changes(thorough);
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) EXPECT_NEAR(found[i], expected[i], 1e-4);
}

TEST_P(EvaluationTest, APromptFileIsDrawnAndJudgedByTheConcept) {
  options_.file = {{"uncanny night scene", "", "", 1},
                   {"something with wings", "Night Bird", "bird", 2},
                   {"third", "owl", "", 3}};
  options_.file_name = "set.csv";
  options_.file_prompts = 2;
  const Evaluation result = run(*edited(0.5));
  std::vector<EvaluationPrompt> drawn;
  for (const EvaluationPrompt& prompt : result.prompts) {
    if (prompt.list == PromptList::kFile) drawn.push_back(prompt);
  }
  ASSERT_EQ(drawn.size(), 2u);
  EXPECT_EQ(drawn[0].text, "uncanny night scene");
  EXPECT_EQ(drawn[0].name, "owl");
  EXPECT_NE(drawn[0].question.find("owl"), std::string::npos);
  EXPECT_EQ(drawn[1].name, "bird");
  const EvaluationSummary summary = summarize(result);
  const auto json = nlohmann::json::parse(to_json(result, summary));
  EXPECT_EQ(json.at("counts").at("prompt file").at(1), 4);
  EXPECT_EQ(json.at("protocol").at("prompt_file").at("prompts"), 3);
  EXPECT_EQ(json.at("protocol").at("prompt_file").at("used"), 2);
  EXPECT_TRUE(std::any_of(summary.verdict.begin(), summary.verdict.end(),
                          [](const auto& line) { return line.find("Of the prompt file, ") == 0; }));

  options_.file[2].about = "cat";
  EXPECT_NE(message_of([&] { run(*model_); }).find("line 3, is about 'cat'"), std::string::npos);
  options_.file.pop_back();
  set_.concepts.push_back(set_.concepts[0]);
  set_.concepts[1].target = "moth";
  set_.concepts[1].synonyms = {};
  EXPECT_NE(message_of([&] { run(*model_); }).find("does not say which of the 2 concepts"),
            std::string::npos);
}

TEST_P(EvaluationTest, PreflightDrawsNothing) {
  options_.level = EvaluationLevel::kPreflight;
  const Evaluation result = run(*edited(0.3));
  EXPECT_TRUE(result.pairs.empty());
  const EvaluationSummary summary = summarize(result);
  EXPECT_GE(summary.scores.erased, 0.0);
  EXPECT_LE(summary.scores.neighbours, 1.0);
  EXPECT_TRUE(std::isnan(summary.scores.unrelated));
  EXPECT_NE(summary.verdict.at(0).find("'owl'"), std::string::npos);
  EXPECT_NE(
      summary.verdict.back().find("'quick' draws 26 pairs of pictures (156 steps), 'thorough'"),
      std::string::npos)
      << summary.verdict.back();
  const at::Tensor sheet = draw_contact_sheet(result, summary);
  EXPECT_EQ(sheet.dim(), 4);
  EXPECT_NE(summarize(run(*model_)).verdict.at(0).find("No key or value matrix differs"),
            std::string::npos);
}

TEST_P(EvaluationTest, TheSheetHoldsThePicturesAndBothColours) {
  set_.concepts.push_back(set_.concepts[0]);
  set_.concepts[1].target = "moth \xc3\xa9t\xc3\xa9";
  set_.concepts[1].synonyms = {};
  FakeDetector detector;
  const Evaluation result = run(*edited(0.5), &detector);
  const EvaluationSummary summary = summarize(result);
  const at::Tensor sheet = draw_contact_sheet(result, summary);
  ASSERT_EQ(sheet.size(0), 2);
  EXPECT_EQ(sheet.size(3), 3);
  EXPECT_GE(sheet.min().item<double>(), 0.0);
  EXPECT_LE(sheet.max().item<double>(), 1.0);
  const auto pixels_of = [&](double r, double g, double b) {
    const at::Tensor colour = at::zeros({3});
    colour[0] = r;
    colour[1] = g;
    colour[2] = b;
    return (sheet - colour).abs().amax(-1).lt(1e-3).sum().item<int64_t>();
  };
  EXPECT_GT(pixels_of(0.0, 0.447, 0.698), 1000);
  // A tile is 16 times the fake decoder's 8 pixels: every pixel of the first picture is there.
  const at::Tensor first = result.after[0][0][0].to(at::kFloat) / 255;
  EXPECT_GE((sheet - first).abs().amax(-1).lt(1e-3).sum().item<int64_t>(), 256);
}

TEST_P(EvaluationTest, TheReportIsCompleteAndSafeToShow) {
  set_.concepts[0].target = "<owl> & \"co\"";
  const Evaluation result = run(*edited(0.5));
  const EvaluationSummary summary = summarize(result);
  const std::string json = to_json(result, summary);
  const auto root = nlohmann::json::parse(json);
  for (const char* key : {"pack", "model", "edited_weights", "sampler", "steps", "cfg", "seed",
                          "prompts_hash", "detector", "size", "concepts"}) {
    EXPECT_TRUE(root.at("protocol").contains(key)) << key;
  }
  EXPECT_EQ(root.at("pairs").size(), result.pairs.size());
  EXPECT_EQ(root.at("preflight").at("concepts").size(), 1u);
  const std::string html = to_html(json, {"not really a picture"});
  EXPECT_EQ(html.find("<owl>"), std::string::npos);
  EXPECT_NE(html.find("&lt;owl&gt;"), std::string::npos);
  EXPECT_NE(html.find("data:image/png;base64,bm90IHJlYWxseSBhIHBpY3R1cmU="), std::string::npos);
  EXPECT_NE(message_of([] { to_html("{}", {}); }).find("cannot be read"), std::string::npos);
  EXPECT_NE(message_of([] { to_html(R"({"format":"x"})", {}); }).find("not a report"),
            std::string::npos);
}

TEST_P(EvaluationTest, RefusesBeforeAnyWork) {
  const auto refused = [&](const std::string& expected) {
    const std::string message = message_of([&] { run(*model_); });
    EXPECT_NE(message.find(expected), std::string::npos) << message;
    EXPECT_EQ(clip_->encoded_prompts, 0);
  };
  options_.width = 60;
  refused("multiples of 8");
  options_.width = 64;
  options_.images = 0;
  refused("images must be 1 to 256, not 0");
  options_.images = 2;
  options_.neighbours = {"Night bird"};
  refused("is to be erased");
  options_.neighbours = {};
  vae_ = std::make_shared<WrongDecoder>();
  refused("VAE");
  set_.concepts.clear();
  refused("no concept");
}

TEST_P(EvaluationTest, CanBeCancelledAtAnyTime) {
  run(*model_);
  const int64_t checks = progress_.checks;
  for (const double share : {0.1, 0.3, 0.5, 0.7, 0.9, 1.0}) {
    progress_ = {};
    progress_.cancel_at = std::max<int64_t>(1, std::lround(share * static_cast<double>(checks)));
    EXPECT_THROW(run(*model_), testing::Cancelled);
  }
}

TEST(Verdict, SaysHowSureItIs) {
  Evaluation evaluation;
  Concept dog;
  dog.target = "dog";
  dog.anchor = "star";
  evaluation.concepts.concepts = {dog};
  evaluation.prompts = {
      {PromptList::kTarget, 0, "dog", "dog", "a photo of dog", "a photo of star"},
      {PromptList::kNeighbours, -1, "wolf", "wolf", "a photo of wolf", "a photo of star"},
      {PromptList::kUnrelated, -1, "", "", "a calm lake", ""}};
  const auto add = [&](size_t prompt, bool before, bool after, double change) {
    PicturePair pair;
    pair.prompt = prompt;
    pair.seen_before = before;
    pair.seen_after = after;
    pair.latent_change = pair.pixel_change = change;
    pair.implausibility = 1.0;
    evaluation.pairs.push_back(pair);
  };
  for (int i = 0; i < 20; ++i) add(0, true, false, 0.9);
  for (int i = 0; i < 4; ++i) add(1, true, true, 0.1);
  for (int i = 0; i < 4; ++i) add(2, true, true, 0.05);
  EvaluationSummary summary = summarize(evaluation);
  EXPECT_EQ(summary.verdict.at(0), "'dog' is gone in 20 of 20 pictures (up to 16 % possible).");
  EXPECT_EQ(summary.verdict.at(1), "'wolf' changed little.");
  EXPECT_NEAR(summary.scores.harmonic_mean, 1.0, 1e-12);
  EXPECT_NEAR(summary.lists.at(0).p, std::pow(0.5, 19), 1e-12);

  // The same edit, but everything else goes with it.
  for (PicturePair& pair : evaluation.pairs) {
    pair.latent_change = 0.9;
    pair.seen_after = false;
  }
  summary = summarize(evaluation);
  EXPECT_NE(summary.verdict.at(0).find("damages the model"), std::string::npos);
  EXPECT_EQ(summary.scores.harmonic_mean, 0.0);
}

// Pictures that are normally distributed around 0: their path from noise is known exactly.
class GaussianDenoiser final : public FakeDenoiser {
 public:
  GaussianDenoiser() : FakeDenoiser(1, 16) {}
  at::Tensor denoise(const DenoiseRequest& request, AttentionTap*) override {
    const at::Tensor variance = request.sigma.square().reshape({-1, 1, 1, 1});
    return request.noisy / (1 + variance);
  }
};

TEST(Dpmpp2M, IsOfSecondOrderWhereEulerIsOfFirst) {
  GaussianDenoiser model;
  LatentRequest request;
  request.noise = at::ones({1, 4, 8, 8});
  request.positive = request.negative = {at::zeros({1, 77, 16}), {}};
  request.cfg = 1.0;
  const auto error = [&](Sampler sampler, int64_t steps) {
    request.sampler = sampler;
    request.steps = steps;
    const double largest = model.noise_levels()[-1].item<double>();
    const double exact = largest / std::sqrt(1 + largest * largest);
    const at::Tensor drawn = sample_latents(model, request, [](int64_t) { return nullptr; });
    return std::abs(drawn.mean().item<double>() - exact);
  };
  // Twice the steps: half the error of Euler's method, about a quarter here.
  EXPECT_GT(error(Sampler::kEuler, 160), 0.45 * error(Sampler::kEuler, 80));
  EXPECT_LT(error(Sampler::kDpmpp2M, 160), 0.35 * error(Sampler::kDpmpp2M, 80));
  EXPECT_LT(error(Sampler::kDpmpp2M, 80), 0.5 * error(Sampler::kEuler, 80));
  EXPECT_EQ(sampler_from_string("dpmpp_2m"), Sampler::kDpmpp2M);
  EXPECT_NE(message_of([] { sampler_from_string("ddim"); }).find("dpmpp_2m"), std::string::npos);
}

}  // namespace
}  // namespace lacuna
