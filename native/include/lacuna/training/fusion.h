// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/closed_form/erasure_patch.h"
#include "lacuna/closed_form/refinement.h"
#include "lacuna/host.h"
#include "lacuna/training/concept_lora.h"

namespace lacuna {

// Closed-form fusion of many concept LoRAs without interference (MACE Eq. 7), with one Cholesky
// factorisation for all layers:
//   H = sum B_i + S + lambda I,  S = preserve_weight preserve + prior_weight prior
//   W* = W N + sum_i s_i up_i r_i^T,  r_i = H^-1 B_i down_i^T,  s_i: strength of concept i
// kIndependent: N = I + sum_i s_i (C_i - A_i) H^-1, the least-squares solution for the targets that
//   the LoRAs were trained on, W g + up_i down_i f for every position f of concept i's prompts, g
//   being what it reads as (f itself where nothing is refined). They do not depend on what else is
//   fused: concepts can be added and removed, in any order, without training again.
// kJoint: N = I + (M - I) (B + lambda I) H^-1 with one refinement M of all concepts, as in the
//   paper: M = I + sum_i s_i (C_i - A_i) (sum A_i + S + lambda I)^-1.
// Both are linear in the strengths. A concept of strength 0 is protected (its prompts still count);
// one that is left out is not.
enum class FusionMode { kIndependent, kJoint };

std::string_view to_string(FusionMode mode);
FusionMode fusion_mode_from_string(std::string_view text);  // throws Error

struct FusionOptions {
  FusionMode mode = FusionMode::kIndependent;
  // As in RefinementOptions; concepts, phrases and captions count alike in both closed forms.
  double regularization = 10.0;
  double preserve_weight = 1.0;
  double prior_weight = 10.0;
};

// Throws Error for options out of range.
void check(const FusionOptions& options);

// By target; concepts that are not named have strength 1.
using ConceptStrengths = std::map<std::string, double>;

struct Fusion {
  ErasurePatch patch;  // delta and r in float64, strengths included
  double condition = 1.0;
  double floor_added = 0.0;
};

// The concepts of a fusion and what their solve shares. Concepts are summed in the order of their
// names, so that the order in which they came makes no difference, not even in rounding; after a
// change the stored matrices are summed again, so that nothing drifts. Not thread-safe.
class FusionSums {
 public:
  // Throws Error: a concept that fails check(), another width, another LoRA for a target that is
  // already here. The identical concept a second time changes nothing.
  void add(std::shared_ptr<const ConceptLora> item);
  void remove(const std::string& target);  // throws Error naming the known targets
  // Exactly these concepts afterwards; work done for those that stay is kept.
  void assign(const std::vector<std::shared_ptr<const ConceptLora>>& items);

  size_t size() const { return entries_.size(); }
  std::vector<std::string> targets() const;  // in summation order

  // Throws Error: no concept, an unknown name in `strengths`, refinement statistics of some
  // concepts only (kJoint), a system that is not positive definite, a concept whose change no
  // weight could hold. Calls progress.check() at least once per concept.
  Fusion solve(const KeptText& kept, const FusionOptions& options,
               const ConceptStrengths& strengths, Progress& progress);

 private:
  struct Entry {
    std::shared_ptr<const ConceptLora> item;
    at::Tensor images;  // B [down_1^T ... down_L^T], [d, sum of ranks] float64; made by solve()
  };
  std::map<std::string, Entry> entries_;  // by folded target
  at::Tensor prompt_gram_;                // sum of B; undefined after a change
};

}  // namespace lacuna
