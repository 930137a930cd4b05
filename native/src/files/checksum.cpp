// SPDX-License-Identifier: Apache-2.0
#include "lacuna/files/checksum.h"

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <vector>

namespace lacuna {
namespace {

// FNV-1a on words of eight bytes: each step is a bijection of the state, so that no single changed
// word goes unnoticed.
class Checksum {
 public:
  void add(const void* data, size_t size) {
    const auto* bytes = static_cast<const char*>(data);
    add_word(size);
    for (; size >= 8; bytes += 8, size -= 8) {
      uint64_t word = 0;
      std::memcpy(&word, bytes, 8);
      add_word(word);
    }
    uint64_t word = 0;
    if (size > 0) std::memcpy(&word, bytes, size);  // an empty tensor has no address
    add_word(word);
  }
  void add(std::string_view text) { add(text.data(), text.size()); }
  std::string text() const {
    char hex[17];
    std::snprintf(hex, sizeof hex, "%016llx", static_cast<unsigned long long>(state_));
    return hex;
  }

 private:
  void add_word(uint64_t word) {
    state_ = (state_ ^ word) * 0x100000001b3ull;
    state_ ^= state_ >> 32;
  }
  uint64_t state_ = 0xcbf29ce484222325ull;
};

}  // namespace

std::string checksum_of(const SafetensorsFile& file) {
  Checksum sum;
  for (const auto& [key, value] : file.metadata) {
    if (key == "checksum") continue;
    sum.add(key);
    sum.add(value);
  }
  for (const auto& [name, tensor] : file.tensors) {
    sum.add(name);
    const std::vector<int64_t> shape = tensor.sizes().vec();
    sum.add(shape.data(), shape.size() * sizeof(int64_t));
    sum.add(tensor.const_data_ptr(), tensor.nbytes());
  }
  return sum.text();
}

}  // namespace lacuna
