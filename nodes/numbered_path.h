// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace lacuna {

// "<folder>/<name>". Throws Error when that leaves the folder. what: which folder it is, for
// people.
std::string path_within(const std::string& folder, const std::string& name,
                        const std::string& what = "output");

// The next free "<folder>/<prefix>_00001_<extension>", as ComfyUI numbers its files. Throws Error
// when the prefix leaves the folder.
std::string numbered_path(const std::string& folder, const std::string& prefix,
                          const std::string& extension);

}  // namespace lacuna
