// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

namespace lacuna {

// A path for messages: on one line, and shortened in the middle when it is long.
std::string shown_path(std::string_view path);

// Throws Error for a path that holds a NUL character: the system would end the name there and open
// another file than the one that was named.
void check_path(std::string_view path);

}  // namespace lacuna
