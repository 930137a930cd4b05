// SPDX-License-Identifier: Apache-2.0
#include "nodes/edit_report.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "lacuna/text.h"

namespace lacuna {
namespace {

constexpr double kViolentEdit = 1.5;

// What the demo model needs for each concept (assets/demo_model/README.md).
constexpr double kRegularizationPerConcept = 1.0;
constexpr double kLeastRegularization = 10.0;  // the nodes' default

}  // namespace

std::string violence_warning(const EditSize& edit) {
  // Also true where the size is no number.
  if (edit.relative <= kViolentEdit) return "";
  std::vector<std::string> advice;
  const double enough = std::max(kLeastRegularization,
                                 kRegularizationPerConcept * static_cast<double>(edit.concepts));
  advice.push_back(edit.regularization < enough
                       ? format_numbers("raise 'regularization' to %.4g or more", enough)
                       : "raise 'regularization' further");
  if (edit.strength > 1.0) advice.emplace_back("lower 'strength' to 1");
  if (edit.general_prior == GeneralPriorSize::kNone) {
    advice.emplace_back("choose a 'general prior' in Concept Set");
  }
  if (edit.preserved == 0) advice.emplace_back("list what must stay under 'preserve'");
  if (edit.concepts > 10) advice.emplace_back("erase fewer concepts at once");
  std::string text = format_numbers(
      "\nWarning: an edit of this size damages pictures, also those of other things (above %.0f %% "
      "of the projections' norm they fall apart): ",
      100 * kViolentEdit);
  for (size_t i = 0; i < advice.size(); ++i) {
    text += (i == 0 ? "" : i + 1 == advice.size() ? ", or " : ", ") + advice[i];
  }
  return text + ".";
}

}  // namespace lacuna
