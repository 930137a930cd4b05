// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include "lacuna/evaluation/evaluation_record.h"
#include "lacuna/evaluation/evaluation_report.h"

namespace lacuna {

// The evaluation as a picture: pairs before and after, with labels, scores and the verdict. What a
// colour says is also said in words; the colours are told apart by colour-blind people.

// [pages, H, W, 3] float32 in 0..1, a page for each of the first 16 concepts; what must stay is on
// the first page. Of a preflight: bars of what is left of every phrase.
at::Tensor draw_contact_sheet(const Evaluation& evaluation, const EvaluationSummary& summary);

}  // namespace lacuna
