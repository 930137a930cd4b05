// SPDX-License-Identifier: Apache-2.0
#include "nodes/edit_report.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "lacuna/closed_form/spd_solver.h"
#include "lacuna/concepts/prompt_templates.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

// Measured on the demo model with uce, pictures of other things that are still right (neighbours
// and unrelated captions, of 8 or 12 each, or 20), drawn as in tools/demo_model/protocol.json:
//   a general prior (small):   128 %: 8, 8 of 8     268 %: 1, 7 of 8
//   neither prior nor list:     27 %: 8, 8 of 8      48 % (ten concepts): 0, 1 of 8    80, 133 %:
//   none 17 to 67 listed phrases, regularization 0 to 1: listed things stay whatever the size; of
//     neighbours 721 % leaves 17 of 20 (one concept), 652 % 4 of 12 (ten), 1507 % none (a hundred)
//   a retain set (small), of 40 neighbours and 20 unrelated: 231 % (one concept): 40, 20
//     344 % (five flags): 39, 20    632 % (ten concepts): 40, 20
constexpr double kBearable = 1.5;
constexpr double kBearableRetained = 6.5;
constexpr double kBearableUnheld = 0.35;  // where nothing holds the rest of the model in place

// What the demo model needs for each concept (assets/demo_model/README.md).
constexpr double kRegularizationPerConcept = 1.0;
constexpr double kLeastRegularization = 10.0;  // the nodes' default

}  // namespace

std::string joined(const std::vector<std::string>& names, size_t shown) {
  std::string text;
  for (size_t i = 0; i < names.size() && i < shown; ++i) text += (i == 0 ? "" : ", ") + names[i];
  if (names.size() > shown) text += " and " + std::to_string(names.size() - shown) + " more";
  return text;
}

std::string retain_set_line(const RetainSet& set, RetainSetSize asked) {
  if (asked == RetainSetSize::kNone) return {};
  if (set.frames.empty()) {
    return "\nRetain set: none, because it would keep the style alive; erase other concepts in a "
           "node of their own to have it for them.";
  }
  std::string text = "\nRetain set: " + std::to_string(set.words) + " phrases of the form";
  for (size_t i = 0; i < set.frames.size(); ++i) {
    text += (i == 0 ? " \"" : ", \"") + fill_template(set.frames[i], "...") + "\"";
  }
  text += " from the text encoder's vocabulary.";
  if (!set.left_out.empty()) {
    text += " Not kept, because it takes them for a concept: " + joined(set.left_out, 12) + ".";
  }
  return text;
}

std::string size_line(double relative, double condition, double floor_added) {
  std::string text = format_numbers(
      "\nSize of the edit: %.3g %% of the weights that read text. Solved in float64, condition "
      "number %.2g: ",
      100 * relative, condition);
  if (floor_added > 0.0) {
    return text + format_numbers("some texts were the same to the encoder (floor %.2g added).",
                                 floor_added);
  }
  return text + format_numbers("below %.0e it is exact.", 1.0 / kNoiseFloor);
}

std::string applied_line(AppliedTo to) {
  // No saver of the host sees an edit of the conditioning, and a merge follows its first MODEL.
  const std::string unsaved =
      ": it acts in pictures drawn with this MODEL and is no part of its weights, so that Save "
      "Checkpoint writes the model with the concepts still in it, and a merge has all of the edit "
      "where this MODEL comes first, else nothing of it. To pass the edit on, save the LoRA, which "
      "holds it";
  switch (to) {
    case AppliedTo::kNothing:
      return "\nStrength 0: the model is unchanged.";
    case AppliedTo::kWeights:
      return "\nApplied to the weights.";
    case AppliedTo::kNamingPrompts:
      return "\nActs on prompts that name a concept; every other prompt is drawn by the model as "
             "it was" +
             unsaved + " and acts on every prompt, or set 'where' to every prompt.";
    case AppliedTo::kConditioning:
      return "\nApplied to the conditioning, as 'apply as' says" + unsaved +
             ", or set 'apply as' to weights.";
    case AppliedTo::kConditioningOfPacked:
      break;
  }
  return "\nApplied to the conditioning, because this model's weights are packed" + unsaved + ".";
}

std::string confusion_line(const std::vector<std::string>& confused) {
  if (confused.empty()) return {};
  return "\nCannot tell " + joined(confused, 8) +
         ": a prompt that names the second is edited, too; choose another wording of the first.";
}

std::string violence_warning(const EditSize& edit) {
  const bool unheld = edit.general_prior == GeneralPriorSize::kNone && edit.preserved == 0;
  const double bearable = edit.retained > 0 ? kBearableRetained
                          : unheld          ? kBearableUnheld
                                            : kBearable;
  if (edit.relative <= bearable) return "";
  std::vector<std::string> advice;
  const double enough = std::max(kLeastRegularization,
                                 kRegularizationPerConcept * static_cast<double>(edit.concepts));
  advice.push_back(edit.regularization < enough
                       ? format_numbers("raise 'regularization' to %.4g or more", enough)
                       : "raise 'regularization' further");
  if (edit.retain_asked == RetainSetSize::kNone) advice.emplace_back("set 'retain set' to small");
  if (edit.strength > 1.0) advice.emplace_back("lower 'strength' to 1");
  if (edit.general_prior == GeneralPriorSize::kNone) {
    advice.emplace_back("choose a 'general prior' in Concept Set");
  }
  if (edit.preserved == 0) advice.emplace_back("list what must stay under 'preserve'");
  if (edit.concepts > 10) advice.emplace_back("erase fewer concepts at once");
  std::string text = format_numbers(
      "\nWarning: an edit of %.0f %% damages pictures, above all of what is not listed anywhere; "
      "below %.0f %% they come out well: ",
      100 * edit.relative, 100 * bearable);
  for (size_t i = 0; i < advice.size(); ++i) {
    text += (i == 0 ? "" : i + 1 == advice.size() ? ", or " : ", ") + advice[i];
  }
  return text + ".";
}

}  // namespace lacuna
