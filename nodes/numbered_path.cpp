// SPDX-License-Identifier: Apache-2.0
#include "nodes/numbered_path.h"

#include <algorithm>
#include <filesystem>

#include "lacuna/error.h"
#include "lacuna/files/file_path.h"
#include "nodes/file_name.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;

constexpr size_t kLongestName = 255;  // bytes, of a file or a folder, on every common file system
constexpr size_t kNumber = 7;         // "_00001_"

std::string stem_within(const std::string& folder, const std::string& name,
                        const std::string& extension) {
  if (name.empty()) {
    throw Error("the filename prefix is empty; write a name, such as loras/forget");
  }
  std::string stem = path_within(folder, name);
  check_file_name(name);
  const fs::path relative = fs::path(name).lexically_normal();
  if (relative == ".") {
    throw Error("the filename prefix '" + shown_path(name) +
                "' is a folder; add the name of the file, such as loras/forget");
  }
  size_t longest = relative.filename().string().size() + kNumber + extension.size();
  for (const fs::path& part : relative.parent_path()) {
    longest = std::max(longest, part.string().size());
  }
  if (longest > kLongestName) {
    throw Error("the filename prefix '" + shown_path(name) +
                "' is too long: " + std::to_string(longest) + " bytes with its number, and " +
                std::to_string(kLongestName) + " is the limit; shorten it");
  }
  return stem;
}

}  // namespace

std::string path_within(const std::string& folder, const std::string& name,
                        const std::string& what) {
  if (name.empty()) {
    throw Error("the file name is empty; write the name of a file in the " + what + " folder");
  }
  check_path(name);
  const fs::path relative = fs::path(name).lexically_normal();
  if (relative.is_absolute() || relative.has_root_name() || relative.begin()->string() == "..") {
    throw Error("'" + shown_path(name) + "' leaves the " + what + " folder; use a plain file name");
  }
  return (fs::path(folder) / relative).string();
}

void check_prefix(const std::string& folder, const std::string& prefix,
                  const std::string& extension) {
  stem_within(folder, with_time(prefix, local_time()), extension);
}

OutputFile numbered_file(const std::string& folder, const std::string& prefix,
                         const std::string& extension, int64_t width, int64_t height) {
  return OutputFile::numbered(
      stem_within(folder, with_time(prefix, local_time(), width, height), extension), extension);
}

}  // namespace lacuna
