// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fstream>
#include <string>
#include <string_view>

namespace lacuna {

// A file that appears complete or not at all: written under a temporary name in the target's folder
// (created when missing) and renamed by commit(). Destroyed without commit, it leaves nothing.
class OutputFile {
 public:
  explicit OutputFile(std::string path);  // throws Error when the folder cannot be written
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(std::string_view bytes);  // throws Error, e.g. when the disk is full
  void commit();                       // throws Error

 private:
  [[noreturn]] void fail();
  std::string path_;
  std::string temporary_;
  std::ofstream stream_;
  bool committed_ = false;
};

}  // namespace lacuna
