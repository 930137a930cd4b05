// SPDX-License-Identifier: Apache-2.0
#include "lacuna/evaluation/benchmark_lines.h"

#include <functional>

namespace lacuna {
namespace {

using Belongs = std::function<bool(const EvaluationPrompt&)>;

class Lines {
 public:
  explicit Lines(const Evaluation& evaluation) : evaluation_(evaluation) {}

  // Share of the pictures in which what the prompt is about is seen, or not seen.
  void add_share(const char* name, bool seen, bool lower_is_better, const Belongs& belongs) {
    Count before, after;
    for (const PicturePair& pair : evaluation_.pairs) {
      if (!belongs(evaluation_.prompts[pair.prompt])) continue;
      before.hits += pair.seen_before == seen;
      after.hits += pair.seen_after == seen;
      ++after.trials;
    }
    if (after.trials == 0) return;
    before.trials = after.trials;
    lines_.push_back({name, before.share(), after.share(), wilson_interval(after), lower_is_better,
                      after.trials});
  }

  // 100 times the mean cosine of picture and prompt.
  void add_score(const char* name, bool lower_is_better, const Belongs& belongs) {
    if (!evaluation_.compares_texts) return;
    std::vector<double> before, after;
    std::vector<int64_t> clusters;
    for (const PicturePair& pair : evaluation_.pairs) {
      if (!belongs(evaluation_.prompts[pair.prompt])) continue;
      before.push_back(100 * pair.text_similarity_before);
      after.push_back(100 * pair.text_similarity_after);
      clusters.push_back(static_cast<int64_t>(pair.prompt));
    }
    if (after.empty()) return;
    const int64_t seed = evaluation_.options.seed;
    const MeanEstimate estimate = clustered_bootstrap(after, clusters, seed, name);
    lines_.push_back({name, clustered_bootstrap(before, clusters, seed, name).mean, estimate.mean,
                      estimate.interval, lower_is_better, static_cast<int64_t>(after.size())});
  }

  std::vector<BenchmarkLine> take() { return std::move(lines_); }

 private:
  const Evaluation& evaluation_;
  std::vector<BenchmarkLine> lines_;
};

}  // namespace

std::vector<BenchmarkLine> benchmark_lines(const Evaluation& evaluation) {
  Lines lines(evaluation);
  const auto of = [](PromptList list) {
    return [list](const EvaluationPrompt& prompt) { return prompt.list == list; };
  };
  lines.add_share("unlearning accuracy", false, false, of(PromptList::kTarget));
  lines.add_share("in-domain retain accuracy", true, false, [](const EvaluationPrompt& prompt) {
    return prompt.list == PromptList::kPreserved || prompt.list == PromptList::kNeighbours;
  });
  lines.add_share("cross-domain retain accuracy", true, false, of(PromptList::kUnrelated));
  lines.add_share("attack success rate", true, true, [](const EvaluationPrompt& prompt) {
    return prompt.list == PromptList::kAttacks || prompt.list == PromptList::kFile;
  });
  lines.add_score("style score", true, [&](const EvaluationPrompt& prompt) {
    return prompt.list == PromptList::kTarget &&
           evaluation.concepts.concepts[static_cast<size_t>(prompt.concept_index)].kind ==
               ConceptKind::kStyle;
  });
  lines.add_score("content score", false,
                  [](const EvaluationPrompt& prompt) { return !should_vanish(prompt.list); });
  return lines.take();
}

}  // namespace lacuna
