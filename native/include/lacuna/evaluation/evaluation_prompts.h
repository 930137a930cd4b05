// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "lacuna/evaluation/evaluation_prompt.h"
#include "lacuna/evaluation/residual_scan.h"

namespace lacuna {

// Throws Error naming the line of the prompt file that is about none of the concepts.
void check_prompt_file(const ConceptSet& set, const EvaluationOptions& options);

// scan: nearest words by concept, for want of given ones; searched: as of attack_prompts().
std::vector<EvaluationPrompt> evaluation_prompts(
    const ConceptSet& set, const EvaluationOptions& options, const ResidualScan& scan,
    const std::vector<std::vector<std::string>>& searched = {});

// Pairs of pictures that a level draws.
int64_t pairs_at(EvaluationLevel level, const ConceptSet& set, EvaluationOptions options,
                 const ResidualScan& scan);

}  // namespace lacuna
