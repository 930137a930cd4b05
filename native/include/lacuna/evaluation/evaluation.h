// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "lacuna/evaluation/evaluation_record.h"

namespace lacuna {

// Throws Error for options out of range, models of different families, a text encoder or decoder of
// another model, a prompt file that is about something else. Nothing is drawn.
void check(const EvaluationInputs& inputs, const ConceptSet& set, const EvaluationOptions& options);

// Scans the weights, draws "before" first and "after" second, and measures. A picture depends on
// its prompt, its number and the seed alone.
Evaluation evaluate(const EvaluationInputs& inputs, const ConceptSet& set,
                    const EvaluationOptions& options, Progress& progress);

}  // namespace lacuna
