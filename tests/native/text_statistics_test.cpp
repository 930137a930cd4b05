// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/text_statistics.h"

#include <gtest/gtest.h>

#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::random_matrix;
using testing::relative_difference;

constexpr int64_t kWidth = 320;
constexpr double kAsFloat64 = 1e-10;  // float32 products alone: 1e-7

at::Tensor random_basis() { return std::get<0>(at::linalg_qr(random_matrix(kWidth, kWidth))); }

// Rows that hold nearly all of their energy in a few directions, like text embeddings.
at::Tensor rows_along(const at::Tensor& basis, int64_t count, double steepness = 4.0) {
  const at::Tensor scale =
      at::exp(at::arange(kWidth, at::kDouble) / -steepness).mul_(216.0).add_(1e-3);
  return at::matmul(random_matrix(count, kWidth) * scale, basis.t()).to(at::kFloat);
}

at::Tensor gram(const at::Tensor& rows) {
  const at::Tensor all = rows.to(at::kDouble);
  return at::matmul(all.t(), all);
}

class GramSumTest : public testing::SeededTest {};

TEST_F(GramSumTest, EqualsFloat64Products) {
  const at::Tensor rows = rows_along(random_basis(), 5000);
  GramSum sum(kWidth);
  sum.add(rows);
  const at::Tensor got = sum.finish();
  EXPECT_LT(relative_difference(got, gram(rows)), kAsFloat64);
  EXPECT_TRUE(got.equal(got.t()));
}

TEST_F(GramSumTest, WeightsAndPartsAreAllTheSameToIt) {
  const at::Tensor rows = rows_along(random_basis(), 1500);
  GramSum sum(kWidth);
  at::Tensor expected = at::zeros({kWidth, kWidth}, at::kDouble);
  for (int64_t begin = 0; begin < rows.size(0); begin += 77) {
    const at::Tensor part = rows.narrow(0, begin, std::min<int64_t>(77, rows.size(0) - begin));
    const double weight = 1.0 / static_cast<double>(1 + begin % 3);
    sum.add(part, weight);
    expected.add_(gram(part), weight);
  }
  sum.add(at::zeros({0, kWidth}));
  EXPECT_LT(relative_difference(sum.finish(), expected), kAsFloat64);
}

TEST_F(GramSumTest, RowsOfAnotherKindAreFoundOutInTheMiddle) {
  const at::Tensor first = rows_along(random_basis(), 1100);
  const at::Tensor second = rows_along(random_basis(), 1300);  // along other directions
  const at::Tensor wild = random_matrix(700, kWidth);          // along none
  const at::Tensor few = rows_along(random_basis(), 10);       // too few to find theirs
  GramSum sum(kWidth);
  at::Tensor expected = at::zeros({kWidth, kWidth}, at::kDouble);
  for (const at::Tensor& rows : {first, second, wild, first, few}) {
    sum.add(rows);
    expected.add_(gram(rows));
  }
  EXPECT_LT(relative_difference(sum.finish(), expected), kAsFloat64);
}

TEST_F(GramSumTest, ASumOfNothingIsZero) {
  EXPECT_EQ(GramSum(kWidth).finish().abs().max().item<double>(), 0.0);
}

TEST_F(GramSumTest, ProductsOfTwoKindsOfRowsEqualFloat64Products) {
  const at::Tensor basis = random_basis();
  for (const at::Tensor& rows : {rows_along(basis, 1200), random_matrix(1200, kWidth)}) {
    const at::Tensor other = rows_along(basis, 1200, 5.0).to(at::kDouble);
    const at::Tensor expected = at::matmul(rows.to(at::kDouble).t(), other);
    at::Tensor sum = expected.clone();
    add_transposed_product(sum, rows, other);
    EXPECT_LT(relative_difference(sum, 2 * expected), kAsFloat64);
  }
}

}  // namespace
}  // namespace lacuna
