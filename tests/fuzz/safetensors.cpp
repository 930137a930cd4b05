// SPDX-License-Identifier: Apache-2.0
#include "lacuna/files/safetensors_file.h"

#include "fuzz/targets.h"

namespace lacuna::fuzz {

void safetensors(std::string_view input) {
  const InputFile file(input);
  ends_well([&] { load_safetensors(file.path()); });
}

}  // namespace lacuna::fuzz
