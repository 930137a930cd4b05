// SPDX-License-Identifier: Apache-2.0
// safetensors and pictures: round trips, damaged and hostile files, failed writes.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>

#include "lacuna/concepts/prompt_file.h"
#include "lacuna/error.h"
#include "lacuna/files/image_file.h"
#include "lacuna/files/output_file.h"
#include "lacuna/files/safetensors_file.h"
#include "support/message_of.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;
using testing::message_of;

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
      // Nothing is stored, but the size is no size of a tensor, or its strides overflow.
      safetensors(entry("F32", "[0,18446744073709551615]", "[0,0]")),
      safetensors(entry("F32", "[18446744073709551615,0]", "[0,0]")),
      safetensors(entry("U8", "[0,9223372036854775807,2]", "[0,0]")),
      safetensors(entry("F64", "[4611686018427387904,0,4611686018427387904]", "[0,0]")),
      safetensors(entry("F32", "[0]", "[0,4]"), four),
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

// Writers may store them in any order beside the tensor that starts at the same place.
TEST_P(FileTest, EmptyTensorsMayLieAnywhere) {
  const std::string path = folder_.path("e.safetensors");
  for (const char* names : {"abc", "cba", "bca", "bac"}) {
    const auto entry = [](char name, const char* shape, const char* offsets) {
      return std::string("\"") + name + R"(":{"dtype":"F32","shape":)" + shape +
             R"(,"data_offsets":)" + offsets + "}";
    };
    const std::string header = "{" + entry(names[0], "[1]", "[0,4]") + "," +
                               entry(names[1], "[3,0]", "[0,0]") + "," +
                               entry(names[2], "[0]", "[4,4]") + "}";
    write(path, safetensors(header, "1234"));
    EXPECT_EQ(load_safetensors(path).tensors.size(), 3u) << names;
  }
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

TEST_P(FileTest, PngHasItsSizeAndText) {
  const at::Tensor image =
      at::randint(0, 256, {9, 13, 3}, at::kLong).to(device(), at::kFloat) / 255;
  const std::string path = folder_.path("a.png");
  save_png(image * 1.0, path, {{"prompt", "{\"1\": {}}"}});
  const std::string bytes = bytes_of(path);
  EXPECT_EQ(bytes.substr(0, 8), "\x89PNG\r\n\x1a\n");
  EXPECT_EQ(bytes.substr(12, 12), std::string("IHDR\0\0\0\r\0\0\0\t", 12));
  EXPECT_NE(bytes.find(std::string("tEXtprompt\0{\"1\": {}}", 20)), std::string::npos);
}

TEST_P(FileTest, BadPicturesAreErrors) {
  EXPECT_THROW(save_png(at::zeros({3, 3}), folder_.path("x.png")), Error);
  EXPECT_THROW(save_png(at::zeros({3, 3, 4}), folder_.path("x.png")), Error);
  EXPECT_EQ(files_in_folder(), 0u);
}

// C functions end a name at NUL: "a.png\0" would be written without a temporary name, or another
// file read than the one that was named.
TEST_P(FileTest, ANameWithNulIsRefused) {
  const std::string path = folder_.path(std::string("a.png\0", 6));
  write(folder_.path("a.png"), "old");
  for (const auto& call : std::vector<std::function<void()>>{
           [&] { OutputFile file(path); }, [&] { save_png(at::rand({2, 2, 3}), path); },
           [&] { save_safetensors({{{"a", at::rand({2})}}, {}}, path); },
           [&] { load_safetensors(path); }, [&] { load_prompts(path); }}) {
    const std::string message = message_of(call);
    EXPECT_NE(message.find("a.png?' holds a NUL character"), std::string::npos) << message;
    EXPECT_EQ(message.find('\0'), std::string::npos);
  }
  EXPECT_EQ(bytes_of(folder_.path("a.png")), "old");
  EXPECT_EQ(files_in_folder(), 1u);
}

TEST_P(FileTest, AFailedWriteSaysWhy) {
  const auto refusal = [](const std::string& path) {
    return message_of([&] { OutputFile file(path); });
  };
  EXPECT_NE(refusal("/proc/nowhere/file").find("(No such file or directory)"), std::string::npos);
  const std::string message = refusal(folder_.path(std::string(5000, 'x') + "/file"));
  EXPECT_NE(message.find("the name is too long"), std::string::npos) << message;
  EXPECT_LT(message.size(), 400u);
}

TEST_P(FileTest, NumbersAreTakenOnce) {
  const auto save = [&] {
    OutputFile file = OutputFile::numbered(folder_.path("a/b"), ".txt");
    file.write("x");
    return file.commit();
  };
  EXPECT_TRUE(save().ends_with("a/b_00001_.txt"));
  {
    OutputFile first = OutputFile::numbered(folder_.path("a/b"), ".txt");
    OutputFile second = OutputFile::numbered(folder_.path("a/b"), ".txt");
    EXPECT_TRUE(second.commit().ends_with("b_00002_.txt"));
    EXPECT_TRUE(first.commit().ends_with("b_00003_.txt"));
  }
  EXPECT_EQ(files_in_folder(), 4u);
}

// What a killed process was writing goes with the next save in that folder, once it is old; what
// others write, and what is not ours, stays.
TEST_P(FileTest, LeftoversOfKilledProcessesAreRemoved) {
  const pid_t child = fork();
  if (child == 0) {
    OutputFile file(folder_.path("big"));
    file.write("half of");
    raise(SIGKILL);
  }
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFSIGNALED(status));
  ASSERT_EQ(files_in_folder(), 1u);
  const fs::path left = *fs::directory_iterator(folder_.path(""));
  write(folder_.path("theirs.tmp"), "x");
  const auto save = [&] { save_safetensors({{{"a", at::rand({2})}}, {}}, folder_.path("small")); };
  save();
  EXPECT_TRUE(fs::exists(left));  // somebody may be at it
  for (const fs::path& file : {left, fs::path(folder_.path("theirs.tmp"))}) {
    fs::last_write_time(file, fs::last_write_time(file) - std::chrono::hours(2));
  }
  save();
  EXPECT_FALSE(fs::exists(left));
  EXPECT_EQ(files_in_folder(), 2u);
}

}  // namespace
}  // namespace lacuna
