// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "lacuna/closed_form/retain_set.h"
#include "lacuna/concepts/concept_set.h"

namespace lacuna {

// What decides how hard an edit is on a model.
struct EditSize {
  double relative = 0.0;  // its norm over that of the edited projections, strength included
  double strength = 1.0;
  size_t concepts = 0;
  size_t preserved = 0;
  RetainSetSize retain_asked = RetainSetSize::kNone;
  int64_t retained = 0;  // phrases of the retain set
  GeneralPriorSize general_prior = GeneralPriorSize::kNone;
  double regularization = 0.0;
};

// "a, b and 3 more": the first `shown` names.
std::string joined(const std::vector<std::string>& names, size_t shown);

// What the retain set kept and left out, as a line of its own; empty when none was asked for.
std::string retain_set_line(const RetainSet& set, RetainSetSize asked);

// How much the edit changes of what reads the text, and how far its solve can be trusted: a line of
// its own. relative: as in EditSize; condition, floor_added: of the solve (SpdSolver).
std::string size_line(double relative, double condition, double floor_added);

// What an edit was made on.
enum class AppliedTo { kNothing, kWeights, kNamingPrompts, kConditioning, kConditioningOfPacked };
// That, and what no file of the host's holds of it: a line of its own.
std::string applied_line(AppliedTo to);

// What a gate cannot tell apart (FittedGate::confused), a line of its own; empty for nothing.
std::string confusion_line(const std::vector<std::string>& confused);

// For the report of a node, before anybody draws: a line that says that such an edit damages
// pictures, and what to change in the node at hand; empty where the edit is of usual size.
std::string violence_warning(const EditSize& edit);

}  // namespace lacuna
