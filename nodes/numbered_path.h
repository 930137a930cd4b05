// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

#include "lacuna/files/output_file.h"

namespace lacuna {

// "<folder>/<name>". Throws Error when the name is empty, holds a NUL character, or leaves the
// folder. what: which folder it is, for people.
std::string path_within(const std::string& folder, const std::string& name,
                        const std::string& what = "output");

// Throws Error for a prefix that numbered_file() would refuse, before any work.
void check_prefix(const std::string& folder, const std::string& prefix,
                  const std::string& extension);

// The next free "<folder>/<prefix>_00001_<extension>", as ComfyUI numbers its files, with the time
// and the size of the picture filled in (file_name.h). Throws Error when the prefix is empty, too
// long for a file system, a folder, or leaves the folder.
OutputFile numbered_file(const std::string& folder, const std::string& prefix,
                         const std::string& extension, int64_t width = 0, int64_t height = 0);

}  // namespace lacuna
