// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>

namespace lacuna {

// An error for people: one sentence that says what failed, on which concept, layer or input, and
// what to do. Programmer errors are asserts, never this.
// Whatever a message quotes from a file or a text box, what() is UTF-8 without control characters
// and no longer than a screen: a host can always show it.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message);
};

}  // namespace lacuna
