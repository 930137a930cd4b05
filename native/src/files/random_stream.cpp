// SPDX-License-Identifier: Apache-2.0
#include "lacuna/files/random_stream.h"

#include <ATen/CPUGeneratorImpl.h>

namespace lacuna {
namespace {
// The finalizer of SplitMix64: neighbouring inputs give unrelated outputs.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
}  // namespace

uint64_t stable_hash(std::string_view bytes) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char byte : bytes) {
    hash ^= static_cast<unsigned char>(byte);
    hash *= 0x100000001b3u;
  }
  return hash;
}

at::Generator random_stream(int64_t seed, std::string_view subject, std::string_view purpose) {
  const uint64_t state =
      mix(mix(mix(static_cast<uint64_t>(seed)) ^ stable_hash(subject)) ^ stable_hash(purpose));
  return at::detail::createCPUGenerator(state);
}

}  // namespace lacuna
