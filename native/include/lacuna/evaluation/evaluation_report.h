// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "lacuna/evaluation/evaluation_summary.h"

namespace lacuna {

// An evaluation as files.

// `lacuna.evaluation/1`: verdict, scores, counts, lists, preflight, gate (null: none), every pair,
// and the protocol that someone else needs to repeat it.
std::string to_json(const Evaluation& evaluation, const EvaluationSummary& summary);

// One page of HTML with no links to anything outside: the verdict, the pictures, tables, plots with
// intervals and the protocol. json: what to_json wrote; pages: PNG files' bytes. Throws Error when
// the JSON is of another format.
std::string to_html(std::string_view json, const std::vector<std::string>& pages);

}  // namespace lacuna
