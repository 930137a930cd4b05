// SPDX-License-Identifier: Apache-2.0
#include "fuzz/targets.h"

#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "lacuna/error.h"
#include "lacuna/files/text.h"
#include "support/random_data.h"

namespace lacuna::fuzz {

bool ends_well(const std::function<void()>& read) {
  try {
    read();
    return true;
  } catch (const Error& e) {
    const std::string_view message = e.what();
    if (message.empty() || !is_utf8(message) || count_characters(message) > 1'300) {
      throw std::logic_error("a message that cannot be shown");
    }
    return false;
  }
}

InputFile::InputFile(std::string_view input) {
  static const testing::TemporaryFolder folder;
  path_ = folder.path("input.safetensors");
  std::ofstream(path_, std::ios::binary) << input;
}

InputFile::~InputFile() {
  std::error_code ignored;
  std::filesystem::remove(path_, ignored);
}

}  // namespace lacuna::fuzz
