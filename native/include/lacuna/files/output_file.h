// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fstream>
#include <string>
#include <string_view>

namespace lacuna {

// A file that appears complete or not at all: written under a temporary name in the target's folder
// (created when missing) and renamed by commit(). Destroyed without commit, it leaves nothing; what
// a killed process leaves (".lacuna-*.tmp") is removed by the next OutputFile in that folder, once
// nobody has written to it for an hour.
class OutputFile {
 public:
  // Replaces what is at `path`. Throws Error when the folder cannot be written.
  explicit OutputFile(std::string path);
  // Takes the first free "<stem>_00001_<extension>", even when several processes ask at once.
  static OutputFile numbered(std::string stem, std::string extension);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  // For messages: the path, without its number when that is not known yet.
  std::string name() const;
  void write(std::string_view bytes);  // throws Error, e.g. when the disk is full
  std::string commit();                // the path; throws Error

 private:
  OutputFile(std::string stem, std::string extension, bool numbered);
  [[noreturn]] void fail(int reason) const;  // errno, 0 when not known
  std::string path_of(int number) const;
  // False when somebody else has that name.
  bool claim(const std::string& path);

  std::string stem_;
  std::string extension_;
  bool numbered_;
  std::string temporary_;
  std::ofstream stream_;
  bool committed_ = false;
};

}  // namespace lacuna
