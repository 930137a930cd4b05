// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>
#include <string_view>

// What strangers can give us, one function for each reader. Any input must end in a value or in a
// lacuna::Error whose sentence can be shown; anything else is a fault, and leaves the function as
// an exception. libFuzzer calls them (`make fuzz`), and the tests replay the seeds.
namespace lacuna::fuzz {

void concepts(std::string_view input);
void preserve(std::string_view input);
void prompts(std::string_view input);
void safetensors(std::string_view input);
void bundle(std::string_view input);  // a safetensors file; its checksum is repaired first
void workflow(std::string_view input);
void widgets(std::string_view input);  // the node's number, then its widgets, '\0' between them

// Runs a reader and judges how it ends; true: with a value.
bool ends_well(const std::function<void()>& read);

// The input as a file, which lives as long as this.
class InputFile {
 public:
  explicit InputFile(std::string_view input);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace lacuna::fuzz
