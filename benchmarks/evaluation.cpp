// SPDX-License-Identifier: Apache-2.0
// The preflight of Evaluate Erasure on SD1.x and SDXL shapes: processor time and memory of the scan
// of all key and value matrices, without the text encoder. Embeddings are synthetic (anisotropic,
// common mean, one draw for each text); the edit has rank 64 in every matrix. Prints one JSON
// object. Usage: lacuna_bench_evaluation [sd1|sdxl] [concepts ...]
#include <ATen/ATen.h>

#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench_model.h"
#include "lacuna/concepts/concept_set.h"
#include "lacuna/evaluation/residual_scan.h"
#include "lacuna/files/random_stream.h"

namespace {

using nlohmann::json;
using namespace lacuna;
using namespace lacuna::bench;

// Words are tokens; measures the time that it takes itself.
class BenchEncoder final : public TextEncoder {
 public:
  explicit BenchEncoder(int64_t width)
      : scale_(at::logspace(0, -2, width, 10.0)), mean_(at::randn({width})) {}
  int64_t width() override { return scale_.size(0); }
  int64_t window() override { return 77; }
  std::string fingerprint() override { return ""; }
  std::string cache_directory() override { return ""; }
  std::vector<int64_t> tokenize(const std::string& text) override {
    std::vector<int64_t> ids{1};
    std::string word;
    for (const char c : text + " ") {
      if (c != ' ') {
        word += c;
      } else if (!word.empty()) {
        ids.push_back(static_cast<int64_t>(stable_hash(word) >> 1));
        word.clear();
      }
    }
    ids.push_back(2);
    return ids;
  }
  at::Tensor encode(const std::vector<std::string>& prompts) override {
    std::vector<at::Tensor> rows;
    seconds += timed([&] {
      for (const std::string& prompt : prompts) {
        at::Generator generator = random_stream(1, prompt, "bench");
        rows.push_back(at::randn({window(), width()}, generator, at::TensorOptions(at::kFloat)) *
                           scale_ +
                       mean_);
      }
    });
    encoded += static_cast<int64_t>(prompts.size());
    return at::stack(rows);
  }

  double seconds = 0.0;
  int64_t encoded = 0;

 private:
  at::Tensor scale_;
  at::Tensor mean_;
};

json run(const std::string& family, int64_t concepts) {
  const Shape shape = shape_of(family);
  at::manual_seed(1);
  BenchModel model(shape);
  std::vector<WeightDelta> deltas;
  for (const TextEntry& projection : model.text_entries()) {
    const at::Tensor weight = model.effective_weight(projection.name);
    deltas.push_back(
        {projection.name, 0.01 * at::randn({weight.size(0), 64}), at::randn({64, weight.size(1)})});
  }
  const std::shared_ptr<Denoiser> edited = model.with_weight_deltas(deltas, 1.0);
  BenchEncoder encoder(shape.width);
  ConceptSet set;
  for (int64_t i = 0; i < concepts; ++i) {
    Concept item;
    item.target = "concept" + std::to_string(i);
    item.anchor = "scenery";
    item.synonyms = {"other" + std::to_string(i), "word" + std::to_string(i)};
    set.concepts.push_back(item);
    set.preserve.push_back({"kept" + std::to_string(i), ConceptKind::kObject, 30});
  }
  SilentProgress progress;
  const double before_mb = peak_mb();
  const double cpu_s = timed([&] { scan_residuals(model, *edited, encoder, set, {}, progress); });
  return {{"cpu_s", cpu_s - encoder.seconds},
          {"texts", encoder.encoded},
          {"peak_extra_mb", peak_mb() - before_mb}};
}

}  // namespace

int main(int argc, char** argv) {
  const std::string family = argc > 1 ? argv[1] : "sd1";
  json results;
  for (int i = 2; i < argc; ++i) {
    results["n" + std::string(argv[i])] = run(family, std::stoll(argv[i]));
  }
  std::printf("%s\n", results.dump(2).c_str());
}
