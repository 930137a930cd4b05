// SPDX-License-Identifier: Apache-2.0
#include "lacuna/output_file.h"

#include <filesystem>
#include <random>
#include <system_error>
#include <utility>

#include "lacuna/error.h"

namespace lacuna {
namespace fs = std::filesystem;

OutputFile::OutputFile(std::string path) : path_(std::move(path)) {
  std::error_code ignored;
  fs::create_directories(fs::path(path_).parent_path(), ignored);
  temporary_ = path_ + "." + std::to_string(std::random_device{}()) + ".tmp";
  stream_.open(temporary_, std::ios::binary | std::ios::trunc);
  if (!stream_) fail();
}

OutputFile::~OutputFile() {
  if (committed_) return;
  stream_.close();
  std::error_code ignored;
  fs::remove(temporary_, ignored);
}

void OutputFile::fail() {
  throw Error("cannot write '" + path_ +
              "'; check that the folder exists, is writable and not full");
}

void OutputFile::write(std::string_view bytes) {
  stream_.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!stream_) fail();
}

void OutputFile::commit() {
  stream_.close();
  if (!stream_) fail();
  std::error_code error;
  fs::rename(temporary_, path_, error);
  if (error) fail();
  committed_ = true;
}

}  // namespace lacuna
