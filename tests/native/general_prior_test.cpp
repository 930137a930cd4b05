// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/general_prior.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/files/safetensors_file.h"
#include "support/fake_host.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::FakeTextEncoder;
using testing::relative_difference;

TEST(GeneralPrior, CaptionsAreManyAndDistinct) {
  const auto full = generic_captions(GeneralPriorSize::kFull);
  EXPECT_EQ(full.size(), 2000u);
  EXPECT_EQ(std::set<std::string_view>(full.begin(), full.end()).size(), full.size());
  EXPECT_EQ(generic_captions(GeneralPriorSize::kSmall).size(), 200u);
  EXPECT_TRUE(generic_captions(GeneralPriorSize::kNone).empty());
}

TEST(GeneralPrior, FindsCaptionsThatNameAPhraseAsWholeWords) {
  const auto dogs = captions_naming(GeneralPriorSize::kFull, {"Dog"});
  EXPECT_GT(dogs.size(), 0u);
  EXPECT_LT(dogs.size(), 60u);
  for (const std::string& caption : dogs) EXPECT_NE(caption.find("dog"), std::string::npos);
  EXPECT_TRUE(captions_naming(GeneralPriorSize::kFull, {"og", "zzyzx"}).empty());
  EXPECT_TRUE(captions_naming(GeneralPriorSize::kNone, {"dog"}).empty());
}

TEST(PromptTemplates, OneSlotEachAtMixedPositions) {
  for (const auto kind :
       {ConceptKind::kObject, ConceptKind::kPerson, ConceptKind::kStyle, ConceptKind::kExplicit}) {
    const auto templates = prompt_templates(kind);
    ASSERT_EQ(templates.size(), static_cast<size_t>(kTemplatesPerKind));
    int starts = 0;
    int ends = 0;
    for (std::string_view item : templates) {
      const size_t slot = item.find("{}");
      ASSERT_NE(slot, std::string_view::npos) << item;
      EXPECT_EQ(item.find("{}", slot + 1), std::string_view::npos) << item;
      starts += slot == 0;
      ends += slot + 2 == item.size();
      EXPECT_EQ(fill_template(item, "X"),
                prefix_of_template(item) + "X" + std::string(item.substr(slot + 2)));
    }
    EXPECT_GE(starts, 5);
    EXPECT_GE(kTemplatesPerKind - starts - ends, 5);
  }
}

class GeneralPriorTest : public testing::DeviceTest {
 protected:
  std::string only_file() const {
    for (const auto& entry : std::filesystem::directory_iterator(folder_.path(""))) {
      return entry.path().string();
    }
    return "";
  }
  testing::TemporaryFolder folder_;
};
INSTANTIATE_TEST_SUITE_P(Devices, GeneralPriorTest, ::testing::ValuesIn(testing::devices()));

TEST_P(GeneralPriorTest, IsTheMeanGramOverCaptions) {
  FakeTextEncoder encoder(8, device());
  SilentProgress progress;
  at::Tensor expected = at::zeros({8, 8}, at::kDouble);
  for (std::string_view caption : generic_captions(GeneralPriorSize::kSmall)) {
    const at::Tensor rows = encoder.encode({std::string(caption)})[0].cpu().to(at::kDouble);
    expected += at::matmul(rows.t(), rows) / 200.0;
  }
  EXPECT_LT(relative_difference(general_prior_gram(encoder, GeneralPriorSize::kSmall, progress),
                                expected),
            1e-9);
  EXPECT_EQ(
      general_prior_gram(encoder, GeneralPriorSize::kNone, progress).abs().max().item<double>(),
      0.0);
}

TEST_P(GeneralPriorTest, IsCachedUnderTheEncodersHash) {
  FakeTextEncoder encoder(8, device());
  encoder.cache_directory_ = folder_.path("");
  testing::CountingProgress progress;
  const at::Tensor first = general_prior_gram(encoder, GeneralPriorSize::kSmall, progress);
  EXPECT_EQ(encoder.encoded_prompts, 200);
  EXPECT_GE(progress.checks, 50);
  EXPECT_TRUE(at::equal(general_prior_gram(encoder, GeneralPriorSize::kSmall, progress), first));
  EXPECT_EQ(encoder.encoded_prompts, 200);

  // A damaged cache file is computed again and replaced.
  std::ofstream(only_file(), std::ios::trunc) << "garbage";
  EXPECT_TRUE(at::equal(general_prior_gram(encoder, GeneralPriorSize::kSmall, progress), first));
  EXPECT_EQ(encoder.encoded_prompts, 400);
  general_prior_gram(encoder, GeneralPriorSize::kSmall, progress);
  EXPECT_EQ(encoder.encoded_prompts, 400);

  encoder.fingerprint_ = "other";
  general_prior_gram(encoder, GeneralPriorSize::kSmall, progress);
  EXPECT_EQ(encoder.encoded_prompts, 600);
  encoder.cache_directory_ = "/proc/nowhere";  // cannot be written: still works
  EXPECT_TRUE(at::equal(general_prior_gram(encoder, GeneralPriorSize::kSmall, progress), first));
}

// One bit of a number that stays finite would change every result, without a word.
TEST_P(GeneralPriorTest, ACacheThatCannotBeTrustedIsComputedAgain) {
  FakeTextEncoder encoder(8, device());
  encoder.cache_directory_ = folder_.path("");
  SilentProgress progress;
  const at::Tensor first = general_prior_gram(encoder, GeneralPriorSize::kSmall, progress);
  const std::string file = only_file();
  std::ifstream stream(file, std::ios::binary);
  const std::string good{std::istreambuf_iterator<char>(stream), {}};
  std::string flipped = good;
  flipped[flipped.size() - 100] ^= 0x10;
  const std::string header =
      R"({"tensor":{"dtype":"F64","shape":[0,18446744073709551615],"data_offsets":[0,0]}})";
  std::string negative(8, '\0');
  negative[0] = static_cast<char>(header.size());
  negative += header;
  save_safetensors({{{"gram", first + 1.0}}, {{"format", "lacuna.general_prior/1"}}}, file);
  std::ifstream written(file, std::ios::binary);
  const std::string of_an_earlier_version{std::istreambuf_iterator<char>(written), {}};
  for (const std::string& bytes : {flipped, negative, of_an_earlier_version}) {
    std::ofstream(file, std::ios::trunc | std::ios::binary) << bytes;
    const int64_t before = encoder.encoded_prompts;
    EXPECT_TRUE(at::equal(general_prior_gram(encoder, GeneralPriorSize::kSmall, progress), first));
    EXPECT_EQ(encoder.encoded_prompts, before + 200);
    general_prior_gram(encoder, GeneralPriorSize::kSmall, progress);
    EXPECT_EQ(encoder.encoded_prompts, before + 200);
  }
}

TEST_P(GeneralPriorTest, CancellingLeavesNoFile) {
  FakeTextEncoder encoder(8, device());
  encoder.cache_directory_ = folder_.path("");
  testing::CountingProgress progress;
  progress.cancel_at = 4;
  EXPECT_THROW(general_prior_gram(encoder, GeneralPriorSize::kSmall, progress), testing::Cancelled);
  EXPECT_EQ(only_file(), "");
}

}  // namespace
}  // namespace lacuna
