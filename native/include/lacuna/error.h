// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>

namespace lacuna {

// An error for people: one sentence that says what failed, on which concept, layer or input, and
// what to do. Programmer errors are asserts, never this.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace lacuna
