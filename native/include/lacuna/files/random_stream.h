// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Generator.h>

#include <cstdint>
#include <string_view>

namespace lacuna {

// Random numbers that depend on what they are for, and on nothing else: not on the order of work,
// not on the machine, not on anybody's global generator.

// FNV-1a, 64 bits: the same on every platform and in every version.
uint64_t stable_hash(std::string_view bytes);

// A CPU generator for one purpose ("images", "training", ...) of one subject (a concept's text).
at::Generator random_stream(int64_t seed, std::string_view subject, std::string_view purpose);

}  // namespace lacuna
