// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "lacuna/closed_form/refinement.h"
#include "lacuna/closed_form/row_fit.h"

namespace lacuna {

// Of the pooled vectors of one prompt each: concepts' prompts move to their anchors', preserved
// phrases and the general prior stay. Weights are those of collect_problem, so that one prompt
// counts as much here as its rows count there. Throws Error when the text encoder gives no pooled
// vector.
StreamRows collect_pooled(TextEncoder& encoder, const ConceptSet& set,
                          const RefinementOptions& options, Progress& progress);

// N - I of the pooled stream. A prompt has one pooled vector where cross-attention reads a whole
// window of rows, so that lambda is that much smaller.
RowFit fit_pooled(TextEncoder& encoder, const ConceptSet& set, const RefinementOptions& options,
                  Progress& progress);

}  // namespace lacuna
