// SPDX-License-Identifier: Apache-2.0
#include "lacuna/files/file_path.h"

#include "lacuna/error.h"

namespace lacuna {
namespace {
constexpr size_t kShownHead = 80;
constexpr size_t kShownTail = 160;

bool inside_character(char c) { return (static_cast<unsigned char>(c) & 0xc0) == 0x80; }
}  // namespace

std::string shown_path(std::string_view path) {
  std::string shown;
  if (path.size() <= kShownHead + kShownTail) {
    shown = path;
  } else {
    // Cut between characters, not within one.
    size_t head = kShownHead;
    while (head > 0 && inside_character(path[head])) --head;
    size_t tail = path.size() - kShownTail;
    while (tail < path.size() && inside_character(path[tail])) ++tail;
    shown = std::string(path.substr(0, head)) + "..." + std::string(path.substr(tail));
  }
  for (char& c : shown) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return shown;
}

void check_path(std::string_view path) {
  if (path.find('\0') == std::string_view::npos) return;
  throw Error("the file name '" + shown_path(path) +
              "' holds a NUL character, which no file name can; remove it");
}

}  // namespace lacuna
