// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "lacuna/evaluation/evaluation_record.h"

namespace lacuna {

// Draws both pictures of every pair of `evaluation` and measures them; fills pairs, before, after,
// identical and broken. Reports one unit of work per forward pass.
void draw_pairs(const EvaluationInputs& inputs, const EvaluationOptions& options,
                Evaluation& evaluation, Progress& progress);

}  // namespace lacuna
