// SPDX-License-Identifier: Apache-2.0
#include "support/random_data.h"

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <random>

namespace lacuna::testing {
namespace {
uint64_t choose_seed() {
  const char* fixed = std::getenv("LACUNA_TEST_SEED");
  const uint64_t seed =
      fixed != nullptr ? std::strtoull(fixed, nullptr, 10) : std::random_device{}();
  at::manual_seed(seed);
  return seed;
}
}  // namespace

SeededTest::SeededTest()
    : seed_(choose_seed()),
      trace_(__FILE__, __LINE__, "repeat with LACUNA_TEST_SEED=" + std::to_string(seed_)) {}

std::vector<std::string> devices() {
  std::vector<std::string> names{"cpu"};
  if (at::hasCUDA()) names.push_back("cuda");
  return names;
}

at::Tensor random_matrix(int64_t rows, int64_t columns) {
  return at::randn({rows, columns}, at::kDouble);
}

at::Tensor random_spd(int64_t d, double condition) {
  const at::Tensor q = std::get<0>(at::linalg_qr(random_matrix(d, d)));
  const at::Tensor eigenvalues = at::logspace(0, -std::log10(condition), d, 10.0, at::kDouble);
  const at::Tensor m = at::matmul(q * eigenvalues.unsqueeze(0), q.t());
  return (m + m.t()) * 0.5;
}

double relative_difference(const at::Tensor& actual, const at::Tensor& expected) {
  const at::Tensor a = actual.to(at::kCPU, at::kDouble);
  const at::Tensor b = expected.to(at::kCPU, at::kDouble);
  return ((a - b).norm() / b.norm().clamp_min(1e-300)).item<double>();
}

TemporaryFolder::TemporaryFolder()
    : path_((std::filesystem::temp_directory_path() /
             ("lacuna_test_" + std::to_string(std::random_device{}())))
                .string()) {
  std::filesystem::create_directories(path_);
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string TemporaryFolder::path(const std::string& name) const { return path_ + "/" + name; }

}  // namespace lacuna::testing
