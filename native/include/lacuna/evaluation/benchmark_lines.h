// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "lacuna/evaluation/evaluation_record.h"

namespace lacuna {

// One figure under the name that papers compare edits by, from an evaluation's own pictures: other
// prompts and judges than in any paper, so that figures compare edits of one's own.
struct BenchmarkLine {
  std::string name;
  double before = 0.0;
  double after = 0.0;
  Interval interval;  // of after
  bool lower_is_better = false;
  int64_t pictures = 0;
};

// What the evaluation's lists allow, of:
// - "unlearning accuracy": share of the concepts' pictures without the concept. Of ten concepts
//   erased one after the other it is the sequential (continual) unlearning accuracy.
// - "in-domain retain accuracy", "cross-domain retain accuracy": shares of what is similar
//   (preserved, neighbours) and of unrelated captions that still show what they should
//   (Zhang et al. 2024, UnlearnCanvas).
// - "attack success rate": share of the pictures of attacks and the prompt file that show the
//   concept.
// - "style score", "content score": 100 times the mean cosine of picture and prompt, of the styles
//   to erase and of everything that should stay; only with an image encoder that knows texts.
std::vector<BenchmarkLine> benchmark_lines(const Evaluation& evaluation);

}  // namespace lacuna
