// SPDX-License-Identifier: Apache-2.0
#include "lacuna/files/output_file.h"

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <random>
#include <system_error>
#include <utility>

#include "lacuna/error.h"
#include "lacuna/files/file_path.h"

namespace lacuna {
namespace fs = std::filesystem;
namespace {

constexpr int kMostNumbers = 99'999;
constexpr std::chrono::hours kStaleAfter{1};

std::string temporary_name() {
  std::random_device random;
  char text[40];
  std::snprintf(text, sizeof text, ".lacuna-%08x%08x.tmp", random(), random());
  return text;
}

// What killed processes left beside `own`. Ages are told by the folder's clock, which on a network
// share is not ours.
void remove_stale(const fs::path& own) {
  std::error_code error;
  const auto now = fs::last_write_time(own, error);
  if (error) return;
  const fs::path folder = own.has_parent_path() ? own.parent_path() : fs::path(".");
  fs::directory_iterator entry(folder, error);
  for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
    const std::u8string name = entry->path().filename().u8string();
    if (!name.starts_with(u8".lacuna-") || !name.ends_with(u8".tmp")) continue;
    std::error_code ignored;
    const auto written = fs::last_write_time(entry->path(), ignored);
    if (!ignored && now - written > kStaleAfter) fs::remove(entry->path(), ignored);
  }
}

}  // namespace

OutputFile::OutputFile(std::string path) : OutputFile(std::move(path), "", false) {}

OutputFile OutputFile::numbered(std::string stem, std::string extension) {
  return OutputFile(std::move(stem), std::move(extension), true);
}

OutputFile::OutputFile(std::string stem, std::string extension, bool numbered)
    : stem_(std::move(stem)), extension_(std::move(extension)), numbered_(numbered) {
  check_path(name());
  const fs::path folder = fs::path(stem_).parent_path();
  std::error_code ignored;
  fs::create_directories(folder, ignored);
  temporary_ = (folder / temporary_name()).string();
  errno = 0;
  stream_.open(temporary_, std::ios::binary | std::ios::trunc);
  if (!stream_) fail(errno);
  remove_stale(temporary_);
}

OutputFile::~OutputFile() {
  if (committed_) return;
  stream_.close();
  std::error_code ignored;
  fs::remove(temporary_, ignored);
}

std::string OutputFile::name() const { return stem_ + extension_; }

std::string OutputFile::path_of(int number) const {
  char text[16];
  std::snprintf(text, sizeof text, "_%05d_", number);
  return stem_ + text + extension_;
}

void OutputFile::fail(int reason) const {
  const std::string what = "cannot write '" + shown_path(name()) + "'";
  const auto code = std::error_code(reason, std::generic_category());
  if (code == std::errc::filename_too_long) {
    throw Error(what + ": the name is too long; use a shorter one");
  }
  throw Error(what + (reason == 0 ? "" : " (" + code.message() + ")") +
              "; check that the folder exists, is writable and not full");
}

void OutputFile::write(std::string_view bytes) {
  errno = 0;
  stream_.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!stream_) fail(errno);
}

bool OutputFile::claim(const std::string& path) {
  std::error_code error;
  fs::create_hard_link(temporary_, path, error);
  if (!error) {
    fs::remove(temporary_, error);
    return true;
  }
  if (error == std::errc::file_exists) return false;
  // A file system without hard links: an empty file holds the name until the rename.
  errno = 0;
  std::FILE* const holder = std::fopen(path.c_str(), "wx");
  if (holder == nullptr) {
    if (errno == EEXIST) return false;
    fail(errno);
  }
  std::fclose(holder);
  fs::rename(temporary_, path, error);
  if (!error) return true;
  std::error_code ignored;
  fs::remove(path, ignored);
  fail(error.default_error_condition().value());
}

std::string OutputFile::commit() {
  errno = 0;
  stream_.close();
  if (!stream_) fail(errno);
  if (!numbered_) {
    std::error_code error;
    fs::rename(temporary_, name(), error);
    if (error) fail(error.default_error_condition().value());
    committed_ = true;
    return name();
  }
  for (int number = 1; number <= kMostNumbers; ++number) {
    const std::string path = path_of(number);
    std::error_code ignored;
    if (fs::exists(path, ignored) || !claim(path)) continue;
    committed_ = true;
    return path;
  }
  throw Error("there are already " + std::to_string(kMostNumbers) + " files named '" +
              shown_path(stem_) + "'; use another name");
}

}  // namespace lacuna
