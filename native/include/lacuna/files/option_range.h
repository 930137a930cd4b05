// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace lacuna {

// Throws Error with the option's name and both bounds when value is outside of them, or NaN.
void check_range(double value, double low, double high, const char* name);

}  // namespace lacuna
