// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <ctime>
#include <map>
#include <string>

namespace lacuna {

// What ComfyUI's savers replace in the name of a file, so that a name means the same in ours, with
// and without its page. What is not known stays as it was written.

// Widget values by "Node.widget", where Node is what the page calls a node in names of files: its
// type, or else its title.
using WidgetTexts = std::map<std::string, std::string>;

// %Node.widget%, with characters that no file name may hold replaced by '_'.
std::string with_widgets(const std::string& name, const WidgetTexts& widgets);

// %year% %month% %day% %hour% %minute% %second% %width% %height%, and %date:yyyy-MM-dd hh:mm:ss%
// with any of d dd M MM h hh m mm s ss yy yyyy between; ':' becomes '_'. width, height: of the
// picture; 0: none.
std::string with_time(const std::string& name, const std::tm& now, int64_t width = 0,
                      int64_t height = 0);

#ifdef _WIN32
inline constexpr bool kOnWindows = true;
#else
inline constexpr bool kOnWindows = false;
#endif

// Throws Error that names the filename prefix: blank, control characters, and on Windows what it
// refuses (<>:"|?*, a dot or a space behind a folder, CON and the other devices).
void check_file_name(const std::string& name, bool on_windows = kOnWindows);

std::tm local_time();

}  // namespace lacuna
