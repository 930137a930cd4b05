// SPDX-License-Identifier: Apache-2.0
// Closed-form erasure on SD1.x and SDXL shapes: statistics + solve + patch, against
//   naive: the formula taken literally for every matrix: projections materialised, one outer
//   product
//          for each embedding, one float32 inverse per matrix;
//   batched: the same with products batched over prompts, as a careful script would;
//   dense: the shared d x d map multiplied into every matrix (W P), no low-rank form, no LoRA.
// Embeddings are synthetic, with the spectrum of a real CLIP-L (measured on prompts of one concept:
// singular values 216, 57, 23, 2.7, 0.55, 0.18, 0.077, 0.0098, 0.0019 at 0, 1, 5, 20, 50, 100, 200,
// 400, 700 of 768; wider ones stretched); text encoding is not part of any figure.
// naive and batched are timed on one concept and one matrix of each shape and multiplied. Prints
// one JSON object. Usage: lacuna_bench_closed_form [sd1|sdxl|wide] [concepts ...]
#include <ATen/ATen.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "bench_model.h"
#include "lacuna/closed_form/lora_export.h"
#include "lacuna/closed_form/low_rank.h"
#include "lacuna/closed_form/refinement.h"
#include "lacuna/closed_form/row_fit.h"
#include "lacuna/closed_form/text_entry.h"
#include "lacuna/error.h"

namespace {

using nlohmann::json;
using namespace lacuna;
using namespace lacuna::bench;

constexpr int64_t kPrompts = 30;
constexpr int64_t kPositions = 75;  // paired positions of a two-token phrase
constexpr double kLambda = 0.1;

// Embeddings of one concept's prompts and their anchors, [prompts, positions, d] float32.
class Embeddings {
 public:
  explicit Embeddings(int64_t width) : basis_(at::randn({width, width})), scale_(spectrum(width)) {
    basis_ = std::get<0>(at::linalg_qr(basis_));
  }
  at::Tensor draw(int64_t concept_index, bool anchor) const {
    at::Generator generator =
        at::detail::createCPUGenerator(static_cast<uint64_t>(1 + 2 * concept_index + anchor));
    const at::Tensor rows =
        at::randn({kPrompts, kPositions, scale_.size(0)}, generator, at::TensorOptions(at::kFloat));
    return shaped(rows);
  }
  // Standard normal rows with the spectrum.
  at::Tensor shaped(const at::Tensor& rows) const { return at::matmul(rows * scale_, basis_.t()); }
  int64_t width() const { return scale_.size(0); }

 private:
  // Root mean square of a prompt's row along each direction.
  static at::Tensor spectrum(int64_t width) {
    const double at_place[] = {0, 1, 5, 20, 50, 100, 200, 400, 700, 768};
    const double value[] = {216, 57, 23, 2.7, 0.55, 0.18, 0.077, 0.0098, 0.0019, 0.0015};
    at::Tensor out = at::empty({width}, at::kFloat);
    for (int64_t i = 0; i < width; ++i) {
      const double x = 768.0 * static_cast<double>(i) / static_cast<double>(width);
      int k = 0;
      while (at_place[k + 1] < x) ++k;
      const double t = (x - at_place[k]) / (at_place[k + 1] - at_place[k]);
      out[i] = std::exp((1 - t) * std::log(value[k]) + t * std::log(value[k + 1])) /
               std::sqrt(static_cast<double>(kPositions));
    }
    return out;
  }

  at::Tensor basis_;  // [d, d] orthogonal
  at::Tensor scale_;  // [d]
};

// Reads words like CLIP, as rows of the same spectrum: position t depends on tokens 0..t. Its own
// CPU seconds are counted, to be left out.
class BenchEncoder : public TextEncoder {
 public:
  explicit BenchEncoder(const Embeddings& embeddings) : embeddings_(embeddings) {}
  int64_t width() override { return embeddings_.width(); }
  int64_t window() override { return 77; }
  std::string fingerprint() override { return "benchmark"; }
  std::string cache_directory() override { return ""; }
  std::vector<int64_t> tokenize(const std::string& text) override {
    std::vector<int64_t> ids{1};
    for (std::istringstream words(text); words;) {
      std::string word;
      if (words >> word) ids.push_back(static_cast<int64_t>(std::hash<std::string>{}(word) | 4));
    }
    ids.push_back(2);
    return ids;
  }
  at::Tensor encode(const std::vector<std::string>& prompts) override {
    at::Tensor rows;
    seconds += timed([&] {
      rows = at::empty({static_cast<int64_t>(prompts.size()), window(), width()});
      for (size_t i = 0; i < prompts.size(); ++i) {
        std::vector<int64_t> ids = tokenize(prompts[i]);
        ids.resize(static_cast<size_t>(window()), 2);
        uint64_t seed = 0;
        for (int64_t t = 0; t < window(); ++t) {
          seed = (seed ^ static_cast<uint64_t>(ids[static_cast<size_t>(t)])) * 0x9E3779B97F4A7C15u +
                 static_cast<uint64_t>(t);
          rows[static_cast<int64_t>(i)][t].copy_(
              at::randn({width()}, at::detail::createCPUGenerator(seed)));
        }
      }
      rows = embeddings_.shaped(rows);
    });
    return rows;
  }
  double seconds = 0.0;

 private:
  const Embeddings& embeddings_;
};

ConceptSet concept_set(int64_t concepts) {
  ConceptSet set;
  set.general_prior = GeneralPriorSize::kNone;
  for (int64_t i = 0; i < concepts; ++i) {
    Concept item;
    item.target = "thing" + std::to_string(i) + " kind" + std::to_string(i);
    item.anchor = "scenery";
    set.concepts.push_back(item);
  }
  return set;
}

// Numerator and Gram matrix of one concept for one matrix, literally: one outer product per
// embedding, of projections that were materialised before.
struct Sums {
  at::Tensor numerator;
  at::Tensor gram;
};

void add_literally(Sums& sums, const at::Tensor& w, const at::Tensor& f, const at::Tensor& g) {
  for (int64_t prompt = 0; prompt < kPrompts; ++prompt) {
    const at::Tensor values = at::matmul(g[prompt], w.t()).unsqueeze(2);  // [positions, out, 1]
    const at::Tensor rows = f[prompt].unsqueeze(1);                       // [positions, 1, d]
    sums.numerator += at::matmul(values, rows).sum(0) / kPrompts;
    sums.gram += at::matmul(rows.transpose(1, 2), rows).sum(0) / kPrompts;
  }
}

// The same with one batched product for each position, summed over prompts inside: less naive.
void add_batched(Sums& sums, const at::Tensor& w, const at::Tensor& f, const at::Tensor& g) {
  const at::Tensor values = at::matmul(g, w.t());  // [prompts, positions, out]
  sums.numerator += at::bmm(values.permute({1, 2, 0}), f.permute({1, 0, 2})).sum(0) / kPrompts;
  sums.gram += at::bmm(f.permute({1, 2, 0}), f.permute({1, 0, 2})).sum(0) / kPrompts;
}

// CPU seconds for all matrices and concepts: one concept on one matrix of each shape is timed, one
// float32 inverse per matrix added.
double per_matrix_seconds(const Shape& shape, BenchModel& model, const Embeddings& embeddings,
                          int64_t concepts,
                          const std::function<void(Sums&, const at::Tensor&, const at::Tensor&,
                                                   const at::Tensor&)>& add) {
  const at::Tensor f = embeddings.draw(0, false);
  const at::Tensor g = embeddings.draw(0, true);
  double seconds = 0.0;
  for (const auto& [rows, count] : shape.matrices) {
    const at::Tensor w = model.effective_weight(std::to_string(rows) + ".0");
    Sums sums{kLambda * w, kLambda * at::eye(shape.width)};
    const double one_concept = timed([&] { add(sums, w, f, g); });
    const double solve = timed([&] { at::matmul(sums.numerator, at::inverse(sums.gram)); });
    seconds += static_cast<double>(count) * (static_cast<double>(concepts) * one_concept + solve);
  }
  return seconds;
}

json run(const std::string& family, int64_t concepts) {
  const Shape shape = shape_of(family);
  at::manual_seed(1);
  BenchModel model(shape);
  const Embeddings embeddings(shape.width);
  SilentProgress progress;
  RefinementOptions options;
  options.regularization = kLambda;
  const auto projections = edited_entries(model, EditedMatrices::kKeyAndValue, shape.width);

  json out;
  forget_peak();
  const double before_mb = peak_mb();
  RefinementProblem problem;
  BenchEncoder encoder(embeddings);
  double statistics_s = timed([&] {
    problem = collect_problem(encoder, concept_set(concepts), options, nullptr, progress);
  });
  statistics_s -= encoder.seconds;
  const double statistics_mb = peak_mb() - before_mb;
  // The error below is that of rows drawn for it.
  problem.preserve = problem.prior = at::Tensor();
  problem.concepts = TextStatistics::zeros(shape.width);
  for (int64_t i = 0; i < concepts; ++i) {
    const at::Tensor from = embeddings.draw(i, false).reshape({-1, shape.width});
    const at::Tensor to = embeddings.draw(i, true).reshape({-1, shape.width});
    StatisticsAccumulator sums(shape.width);
    sums.add_pairs(from, to, 1.0 / kPrompts);
    problem.concepts.add(sums.finish());
  }
  forget_peak();
  Refinement refinement;
  const double solve_s = timed([&] { refinement = solve_refinement(problem, options); });
  TextMap map;
  LoraExport lora;
  const double patch_s = timed([&] { map = text_map(refinement.delta, projections); });
  const double model_mb = std::max(statistics_mb, peak_mb() - before_mb);
  options.regularization = 2 * kLambda;
  out["resolve_cpu_ms"] = 1e3 * timed([&] { solve_refinement(problem, options); });
  problem = {};
  forget_peak();
  const double lora_s = timed([&] {
    const LoraLimits limits{256, 0.01};
    const at::Tensor rows = entry_rows(model, projections, progress);
    const SharedFactorization factors(refinement.delta, rows, limits.rank, progress,
                                      limits.left_out);
    lora = export_lora(model, projections, refinement.delta, factors, limits, 1.0, progress);
  });
  const double extra_mb = std::max(model_mb, peak_mb() - before_mb);
  const double dense_s = timed([&] {
    const at::Tensor p = (refinement.delta + at::eye(shape.width, at::kDouble)).to(at::kFloat);
    for (const auto& projection : projections)
      at::matmul(model.effective_weight(projection.name), p);
  });
  out["statistics_cpu_s"] = statistics_s;
  out["solve_cpu_s"] = solve_s;
  out["patch_cpu_s"] = patch_s;
  out["lora_cpu_s"] = lora_s;
  out["model_cpu_s"] = statistics_s + solve_s + patch_s;  // without the LoRA
  out["statistics_peak_extra_mb"] = statistics_mb;
  out["model_peak_extra_mb"] = model_mb;
  out["lora_rank"] = lora.rank;
  out["lora_residual"] = lora.residual;
  out["cpu_s"] = statistics_s + solve_s + patch_s + lora_s;
  out["dense_cpu_s"] = statistics_s + solve_s + dense_s;
  out["peak_extra_mb"] = extra_mb;
  out["condition"] = refinement.condition;

  out["naive_cpu_s"] = per_matrix_seconds(shape, model, embeddings, concepts, add_literally);
  out["batched_cpu_s"] = per_matrix_seconds(shape, model, embeddings, concepts, add_batched);
  out["naive_over_ours"] = out["naive_cpu_s"].get<double>() / out["cpu_s"].get<double>();
  out["batched_over_ours"] = out["batched_cpu_s"].get<double>() / out["cpu_s"].get<double>();

  // Error of the float32 patch against the float64 normal equations of the same rows.
  at::Tensor g = kLambda * at::eye(shape.width, at::kDouble);
  at::Tensor c = g.clone();
  for (int64_t i = 0; i < concepts; ++i) {
    const at::Tensor f = embeddings.draw(i, false).reshape({-1, shape.width}).to(at::kDouble);
    const at::Tensor t = embeddings.draw(i, true).reshape({-1, shape.width}).to(at::kDouble);
    g.addmm_(f.t(), f, 1.0, 1.0 / kPrompts);
    c.addmm_(t.t(), f, 1.0, 1.0 / kPrompts);
  }
  double worst = 0.0;
  double worst_naive = 0.0;
  for (const auto& [rows, count] : shape.matrices) {
    const std::string name = std::to_string(rows) + ".0";
    const at::Tensor w = model.effective_weight(name);
    const at::Tensor reference = at::linalg_solve(g, at::matmul(w.to(at::kDouble), c).t()).t();
    const at::Tensor ours = w + at::matmul(w, map.out);  // as the host merges it
    worst = std::max(worst,
                     ((ours.to(at::kDouble) - reference).norm() / reference.norm()).item<double>());
    if (concepts <= 10 && family == "sd1") {
      Sums sums{kLambda * w, kLambda * at::eye(shape.width)};
      for (int64_t k = 0; k < concepts; ++k) {
        add_batched(sums, w, embeddings.draw(k, false), embeddings.draw(k, true));
      }
      const at::Tensor naive = at::matmul(sums.numerator, at::inverse(sums.gram)).to(at::kDouble);
      worst_naive =
          std::max(worst_naive, ((naive - reference).norm() / reference.norm()).item<double>());
    }
  }
  out["rel_error"] = worst;
  if (worst_naive > 0.0) out["naive_rel_error"] = worst_naive;
  return out;
}

// A wide stream (FLUX.2 reads 15,360 columns) by its rows alone: `concepts` phrases in six prompts
// of which a dozen rows move each, and 600 rows that stay. Random rows: nothing is collinear.
json run_wide(int64_t width, int64_t concepts) {
  at::manual_seed(1);
  const int64_t moving = concepts * 6 * 12;
  const StreamRows rows{at::randn({moving, width}), at::randn({moving, width}),
                        at::full({moving}, 1.0 / 6, at::kDouble), at::randn({600, width}),
                        at::ones({600}, at::kDouble)};
  json out;
  forget_peak();
  const double before_mb = peak_mb();
  RowFit fit;
  out["cpu_s"] = timed([&] { fit = fit_rows(rows, kLambda); });
  out["peak_extra_mb"] = peak_mb() - before_mb;
  // N - I on the rows that move: nearly T - F, on those that stay: nearly nothing.
  const at::Tensor read =
      at::matmul(at::matmul(rows.from.to(at::kDouble), fit.in.t()), fit.out.t());
  const at::Tensor moved = (rows.to - rows.from).to(at::kDouble);
  out["left_of_concepts"] = ((read - moved).norm() / moved.norm()).item<double>();
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string family = argc > 1 ? argv[1] : "sd1";
  json results;
  for (int i = 2; i < argc; ++i) {
    const int64_t concepts = std::stoll(argv[i]);
    results["n" + std::string(argv[i])] =
        family == "wide" ? run_wide(15360, concepts) : run(family, concepts);
  }
  std::printf("%s\n", results.dump(2).c_str());
}
