// SPDX-License-Identifier: Apache-2.0
// The seeds of the fuzz targets, among them every input that once was a fault.
#include <filesystem>
#include <fstream>
#include <iterator>

#include "fuzz/targets.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;

TEST(FuzzSeeds, EveryOneEndsInAValueOrASentence) {
  const std::pair<const char*, void (*)(std::string_view)> targets[] = {
      {"concepts", &fuzz::concepts}, {"preserve", &fuzz::preserve},
      {"prompts", &fuzz::prompts},   {"safetensors", &fuzz::safetensors},
      {"bundle", &fuzz::bundle},     {"workflow", &fuzz::workflow},
      {"widgets", &fuzz::widgets},
  };
  for (const auto& [name, target] : targets) {
    size_t seeds = 0;
    for (const auto& entry : fs::directory_iterator(fs::path(LACUNA_FUZZ_SEEDS) / name)) {
      std::ifstream file(entry.path(), std::ios::binary);
      const std::string input{std::istreambuf_iterator<char>(file), {}};
      try {
        target(input);
      } catch (const std::exception& e) {
        ADD_FAILURE() << entry.path() << ": " << e.what();
      }
      ++seeds;
    }
    EXPECT_GT(seeds, 0u) << name;
  }
}

}  // namespace
}  // namespace lacuna
