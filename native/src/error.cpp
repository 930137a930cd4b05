// SPDX-License-Identifier: Apache-2.0
#include "lacuna/error.h"

#include "lacuna/files/text.h"

namespace lacuna {
namespace {
constexpr size_t kScreen = 1'200;  // characters
}

Error::Error(const std::string& message) : std::runtime_error(readable(message, kScreen)) {}

}  // namespace lacuna
