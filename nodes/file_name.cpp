// SPDX-License-Identifier: Apache-2.0
#include "nodes/file_name.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <string_view>

#include "lacuna/error.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

constexpr std::string_view kNotInNames = "<>:\"|?*";  // Windows

using Find = std::function<std::optional<std::string>(const std::string&)>;

std::string replace_between_percents(const std::string& text, const Find& find) {
  std::string out;
  size_t at = 0;
  while (at < text.size()) {
    const size_t begin = text.find('%', at);
    const size_t end = begin == std::string::npos ? begin : text.find('%', begin + 1);
    if (end == std::string::npos) break;
    out += text.substr(at, begin - at);
    if (const auto found = find(text.substr(begin + 1, end - begin - 1))) {
      out += *found;
      at = end + 1;
    } else {
      out += text.substr(begin, end - begin);
      at = end;  // which may begin another
    }
  }
  return at < text.size() ? out + text.substr(at) : out;
}

std::string padded(int number, size_t digits) {
  std::string text = std::to_string(number);
  return text.size() < digits ? std::string(digits - text.size(), '0') + text : text;
}

// Runs of one letter of the pattern; a longer run than a field has is two fields, as on the page.
std::string format_date(std::string_view pattern, const std::tm& now) {
  const std::map<char, int> fields{{'d', now.tm_mday},
                                   {'M', now.tm_mon + 1},
                                   {'h', now.tm_hour},
                                   {'m', now.tm_min},
                                   {'s', now.tm_sec}};
  const std::string year = padded(now.tm_year + 1900, 4);
  std::string out;
  for (size_t at = 0; at < pattern.size();) {
    const char letter = pattern[at];
    const size_t longest = letter == 'y' ? 4 : 2;
    size_t run = 1;
    while (run < longest && at + run < pattern.size() && pattern[at + run] == letter) ++run;
    if (const auto field = fields.find(letter); field != fields.end()) {
      out += padded(field->second, run);
    } else if (letter == 'y' && (run == 4 || run == 2)) {
      out += run == 4 ? year : year.substr(2);
    } else {
      out += pattern.substr(at, run);
    }
    at += run;
  }
  return out;
}

}  // namespace

std::string with_widgets(const std::string& name, const WidgetTexts& widgets) {
  return replace_between_percents(name, [&](const std::string& key) -> std::optional<std::string> {
    const auto it = widgets.find(key);
    if (it == widgets.end()) return std::nullopt;
    std::string text = it->second;
    for (char& c : text) {
      if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f || c == '/' || c == '\\' ||
          kNotInNames.find(c) != std::string_view::npos) {
        c = '_';
      }
    }
    return text;
  });
}

std::string with_time(const std::string& name, const std::tm& now, int64_t width, int64_t height) {
  const std::map<std::string, std::string> known{
      {"year", padded(now.tm_year + 1900, 4)}, {"month", padded(now.tm_mon + 1, 2)},
      {"day", padded(now.tm_mday, 2)},         {"hour", padded(now.tm_hour, 2)},
      {"minute", padded(now.tm_min, 2)},       {"second", padded(now.tm_sec, 2)},
      {"width", std::to_string(width)},        {"height", std::to_string(height)}};
  return replace_between_percents(name, [&](const std::string& key) -> std::optional<std::string> {
    if (const auto it = known.find(key); it != known.end()) return it->second;
    constexpr std::string_view kDate = "date:";
    if (!key.starts_with(kDate)) return std::nullopt;
    std::string date = format_date(std::string_view(key).substr(kDate.size()), now);
    std::replace(date.begin(), date.end(), ':', '_');
    return date;
  });
}

void check_file_name(const std::string& name, bool on_windows) {
  const auto refuse = [&](const std::string& what) {
    throw Error("the filename prefix " + in_quotes(name, 80) + " " + what);
  };
  if (normalize_phrase(name).empty()) refuse("is blank; write a name, such as loras/forget");
  for (const char c : name) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      refuse("holds a line break or another control character; remove it");
    }
    if (on_windows && kNotInNames.find(c) != std::string_view::npos) {
      refuse(std::string("holds '") + c + "', which Windows allows in no file name; remove it");
    }
  }
  for (size_t at = 0; on_windows && at < name.size();) {
    const size_t end = std::min(name.size(), name.find_first_of("/\\", at));
    const std::string_view part = std::string_view(name).substr(at, end - at);
    at = end + 1;
    if (part.empty() || part == "." || part == "..") continue;
    // Behind the last part comes a number: a text with a full stop may be filled in there.
    if (end < name.size() && (part.ends_with('.') || part.ends_with(' '))) {
      refuse("has a folder that ends with a dot or a space, which Windows drops; remove it");
    }
    std::string device = fold_case(part.substr(0, part.find('.')));
    device.erase(device.find_last_not_of(' ') + 1);
    const bool port = device.size() == 4 &&
                      (device.starts_with("com") || device.starts_with("lpt")) &&
                      device[3] >= '0' && device[3] <= '9';
    if (port || device == "con" || device == "prn" || device == "aux" || device == "nul") {
      refuse("holds " + in_quotes(part) +
             ", which Windows keeps for a device; choose another name");
    }
  }
}

std::tm local_time() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
#ifdef _WIN32
  localtime_s(&parts, &now);
#else
  localtime_r(&now, &parts);
#endif
  return parts;
}

}  // namespace lacuna
