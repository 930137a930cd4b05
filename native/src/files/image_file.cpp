// SPDX-License-Identifier: Apache-2.0
#include "lacuna/files/image_file.h"

#define STBI_WRITE_NO_STDIO
#include <stb_image_write.h>

#include <cstdint>
#include <string_view>

#include "lacuna/error.h"
#include "lacuna/files/file_path.h"
#include "lacuna/files/output_file.h"

namespace lacuna {
namespace {

constexpr size_t kAfterHeader = 8 + 25;  // PNG signature and IHDR chunk: tEXt may follow

void append_big_endian(std::string& out, uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) out += static_cast<char>((value >> shift) & 0xff);
}

// CRC-32 of the PNG specification; stb keeps its own private.
uint32_t crc32(std::string_view bytes) {
  uint32_t crc = 0xffffffffu;
  for (unsigned char byte : bytes) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0xedb88320u : 0u);
  }
  return ~crc;
}

// JSON escapes keep the text ASCII, which tEXt (Latin-1) needs.
std::string text_chunk(const std::string& keyword, const std::string& text) {
  const std::string body = "tEXt" + keyword + '\0' + text;
  std::string chunk;
  append_big_endian(chunk, static_cast<uint32_t>(body.size() - 4));
  chunk += body;
  append_big_endian(chunk, crc32(body));
  return chunk;
}

}  // namespace

void write_png(const at::Tensor& image, OutputFile& out,
               const std::map<std::string, std::string>& text) {
  if (image.dim() != 3 || image.size(2) != 3 || image.numel() == 0) {
    throw Error("cannot write '" + shown_path(out.name()) +
                "': an image must be [height, width, 3]");
  }
  const at::Tensor pixels = image.detach()
                                .to(at::kCPU, at::kFloat)
                                .clamp(0, 1)
                                .mul(255)
                                .round()
                                .to(at::kByte)
                                .contiguous();
  std::string png;
  const auto append = [](void* context, void* data, int size) {
    static_cast<std::string*>(context)->append(static_cast<const char*>(data), size);
  };
  const int width = static_cast<int>(image.size(1));
  const int height = static_cast<int>(image.size(0));
  if (stbi_write_png_to_func(append, &png, width, height, 3, pixels.const_data_ptr<uint8_t>(),
                             width * 3) == 0) {
    throw Error("cannot encode '" + shown_path(out.name()) + "' as PNG");
  }
  std::string chunks;
  for (const auto& [keyword, value] : text) chunks += text_chunk(keyword, value);
  png.insert(kAfterHeader, chunks);

  out.write(png);
}

void save_png(const at::Tensor& image, const std::string& path,
              const std::map<std::string, std::string>& text) {
  OutputFile out(path);
  write_png(image, out, text);
  out.commit();
}

}  // namespace lacuna
