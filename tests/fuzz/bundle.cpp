// SPDX-License-Identifier: Apache-2.0
#include "fuzz/targets.h"
#include "lacuna/files/checksum.h"
#include "lacuna/files/safetensors_file.h"
#include "lacuna/training/lora_bundle.h"

namespace lacuna::fuzz {

void bundle(std::string_view input) {
  const InputFile file(input);
  ends_well([&] { load_bundle(file.path()); });
  ends_well([&] {
    SafetensorsFile content = load_safetensors(file.path());
    content.metadata["checksum"] = checksum_of(content);
    save_safetensors(content, file.path());
    load_bundle(file.path());
  });
}

}  // namespace lacuna::fuzz
