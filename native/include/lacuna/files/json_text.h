// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace lacuna {

// JSON that strangers wrote: read in linear time, with bounded depth and memory, and refused in a
// sentence. Of several members of one name the last one counts, as in Python and JavaScript, unless
// they must be `unique`.
struct JsonLimits {
  size_t depth;         // lists and objects inside each other; [] is 1 deep
  size_t values;        // of any kind, lists and objects included; one takes up to about 150 bytes
  bool unique = false;  // two members of one name in one object are an Error
};

// `what` begins the sentence of every Error, e.g. "the workflow": not UTF-8, not JSON (with line
// and column), nested too deeply, too many values.
nlohmann::json parse_json(std::string_view text, const std::string& what, const JsonLimits& limits);

// Keeps members in their order. An object may have 1,000 members here: finding one is a search.
nlohmann::ordered_json parse_ordered_json(std::string_view text, const std::string& what,
                                          const JsonLimits& limits);

// Hands over the members of one large object one by one, in the order of the text, so that no more
// than one is in memory; names may repeat. Depth counts from the object itself, values within each
// member. Other text than one object is an Error.
void parse_json_members(
    std::string_view text, const std::string& what, const JsonLimits& limits,
    const std::function<void(const std::string& name, const nlohmann::json& value)>& on_member);

}  // namespace lacuna
