// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

namespace lacuna::testing {

// A new seed every run (LACUNA_TEST_SEED repeats one), printed with every failure.
class SeededTest : public ::testing::Test {
 protected:
  SeededTest();
  uint64_t seed() const { return seed_; }

 private:
  uint64_t seed_;
  ::testing::ScopedTrace trace_;
};

// The same on every device at hand.
class DeviceTest : public SeededTest, public ::testing::WithParamInterface<std::string> {
 protected:
  at::Device device() const { return at::Device(GetParam()); }
};
std::vector<std::string> devices();

at::Tensor random_matrix(int64_t rows, int64_t columns);  // standard normal float64
// Symmetric positive definite with the given condition number, largest eigenvalue 1.
at::Tensor random_spd(int64_t d, double condition);
double relative_difference(const at::Tensor& actual, const at::Tensor& expected);

// A folder that is removed at the end of the test.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  std::string path(const std::string& name) const;

 private:
  std::string path_;
};

}  // namespace lacuna::testing
