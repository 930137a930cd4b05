// SPDX-License-Identifier: Apache-2.0
// Closed-form fusion on SD1.x shapes: solve + patch (host patches and a rank-128 LoRA) for n
// concepts with rank-1 LoRAs on all 32 matrices; adding one; changing a strength. Concepts are
// synthetic (anisotropic embeddings with a common mean) and stored as a loaded bundle stores them,
// in float32. Memory is counted above the model, the bundle included. Prints one JSON object.
// Usage: lacuna_bench_fusion [concepts ...]; peak memory is meaningful for the first count only.
#include <ATen/ATen.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench_model.h"
#include "lacuna/closed_form/lora_export.h"
#include "lacuna/closed_form/low_rank.h"
#include "lacuna/closed_form/text_entry.h"
#include "lacuna/training/fusion.h"

namespace {

using nlohmann::json;
using namespace lacuna;
using namespace lacuna::bench;

constexpr int64_t kWidth = 768;
constexpr int64_t kPrompts = 12;  // enough rows for a Gram matrix of full rank
constexpr int64_t kPositions = 77;
constexpr int64_t kLoraRank = 128;

double resident_mb() {
  int64_t total = 0;
  int64_t resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return static_cast<double>(resident) * static_cast<double>(sysconf(_SC_PAGESIZE)) / (1 << 20);
}

class Embeddings {
 public:
  Embeddings() : scale_(at::logspace(0, -2, kWidth, 10.0)), mean_(at::randn({kWidth})) {}
  // Mean over prompts of sum e e^T, [d, d] float64.
  at::Tensor gram(int64_t prompts) const {
    const at::Tensor offset = at::randn({kWidth}) * scale_;  // what the prompts have in common
    const at::Tensor rows =
        (at::randn({prompts * kPositions, kWidth}) * scale_ + mean_ + offset).to(at::kDouble);
    return at::matmul(rows.t(), rows) / static_cast<double>(prompts);
  }

 private:
  at::Tensor scale_;
  at::Tensor mean_;
};

std::shared_ptr<const ConceptLora> draw(int64_t index, BenchModel& model,
                                        const Embeddings& embeddings) {
  auto item = std::make_shared<ConceptLora>();
  item->item.target = "concept " + std::to_string(index);
  item->item.anchor = "scenery";
  const at::Tensor gram = embeddings.gram(kPrompts);
  const at::Tensor shift = at::randn({kWidth, 8}, at::kDouble) * 0.01;
  item->refinement_shift =
      at::matmul(at::matmul(shift, at::randn({8, kWidth}, at::kDouble)), gram).to(at::kFloat);
  item->prompt_gram = gram.to(at::kFloat);
  // Only mode 'joint' reads it; a bundle holds it all the same.
  item->refinement_gram = item->prompt_gram.clone();
  for (const TextEntry& projection : model.text_entries()) {
    const int64_t rows = model.effective_weight(projection.name).size(0);
    item->pairs[projection.lora_name] = {at::randn({rows, 1}) * 5e-3, at::randn({1, kWidth})};
  }
  return item;
}

json run(int64_t concepts) {
  at::manual_seed(1);
  BenchModel model(shape_of("sd1"));
  const Embeddings embeddings;
  SilentProgress progress;
  const FusionOptions options;
  const KeptText kept{20.0 * embeddings.gram(kPrompts), embeddings.gram(100), {}};
  const auto projections = model.text_entries();
  const double before_mb = resident_mb();

  std::vector<std::shared_ptr<const ConceptLora>> items;
  for (int64_t i = 0; i < concepts; ++i) items.push_back(draw(i, model, embeddings));
  const double bundle_mb = resident_mb() - before_mb;

  json out;
  FusionSums sums;
  Fusion fusion;
  const double add_s = timed([&] { sums.assign(items); });
  const double solve_s = timed([&] { fusion = sums.solve(kept, options, {}, progress); });
  LoraExport lora;
  const double patch_s = timed([&] {
    const at::Tensor rows = entry_rows(model, projections, progress);
    const SharedFactorization factors(fusion.patch.delta, rows, 2 * kLoraRank, progress);
    lora = export_lora(model, projections, fusion.patch, factors, {kLoraRank}, 1.0, progress);
  });
  out["check_cpu_s"] = add_s;
  out["solve_cpu_s"] = solve_s;
  out["patch_cpu_s"] = patch_s;
  out["cpu_s"] = add_s + solve_s + patch_s;
  out["peak_extra_mb"] = peak_mb() - before_mb;
  out["bundle_mb"] = bundle_mb;  // included in peak
  out["condition"] = fusion.condition;
  out["lora_rank_128_residual"] = lora.residual;

  const at::Tensor before = fusion.patch.delta.clone();
  const auto guest = draw(concepts, model, embeddings);
  out["add_one_cpu_ms"] = 1e3 * timed([&] {
                            sums.add(guest);
                            sums.solve(kept, options, {}, progress);
                          });
  sums.remove(guest->item.target);
  fusion = sums.solve(kept, options, {}, progress);
  out["remove_one_difference"] = (fusion.patch.delta - before).abs().max().item<double>();
  out["strength_cpu_ms"] =
      1e3 * timed([&] { sums.solve(kept, options, {{items[0]->item.target, 0.5}}, progress); });

  // Error of the float32 patch against the dense float64 normal equations, one matrix of each
  // shape.
  at::Tensor h = options.regularization * at::eye(kWidth, at::kDouble) +
                 options.preserve_weight * kept.preserve + options.prior_weight * kept.prior;
  for (const auto& item : items) h += item->prompt_gram;
  double worst = 0.0;
  for (const char* name : {"320.0", "640.0", "1280.0"}) {
    const at::Tensor w = model.effective_weight(name).to(at::kDouble);
    at::Tensor right = at::zeros_like(w);
    for (const auto& item : items) {
      const LoraPair& pair = item->pairs.at(name);
      right += at::matmul(w, item->refinement_shift.to(at::kDouble)) +
               at::matmul(at::matmul(pair.up, pair.down).to(at::kDouble),
                          item->prompt_gram.to(at::kDouble));
    }
    const at::Tensor reference = at::linalg_solve(h, right.t()).t();
    const auto projection = std::find_if(projections.begin(), projections.end(),
                                         [&](const auto& p) { return p.name == name; });
    const at::Tensor ours =
        weight_change(fusion.patch, *projection, model.effective_weight(name)).to(at::kDouble);
    worst = std::max(worst, ((ours - reference).norm() / reference.norm()).item<double>());
  }
  out["rel_error_of_change"] = worst;
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  json results;
  for (int i = 1; i < argc; ++i) results["n" + std::string(argv[i])] = run(std::stoll(argv[i]));
  std::printf("%s\n", results.dump(2).c_str());
}
