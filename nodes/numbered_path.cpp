// SPDX-License-Identifier: Apache-2.0
#include "nodes/numbered_path.h"

#include <cstdio>
#include <filesystem>

#include "lacuna/error.h"

namespace lacuna {

namespace fs = std::filesystem;

std::string path_within(const std::string& folder, const std::string& name,
                        const std::string& what) {
  const fs::path relative = fs::path(name).lexically_normal();
  if (name.empty() || relative.is_absolute() || relative.has_root_name() ||
      relative.begin()->string() == "..") {
    throw Error("'" + name + "' leaves the " + what + " folder; use a plain file name");
  }
  return (fs::path(folder) / relative).string();
}

std::string numbered_path(const std::string& folder, const std::string& prefix,
                          const std::string& extension) {
  const std::string stem = path_within(folder, prefix);
  for (int counter = 1; counter < 100'000; ++counter) {
    char suffix[16];
    std::snprintf(suffix, sizeof suffix, "_%05d_", counter);
    const fs::path path = stem + suffix + extension;
    std::error_code ignored;
    if (!fs::exists(path, ignored)) return path.string();
  }
  throw Error("the output folder already holds 99999 files named '" + prefix + "'");
}

}  // namespace lacuna
