// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "lacuna/concepts/token_alignment.h"

namespace lacuna {

// Which positions of a prompt carry the edit.
enum class ReadAt { kAll, kSubject, kEndOfText };

std::string_view to_string(ReadAt read_at);
ReadAt read_at_from_string(std::string_view text);

// A target prompt and its anchor twin, as token ids with start and end token.
struct PromptPair {
  std::vector<int64_t> target_ids;
  std::vector<int64_t> anchor_ids;
  TokenSpan target_phrase;
  TokenSpan anchor_phrase;
  int64_t window = 77;
};

// A closed-form edit: it chooses which embedding positions move to which. The least-squares problem
// built from those pairs is the same for all methods (refinement.h). Stateless.
class EditMethod {
 public:
  virtual ~EditMethod() = default;
  virtual std::string_view name() const = 0;
  // Throws Error when the method has no such rows.
  virtual void check(ReadAt read_at) const = 0;
  virtual TokenAlignment rows(const PromptPair& pair, ReadAt read_at) const = 0;
};

// Known methods, in the order the node shows them.
std::vector<std::string> edit_method_names();
// Throws Error naming the known methods.
const EditMethod& edit_method(std::string_view name);

}  // namespace lacuna
