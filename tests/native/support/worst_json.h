// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ctime>
#include <fstream>
#include <functional>
#include <map>
#include <string>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace lacuna::testing {

// JSON that is small to store and expensive to read carelessly, each of about `bytes`.
inline std::map<std::string, std::string> worst_json(size_t bytes) {
  const auto repeated = [&](const std::string& head, const std::string& part,
                            const std::string& tail) {
    std::string text = head;
    while (text.size() + part.size() + tail.size() < bytes) text += part;
    return text + tail;
  };
  std::string keys = "{";
  for (size_t i = 0; keys.size() + 20 < bytes; ++i) {
    keys += (i == 0 ? "\"" : ",\"") + std::to_string(i) + "\":0";
  }
  return {
      {"lists", repeated("[[]", ",[]", "]")},
      {"objects", repeated("[{}", ",{}", "]")},
      {"objects in objects", repeated("[{\"a\":{}}", ",{\"a\":{}}", "]")},
      {"objects of one parent", repeated("{\"a\":{}", ",\"a\":{}", "}")},
      {"deep lists", repeated("", "[", "")},
      {"deep objects", repeated("", "{\"a\":", "")},
      {"zeros", repeated("[0", ",0", "]")},
      {"short keys", keys + "}"},
      {"a long number", repeated("[", "1", "]")},
      {"a long fraction", repeated("[0.", "1", "]")},
      {"many long numbers", repeated("[0", ",1" + std::string(400, '2'), "]")},
      {"escapes", repeated("[\"", "\\u4e2d", "\"]")},
      {"an open text", repeated("[\"", "\\\"", "")},
      {"empty texts", repeated("[\"\"", ",\"\"", "]")},
      {"white space", repeated("[", " ", "")},
      {"lines", repeated("[", "\n", "}")},
  };
}

struct ReadingCost {
  double seconds = 0.0;    // of this process's CPU time
  double megabytes = 0.0;  // how far memory grew at its peak; 0 where it cannot be told
};

inline ReadingCost cost_of(const std::function<void()>& call) {
  const auto kilobytes = [](const char* key) {
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;) {
      if (word == key && status >> word) return std::stod(word);
    }
    return 0.0;
  };
#ifdef __GLIBC__
  malloc_trim(0);  // what was freed before must not hide what is taken now
#endif
  std::ofstream("/proc/self/clear_refs") << 5;  // the peak starts again from here
  const double before = kilobytes("VmRSS:");
  const std::clock_t begin = std::clock();
  call();
  const double seconds = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
  return {seconds, (kilobytes("VmHWM:") - before) / 1024};
}

}  // namespace lacuna::testing
