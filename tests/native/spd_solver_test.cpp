// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/spd_solver.h"

#include <cmath>

#include "lacuna/error.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::random_matrix;
using testing::random_spd;
using testing::relative_difference;

class SpdSolverTest : public testing::SeededTest {};

TEST_F(SpdSolverTest, SolvesFromBothSides) {
  const at::Tensor g = random_spd(40, 1e4);
  const at::Tensor x = random_matrix(40, 7);
  const SpdSolver solver(g);
  // Backward stable: error about eps * condition.
  EXPECT_LT(relative_difference(solver.solve(at::matmul(g, x)), x), 1e-10);
  EXPECT_LT(relative_difference(solver.solve_right(at::matmul(x.t(), g)), x.t()), 1e-10);
  EXPECT_EQ(solver.floor_added(), 0.0);
}

TEST_F(SpdSolverTest, ReportsTheConditionNumber) {
  for (double condition : {1.0, 1e3, 1e8}) {
    const double reported = SpdSolver(random_spd(30, condition)).condition();
    EXPECT_GT(reported, condition * 0.3);
    EXPECT_LT(reported, condition * 3.0);
  }
}

TEST_F(SpdSolverTest, LiftsNoiseDirectionsAndSaysSo) {
  const at::Tensor rows = random_matrix(5, 20);
  const at::Tensor singular = at::matmul(rows.t(), rows);
  const SpdSolver solver(singular, 1e-9);
  EXPECT_GT(solver.floor_added(), 0.0);
  EXPECT_NEAR(solver.floor_added() / solver.largest_eigenvalue(), 1e-9, 1e-12);
  EXPECT_LT(solver.condition(), 1e10);
  const at::Tensor in_span = at::matmul(singular, random_matrix(20, 1));
  EXPECT_LT(relative_difference(at::matmul(singular, solver.solve(in_span)), in_span), 1e-6);
}

TEST_F(SpdSolverTest, RefusesWhatCannotBeSolved) {
  const at::Tensor rows = random_matrix(5, 20);
  EXPECT_THROW(SpdSolver(at::matmul(rows.t(), rows), 0.0), Error);
  EXPECT_THROW(SpdSolver(-at::eye(3, at::kDouble)), Error);
  EXPECT_THROW(SpdSolver(at::full({3, 3}, NAN, at::kDouble)), Error);
}

TEST_F(SpdSolverTest, LeavesItsInputAlone) {
  const at::Tensor g = random_spd(10, 10);
  const at::Tensor copy = g.clone();
  SpdSolver solver(g);
  EXPECT_TRUE(at::equal(g, copy));
}

// Invariant 21: the float64 delta form, stored as float32, is right to 1e-6 at a condition number
// where a float32 inverse is useless.
TEST_F(SpdSolverTest, Float64SolveSurvivesConditionTenBillion) {
  const int64_t d = 96;
  const at::Tensor g = random_spd(d, 1e10);
  const at::Tensor shift = at::matmul(random_matrix(d, d), g);  // a delta of moderate size
  // Reference: one step of iterative refinement on the same system.
  const SpdSolver solver(g, 1e-13);
  const at::Tensor first = solver.solve_right(shift);
  const at::Tensor reference = first + solver.solve_right(shift - at::matmul(first, g));
  EXPECT_LT(relative_difference(first.to(at::kFloat), reference), 1e-6);

  const at::Tensor float_inverse =
      at::matmul(shift.to(at::kFloat), at::linalg_inv(g.to(at::kFloat)));
  EXPECT_GT(relative_difference(float_inverse, reference), 1e-2);
}

}  // namespace
}  // namespace lacuna
