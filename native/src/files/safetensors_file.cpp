// SPDX-License-Identifier: Apache-2.0
#include "lacuna/files/safetensors_file.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>
#include <vector>

#include "lacuna/error.h"
#include "lacuna/files/file_path.h"
#include "lacuna/files/json_text.h"
#include "lacuna/files/output_file.h"
#include "lacuna/files/text.h"

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

namespace lacuna {
namespace {

using nlohmann::json;

// What a size or a stride of a tensor can count, in bytes.
constexpr uint64_t kMaxBytes = std::numeric_limits<int64_t>::max();
constexpr uint64_t kMaxHeader = 100'000'000;  // the format's own limit
constexpr int kMaxDimensions = 8;
// A bundle of 10,000 concepts of an SD1.x model. A header is read tensor by tensor, so that the
// values of one count, or those of all metadata.
constexpr size_t kMaxTensors = 500'000;
constexpr JsonLimits kHeaderLimits{.depth = 5, .values = 100'000};

constexpr std::array<std::pair<at::ScalarType, const char*>, 10> kTypes{{
    {at::kDouble, "F64"},
    {at::kFloat, "F32"},
    {at::kHalf, "F16"},
    {at::kBFloat16, "BF16"},
    {at::kLong, "I64"},
    {at::kInt, "I32"},
    {at::kShort, "I16"},
    {at::kChar, "I8"},
    {at::kByte, "U8"},
    {at::kBool, "BOOL"},
}};

struct Entry {
  std::string name;
  at::ScalarType type = at::kFloat;
  std::vector<int64_t> shape;
  uint64_t begin = 0;
  uint64_t end = 0;
};

class Reader {
 public:
  explicit Reader(const std::string& path) : path_(path), stream_(path, std::ios::binary) {
    check_path(path);
    if (!stream_) throw Error("cannot open '" + shown_path(path) + "'");
    stream_.seekg(0, std::ios::end);
    file_size_ = static_cast<uint64_t>(stream_.tellg());
    stream_.seekg(0);
  }

  SafetensorsFile read() {
    uint64_t header_size = 0;
    if (file_size_ < 8) throw damaged("it is too short");
    read_bytes(&header_size, 8);
    if (header_size > kMaxHeader || header_size > file_size_ - 8) {
      throw damaged("its header claims " + std::to_string(header_size) + " bytes");
    }
    std::string text(header_size, '\0');
    read_bytes(text.data(), header_size);
    data_size_ = file_size_ - 8 - header_size;

    SafetensorsFile file;
    std::vector<Entry> entries = parse_header(text, file.metadata);
    // In file order: one pass over the disk, and gaps or overlaps show at once.
    // Empty tensors, which end where they begin, come before what starts there.
    std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
      return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
    });
    uint64_t position = 0;
    for (const Entry& entry : entries) {
      if (entry.begin != position) throw damaged("tensor data overlaps or leaves gaps");
      position = entry.end;
    }
    if (position != data_size_) throw damaged("its data ends early or late");
    for (const Entry& entry : entries) {
      at::Tensor tensor = at::empty(entry.shape, at::TensorOptions(entry.type));
      read_bytes(tensor.mutable_data_ptr(), entry.end - entry.begin);
      file.tensors.emplace(entry.name, std::move(tensor));
    }
    return file;
  }

 private:
  Error damaged(const std::string& why) const {
    return Error("'" + shown_path(path_) + "' is not a readable safetensors file: " + why);
  }

  void read_bytes(void* target, uint64_t size) {
    stream_.read(static_cast<char*>(target), static_cast<std::streamsize>(size));
    if (!stream_) throw damaged("it ends early");
  }

  std::vector<Entry> parse_header(const std::string& text,
                                  std::map<std::string, std::string>& metadata) const {
    std::vector<Entry> entries;
    std::set<std::string> names;
    const std::string what = std::string(damaged("").what()) + "its header";
    parse_json_members(text, what, kHeaderLimits, [&](const std::string& name, const json& value) {
      if (!names.insert(name).second) throw damaged("it names " + in_quotes(name) + " twice");
      if (names.size() > kMaxTensors) {
        throw damaged("it holds more than " + std::to_string(kMaxTensors) + " tensors");
      }
      if (name != "__metadata__") {
        entries.push_back(parse_entry(name, value));
        return;
      }
      if (!value.is_object()) throw damaged("its metadata is not an object");
      for (const auto& [key, item] : value.items()) {
        if (!item.is_string()) throw damaged("its metadata holds more than text");
        metadata.emplace(key, item.get<std::string>());
      }
    });
    return entries;
  }

  Entry parse_entry(const std::string& name, const json& value) const {
    const auto wrong = [&](const std::string& what) {
      return damaged("tensor " + in_quotes(name, 100) + " has a wrong " + what);
    };
    const auto unsigned_list = [&](const char* key) {
      std::vector<uint64_t> list;
      if (!value.is_object() || !value.contains(key) || !value[key].is_array()) throw wrong(key);
      for (const json& item : value[key]) {
        if (!item.is_number_unsigned()) throw wrong(key);
        list.push_back(item.get<uint64_t>());
      }
      return list;
    };
    Entry entry;
    entry.name = name;
    const std::vector<uint64_t> shape = unsigned_list("shape");
    const std::vector<uint64_t> offsets = unsigned_list("data_offsets");
    if (shape.size() > kMaxDimensions) throw wrong("shape");
    if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > data_size_) {
      throw wrong("data_offsets");
    }
    entry.begin = offsets[0];
    entry.end = offsets[1];
    if (!value.contains("dtype") || !value["dtype"].is_string()) throw wrong("dtype");
    const auto type_name = value["dtype"].get<std::string>();
    const auto* type = std::find_if(kTypes.begin(), kTypes.end(),
                                    [&](const auto& item) { return type_name == item.second; });
    if (type == kTypes.end()) throw wrong("dtype (" + type_name.substr(0, 20) + ")");
    entry.type = type->first;
    // Strides count a size of zero as one: they must not overflow even where nothing is stored.
    uint64_t bytes = c10::elementSize(entry.type);
    for (uint64_t size : shape) {
      if (size > kMaxBytes / bytes) throw wrong("shape");
      bytes *= std::max<uint64_t>(size, 1);
      entry.shape.push_back(static_cast<int64_t>(size));
    }
    if (std::find(shape.begin(), shape.end(), 0u) != shape.end()) bytes = 0;
    if (bytes != entry.end - entry.begin) throw wrong("size");
    return entry;
  }

  std::string path_;
  std::ifstream stream_;
  uint64_t file_size_ = 0;
  uint64_t data_size_ = 0;
};

}  // namespace

SafetensorsFile load_safetensors(const std::string& path) { return Reader(path).read(); }

void write_safetensors(const SafetensorsFile& file, OutputFile& out) {
  nlohmann::ordered_json header;
  if (!file.metadata.empty()) header["__metadata__"] = file.metadata;
  std::vector<at::Tensor> data;
  uint64_t offset = 0;
  for (const auto& [name, tensor] : file.tensors) {
    const auto* type = std::find_if(
        kTypes.begin(), kTypes.end(),
        [&tensor = tensor](const auto& item) { return item.first == tensor.scalar_type(); });
    if (type == kTypes.end())
      throw Error("tensor '" + name + "' has a type safetensors cannot hold");
    data.push_back(tensor.detach().to(at::kCPU).contiguous());
    const uint64_t size = data.back().nbytes();
    header[name] = {{"dtype", type->second},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {offset, offset + size}}};
    offset += size;
  }
  std::string text;
  try {
    text = header.is_null() ? "{}" : header.dump();
  } catch (const json::exception&) {
    throw Error("cannot write '" + shown_path(out.name()) +
                "': its metadata is not valid UTF-8 text");
  }
  text.append((8 - text.size() % 8) % 8, ' ');  // data starts aligned

  const uint64_t header_size = text.size();
  std::string prefix(8, '\0');
  std::memcpy(prefix.data(), &header_size, 8);
  out.write(prefix);
  out.write(text);
  for (const at::Tensor& tensor : data) {
    out.write({static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes()});
  }
}

void save_safetensors(const SafetensorsFile& file, const std::string& path) {
  OutputFile out(path);
  write_safetensors(file, out);
  out.commit();
}

}  // namespace lacuna
