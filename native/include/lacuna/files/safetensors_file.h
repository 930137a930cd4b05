// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

namespace lacuna {

class OutputFile;

// The safetensors format: 8-byte little-endian header size, JSON header, raw data.
struct SafetensorsFile {
  std::map<std::string, at::Tensor> tensors;    // CPU, contiguous
  std::map<std::string, std::string> metadata;  // string to string
};

// Reads a whole file. Every size and offset is checked against the file before memory is reserved;
// damaged or hostile files throw Error.
SafetensorsFile load_safetensors(const std::string& path);

// Writes to a temporary name in the same folder, then renames: a failed write leaves nothing behind
// and an existing file untouched. Throws Error.
void save_safetensors(const SafetensorsFile& file, const std::string& path);
// The same without the commit, e.g. under a number that is not known yet.
void write_safetensors(const SafetensorsFile& file, OutputFile& out);

}  // namespace lacuna
