// SPDX-License-Identifier: Apache-2.0
// libFuzzer's entry; compiled once for each target.
#include <cstddef>
#include <cstdint>

#include "fuzz/targets.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  lacuna::fuzz::LACUNA_FUZZ_TARGET({reinterpret_cast<const char*>(data), size});
  return 0;
}
