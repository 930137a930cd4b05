// SPDX-License-Identifier: Apache-2.0
#include "lacuna/files/option_range.h"

#include <cstdio>

#include "lacuna/error.h"

namespace lacuna {

void check_range(double value, double low, double high, const char* name) {
  if (value >= low && value <= high) return;
  char text[160];
  std::snprintf(text, sizeof text, "'%s' must be between %g and %g", name, low, high);
  throw Error(text);
}

}  // namespace lacuna
