// SPDX-License-Identifier: Apache-2.0
#include "fuzz/targets.h"
#include "lacuna/concepts/prompt_file.h"

namespace lacuna::fuzz {

void prompts(std::string_view input) {
  for (const PromptFileFormat format : {PromptFileFormat::kLines, PromptFileFormat::kCsv}) {
    ends_well([&] { parse_prompts(input, format, "prompts"); });
  }
}

}  // namespace lacuna::fuzz
