// SPDX-License-Identifier: Apache-2.0
// Invariants 1-11 of the closed form on random data, against oracles written from the objective
//   F(W') = sum ||W' f - W g||^2 + s sum ||W' p - W p||^2 + lambda ||W' - W||^2.
#include <cmath>

#include "lacuna/closed_form/refinement.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::random_matrix;
using testing::relative_difference;

// Rows are embeddings: f, g [n, d], p [m, d].
struct Data {
  at::Tensor f, g, p;
  double lambda = 0.3;
  double prior_weight = 0.7;
};

Data random_data(int64_t d = 24, int64_t n = 60, int64_t m = 40) {
  // A shared mean, as text embeddings have it.
  const at::Tensor mean = 3.0 * random_matrix(1, d);
  return {random_matrix(n, d) + mean, random_matrix(n, d) + mean, random_matrix(m, d) + mean};
}

at::Tensor delta_of(const Data& data) {
  StatisticsAccumulator pairs(data.f.size(1));
  pairs.add_pairs(data.f, data.g);
  RefinementProblem problem;
  problem.concepts = pairs.finish();
  if (data.p.defined()) {
    StatisticsAccumulator kept(data.f.size(1));
    kept.add_kept(data.p);
    problem.prior = kept.finish().kept;
  }
  RefinementOptions options;
  options.regularization = data.lambda;
  options.prior_weight = data.prior_weight;
  return solve_refinement(problem, options).delta;
}

at::Tensor edited(const at::Tensor& w, const Data& data) {
  return w + at::matmul(w, delta_of(data));
}

at::Tensor gram(const Data& data) {
  at::Tensor g =
      at::matmul(data.f.t(), data.f) + data.lambda * at::eye(data.f.size(1), at::kDouble);
  if (data.p.defined()) g = g + data.prior_weight * at::matmul(data.p.t(), data.p);
  return g;
}

double objective(const at::Tensor& w_new, const at::Tensor& w, const Data& data) {
  const auto term = [](const at::Tensor& x) { return x.square().sum().item<double>(); };
  double sum = term(at::matmul(w_new, data.f.t()) - at::matmul(w, data.g.t())) +
               data.lambda * term(w_new - w);
  if (data.p.defined()) {
    sum += data.prior_weight * term(at::matmul(w_new, data.p.t()) - at::matmul(w, data.p.t()));
  }
  return sum;
}

class RefinementInvariants : public testing::SeededTest {};

TEST_F(RefinementInvariants, N01_Stationarity) {
  const Data data = random_data();
  const at::Tensor w = random_matrix(10, 24);
  const at::Tensor w_new = edited(w, data);
  const at::Tensor target = at::matmul(at::matmul(w, data.g.t()), data.f) + data.lambda * w +
                            data.prior_weight * at::matmul(at::matmul(w, data.p.t()), data.p);
  const at::Tensor g = gram(data);
  EXPECT_LT(
      (at::matmul(w_new, g) - target).norm().item<double>() / (w.norm() * g.norm()).item<double>(),
      1e-10);
  // Central differences of the objective vanish.
  const at::Tensor z = random_matrix(10, 24);
  const double slope =
      (objective(w_new + 1e-4 * z, w, data) - objective(w_new - 1e-4 * z, w, data)) / 2e-4;
  EXPECT_LT(std::abs(slope), 1e-6 * objective(w, w, data));
}

TEST_F(RefinementInvariants, N02_QuadraticOptimum) {
  const Data data = random_data();
  const at::Tensor w = random_matrix(10, 24);
  const at::Tensor w_new = edited(w, data);
  const at::Tensor z = random_matrix(10, 24);
  const double expected = at::matmul(at::matmul(z, gram(data)), z.t()).trace().item<double>();
  for (double step : {1.0, 0.1}) {
    const double rise = objective(w_new + step * z, w, data) - objective(w_new, w, data);
    EXPECT_NEAR(rise / (step * step * expected), 1.0, 1e-8);
  }
}

TEST_F(RefinementInvariants, N03_StrongRegularizationOrPriorKeepsTheModel) {
  const at::Tensor w = random_matrix(10, 24);
  for (const bool by_prior : {false, true}) {
    Data data = random_data(24, 60, 200);
    const auto change = [&](double weight) {
      (by_prior ? data.prior_weight : data.lambda) = weight;
      return (edited(w, data) - w).norm().item<double>();
    };
    const double slope = std::log10(change(1e9) / change(1e8));
    EXPECT_NEAR(slope, -1.0, 1e-3) << (by_prior ? "prior" : "lambda");
  }
}

TEST_F(RefinementInvariants, N04_TargetEqualToAnchorIsExactlyTheIdentity) {
  Data data = random_data();
  data.g = data.f.clone();
  EXPECT_EQ(delta_of(data).abs().max().item<double>(), 0.0);
}

TEST_F(RefinementInvariants, N05_OneMatrixServesEveryLayer) {
  const Data data = random_data();
  const at::Tensor delta = delta_of(data);
  const at::Tensor g = gram(data);
  for (const int64_t out : {4, 17, 64}) {
    const at::Tensor w = random_matrix(out, 24);
    const at::Tensor numerator = at::matmul(at::matmul(w, data.g.t()), data.f) + data.lambda * w +
                                 data.prior_weight * at::matmul(at::matmul(w, data.p.t()), data.p);
    const at::Tensor per_layer = at::linalg_solve(g, numerator.t()).t();
    EXPECT_LT(relative_difference(w + at::matmul(w, delta), per_layer), 1e-9);
  }
}

TEST_F(RefinementInvariants, N06_Equivariance) {
  const Data data = random_data();
  const at::Tensor w = random_matrix(10, 24);
  const at::Tensor q = random_matrix(13, 10);
  EXPECT_LT(relative_difference(edited(at::matmul(q, w), data), at::matmul(q, edited(w, data))),
            1e-9);
}

TEST_F(RefinementInvariants, N07_OrderDoesNotMatter) {
  Data data = random_data();
  const at::Tensor before = delta_of(data);
  const at::Tensor order = at::randperm(60);
  data.f = data.f.index_select(0, order);
  data.g = data.g.index_select(0, order);
  EXPECT_LT(relative_difference(delta_of(data), before), 1e-11);
}

TEST_F(RefinementInvariants, N08_DuplicationIsScaleAndBatchingIsIrrelevant) {
  Data data = random_data();
  const at::Tensor before = delta_of(data);
  Data tripled = data;
  tripled.f = data.f.repeat({3, 1});
  tripled.g = data.g.repeat({3, 1});
  tripled.lambda *= 3;
  tripled.prior_weight *= 3;
  EXPECT_LT(relative_difference(delta_of(tripled), before), 1e-9);

  StatisticsAccumulator whole(24);
  whole.add_pairs(data.f, data.g);
  StatisticsAccumulator parts(24);
  for (int64_t begin = 0; begin < 60; begin += 7) {
    const int64_t size = std::min<int64_t>(7, 60 - begin);
    parts.add_pairs(data.f.narrow(0, begin, size), data.g.narrow(0, begin, size));
  }
  const TextStatistics in_parts = parts.finish();
  const TextStatistics at_once = whole.finish();
  EXPECT_LT(relative_difference(in_parts.edited, at_once.edited), 1e-13);
  EXPECT_LT(relative_difference(in_parts.shift, at_once.shift), 1e-13);
}

TEST_F(RefinementInvariants, N09_SingleRowIsShermanMorrison) {
  Data data{random_matrix(1, 24), random_matrix(1, 24), {}};
  const at::Tensor w = random_matrix(10, 24);
  const at::Tensor step = at::matmul(w, (data.g - data.f).t());
  const at::Tensor expected =
      w + at::matmul(step, data.f) / (data.lambda + data.f.square().sum().item<double>());
  EXPECT_LT(relative_difference(edited(w, data), expected), 1e-9);
}

TEST_F(RefinementInvariants, N10_FewRowsAreInterpolatedExactly) {
  Data data{random_matrix(6, 24), random_matrix(6, 24), {}};
  data.lambda = 1e-7;
  const at::Tensor w = random_matrix(10, 24);
  const at::Tensor w_new = edited(w, data);
  // The error is O(lambda + noise floor) on the rows, and rounding times the condition number
  // (about 1e9) on the complement.
  EXPECT_LT(relative_difference(at::matmul(w_new, data.f.t()), at::matmul(w, data.g.t())), 1e-5);
  const at::Tensor q = std::get<0>(at::linalg_qr(data.f.t()));  // basis of the rows
  const at::Tensor x = random_matrix(24, 5);
  const at::Tensor complement = x - at::matmul(q, at::matmul(q.t(), x));
  EXPECT_LT(relative_difference(at::matmul(w_new, complement), at::matmul(w, complement)), 1e-6);
}

TEST_F(RefinementInvariants, EqualRowsCountAsKept) {
  Data data = random_data();
  StatisticsAccumulator sums(24);
  at::Tensor g = data.g.clone();
  g.narrow(0, 0, 10).copy_(data.f.narrow(0, 0, 10));
  sums.add_pairs(data.f, g);
  const TextStatistics statistics = sums.finish();
  const at::Tensor head = data.f.narrow(0, 0, 10);
  const at::Tensor tail = data.f.narrow(0, 10, 50);
  EXPECT_LT(relative_difference(statistics.kept, at::matmul(head.t(), head)), 1e-13);
  EXPECT_LT(relative_difference(statistics.edited, at::matmul(tail.t(), tail)), 1e-13);
  EXPECT_LT(relative_difference(statistics.shift, at::matmul((g - data.f).t(), data.f)), 1e-12);
}

}  // namespace
}  // namespace lacuna
