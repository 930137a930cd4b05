// SPDX-License-Identifier: Apache-2.0
// safetensors and pictures: round trips, damaged and hostile files, failed writes.
#include <sys/resource.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>

#include "lacuna/error.h"
#include "lacuna/image_file.h"
#include "lacuna/output_file.h"
#include "lacuna/safetensors_file.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;

class FileTest : public testing::DeviceTest {
 protected:
  std::string bytes_of(const std::string& path) const {
    std::ifstream stream(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
  }
  void write(const std::string& path, const std::string& bytes) const {
    std::ofstream(path, std::ios::binary) << bytes;
  }
  std::string safetensors(const std::string& header, const std::string& data = "",
                          int64_t claimed = -1) const {
    const uint64_t size = claimed < 0 ? header.size() : static_cast<uint64_t>(claimed);
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &size, 8);
    return bytes + header + data;
  }
  size_t files_in_folder() const {
    size_t n = 0;
    for ([[maybe_unused]] const auto& entry : fs::recursive_directory_iterator(folder_.path("")))
      ++n;
    return n;
  }
  testing::TemporaryFolder folder_;
};
INSTANTIATE_TEST_SUITE_P(Devices, FileTest, ::testing::ValuesIn(testing::devices()));

TEST_P(FileTest, SafetensorsRoundTripEveryType) {
  SafetensorsFile file;
  for (const auto type : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt,
                          at::kShort, at::kChar, at::kByte, at::kBool}) {
    file.tensors[std::string("t.") + c10::toString(type)] =
        at::randint(0, 2, {3, 4}, at::kLong).to(device(), type);
  }
  file.tensors["scalar"] = at::scalar_tensor(2.5, at::kHalf);
  file.tensors["empty"] = at::zeros({0, 4});
  file.tensors["strided"] = at::arange(12.0).view({3, 4}).t();
  file.metadata = {{"format", "x"}, {"note", "caf\xC3\xA9 \"q\""}};
  const std::string path = folder_.path("a/b.safetensors");
  save_safetensors(file, path);
  const SafetensorsFile loaded = load_safetensors(path);
  EXPECT_EQ(loaded.metadata, file.metadata);
  ASSERT_EQ(loaded.tensors.size(), file.tensors.size());
  for (const auto& [name, tensor] : file.tensors) {
    EXPECT_EQ(loaded.tensors.at(name).scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(loaded.tensors.at(name), tensor.cpu())) << name;
  }
  EXPECT_EQ(files_in_folder(), 2u);  // folder and file: no temporary left
}

TEST_P(FileTest, HostileSafetensorsAreErrors) {
  const std::string path = folder_.path("bad.safetensors");
  const auto entry = [](const std::string& dtype, const std::string& shape,
                        const std::string& offsets) {
    return R"({"t":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
           offsets + "}}";
  };
  const std::string four(4, '\1');
  const std::vector<std::string> bad{
      "",
      "1234567",
      safetensors("{}", "", 10'000'000'000),  // 10 GB header
      safetensors("{}", "", int64_t{1} << 62),
      safetensors("{}", "x"),  // data nobody owns
      safetensors("not json"),
      safetensors("[]"),
      safetensors(std::string(1000, '[')),
      safetensors(R"({"__metadata__": 3})"),
      safetensors(R"({"__metadata__": {"a": 3}})"),
      safetensors(R"({"t": 3})"),
      safetensors(R"({"t": {}})"),
      safetensors(entry("F32", "[1]", "[0,4]")),  // truncated data
      safetensors(entry("F32", "[1]", "[4,0]"), four),
      safetensors(entry("F32", "[1]", "[0,400000000000]"), four),
      safetensors(entry("F32", "[2]", "[0,4]"), four),  // size and shape disagree
      safetensors(entry("F32", "[-1]", "[0,4]"), four),
      safetensors(entry("F32", "[1.5]", "[0,4]"), four),
      safetensors(entry("F32", "[4611686018427387904,4]", "[0,4]"), four),  // overflows
      safetensors(entry("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), four),
      safetensors(entry("F99", "[1]", "[0,4]"), four),
      safetensors(R"({"t":{"shape":[1],"data_offsets":[0,4]}})", four),
      safetensors(entry("F32", "[1]", "[0]"), four),
      safetensors(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                  R"("b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                  four),  // overlap
      safetensors(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                  R"("b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
                  "abc"),  // gap
  };
  for (size_t i = 0; i < bad.size(); ++i) {
    write(path, bad[i]);
    EXPECT_THROW(load_safetensors(path), Error) << "case " << i;
  }
  EXPECT_THROW(load_safetensors(folder_.path("absent")), Error);
}

TEST_P(FileTest, MutatedSafetensorsNeverCrash) {
  const std::string path = folder_.path("m.safetensors");
  save_safetensors({{{"a", at::rand({5, 3})}, {"b", at::rand({7})}}, {{"k", "v"}}}, path);
  const std::string good = bytes_of(path);
  std::mt19937_64 random(seed());
  int errors = 0;
  for (int round = 0; round < 10'000; ++round) {
    std::string bytes = good;
    for (uint64_t edits = 1 + random() % 3; edits > 0; --edits) {
      const size_t at = random() % std::min<size_t>(bytes.size(), 220);
      if (random() % 8 == 0) {
        bytes.resize(at + 1);
      } else {
        bytes[at] = static_cast<char>(random());
      }
    }
    write(path, bytes);
    try {
      load_safetensors(path);
    } catch (const Error&) {
      ++errors;
    }
  }
  EXPECT_GT(errors, 5000);
}

TEST_P(FileTest, FailedWritesLeaveNothingAndKeepTheOldFile) {
  // A folder where the file should be: the rename fails after everything was written.
  const std::string taken = folder_.path("taken");
  fs::create_directories(taken + "/inside");
  EXPECT_THROW(save_safetensors({{{"a", at::rand({2})}}, {}}, taken), Error);
  EXPECT_EQ(files_in_folder(), 2u);
  // A file where a folder should be.
  write(folder_.path("plain"), "x");
  EXPECT_THROW(save_safetensors({{{"a", at::rand({2})}}, {}}, folder_.path("plain/f")), Error);
  EXPECT_THROW(OutputFile("/proc/nowhere/file"), Error);
  // Abandoned half-way, as by an exception.
  const std::string path = folder_.path("kept");
  write(path, "old");
  {
    OutputFile file(path);
    file.write("new");
  }
  EXPECT_EQ(bytes_of(path), "old");
  EXPECT_EQ(files_in_folder(), 4u);
  EXPECT_THROW(save_safetensors({{{"a", at::zeros({2}, at::kComplexFloat)}}, {}}, path), Error);
  EXPECT_THROW(save_safetensors({{}, {{"a", "\xff"}}}, path), Error);
  EXPECT_EQ(bytes_of(path), "old");
}

// A disk that fills up while the file is written, played by a limit on file size.
TEST_P(FileTest, FullDiskLeavesNoPartialFile) {
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit small = before;
  small.rlim_cur = 100'000;
  setrlimit(RLIMIT_FSIZE, &small);
  EXPECT_THROW(save_safetensors({{{"a", at::rand({1'000'000})}}, {}}, folder_.path("f")), Error);
  setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_EQ(files_in_folder(), 0u);
}

TEST_P(FileTest, PngRoundTripWithText) {
  const at::Tensor image =
      at::randint(0, 256, {9, 13, 3}, at::kLong).to(device(), at::kFloat) / 255;
  const std::string path = folder_.path("a.png");
  save_png(image * 1.0, path, {{"prompt", "{\"1\": {}}"}});
  EXPECT_LT((load_image(path) - image.cpu()).abs().max().item<double>(), 1e-6);
  EXPECT_NE(bytes_of(path).find(std::string("tEXtprompt\0{\"1\": {}}", 20)), std::string::npos);
  // Values outside 0..1 are clamped, not wrapped.
  save_png(at::full({2, 2, 3}, 1.5), path);
  EXPECT_EQ(load_image(path).min().item<double>(), 1.0);
}

TEST_P(FileTest, BadPicturesAreErrors) {
  EXPECT_THROW(save_png(at::zeros({3, 3}), folder_.path("x.png")), Error);
  EXPECT_THROW(save_png(at::zeros({3, 3, 4}), folder_.path("x.png")), Error);
  EXPECT_THROW(load_image(folder_.path("absent.png")), Error);
  save_png(at::rand({8, 8, 3}), folder_.path("good.png"));
  std::string bytes = bytes_of(folder_.path("good.png"));
  write(folder_.path("cut.png"), bytes.substr(0, 60));
  EXPECT_THROW(load_image(folder_.path("cut.png")), Error);
  write(folder_.path("text.png"), "hello");
  EXPECT_THROW(load_image(folder_.path("text.png")), Error);
  // A header that claims 50000 x 50000 pixels is refused before anything is reserved.
  const std::string size{'\0', '\0', static_cast<char>(0xC3), static_cast<char>(0x50)};
  bytes.replace(16, 4, size);
  bytes.replace(20, 4, size);
  write(folder_.path("huge.png"), bytes);
  EXPECT_THROW(load_image(folder_.path("huge.png")), Error);
}

}  // namespace
}  // namespace lacuna
