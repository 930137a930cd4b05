// SPDX-License-Identifier: Apache-2.0
#include "lacuna/concepts/token_alignment.h"

#include <algorithm>
#include <numeric>

#include "lacuna/error.h"

namespace lacuna {

TokenAlignment align_tokens(std::span<const int64_t> target_ids,
                            std::span<const int64_t> anchor_ids, int64_t window) {
  const auto a = static_cast<int64_t>(target_ids.size());
  const auto b = static_cast<int64_t>(anchor_ids.size());
  if (a < 2 || b < 2 || a > window || b > window) {
    throw Error("a prompt of " + std::to_string(std::max(a, b)) + " tokens does not fit the " +
                std::to_string(window) + " tokens of the text encoder; shorten the phrase");
  }
  const int64_t shorter = std::min(a, b);
  int64_t prefix = 0;
  while (prefix < shorter && target_ids[prefix] == anchor_ids[prefix]) ++prefix;
  int64_t suffix = 0;
  while (suffix < shorter - prefix && target_ids[a - 1 - suffix] == anchor_ids[b - 1 - suffix]) {
    ++suffix;
  }

  TokenAlignment out;
  out.prefix = prefix;
  out.target.resize(prefix);
  std::iota(out.target.begin(), out.target.end(), 0);
  out.anchor = out.target;
  // After the phrase, both sides run on to the end of the window; the side with the later
  // end-of-text reaches it first.
  const int64_t pairs_after = window - std::max(a, b) + suffix;
  out.first_end_of_text = prefix + suffix - 1;
  for (int64_t k = 0; k < pairs_after; ++k) {
    out.target.push_back(a - suffix + k);
    out.anchor.push_back(b - suffix + k);
  }
  return out;
}

TokenAlignment align_phrases(TokenSpan target, TokenSpan anchor) {
  TokenAlignment out;
  const int64_t n = target.end - target.begin;
  const int64_t m = anchor.end - anchor.begin;
  for (int64_t k = 0; k < n; ++k) {
    out.target.push_back(target.begin + k);
    out.anchor.push_back(anchor.begin + std::max<int64_t>(0, k - (n - m)));
  }
  out.first_end_of_text = n;
  return out;
}

}  // namespace lacuna
