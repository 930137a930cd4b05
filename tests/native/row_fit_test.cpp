// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/row_fit.h"

#include <gtest/gtest.h>

#include "lacuna/closed_form/pooled_text.h"
#include "lacuna/closed_form/refinement.h"
#include "lacuna/error.h"
#include "support/fake_host.h"
#include "support/random_data.h"

namespace lacuna {
namespace {

using testing::random_matrix;
using testing::relative_difference;

class RowFitTest : public testing::SeededTest {};

StreamRows random_rows(int64_t moving, int64_t kept, int64_t d) {
  return {random_matrix(moving, d), random_matrix(moving, d),
          random_matrix(moving, 1).squeeze(1).square(), random_matrix(kept, d),
          random_matrix(kept, 1).squeeze(1).square()};
}

// The formula taken literally.
at::Tensor primal(const StreamRows& rows, double lambda) {
  const int64_t d = rows.from.size(1);
  const auto gram = [](const at::Tensor& a, const at::Tensor& w, const at::Tensor& b) {
    return at::matmul((a * w.unsqueeze(1)).t(), b);
  };
  const at::Tensor g = gram(rows.from, rows.weights, rows.from) +
                       gram(rows.kept, rows.kept_weights, rows.kept) +
                       lambda * at::eye(d, at::kDouble);
  const at::Tensor shift = gram(rows.to - rows.from, rows.weights, rows.from);
  return at::linalg_solve(g, shift.t()).t();
}

at::Tensor whole(const RowFit& fit) {
  return fit.in.defined() ? at::matmul(fit.out, fit.in) : fit.out;
}

TEST_F(RowFitTest, FewRowsGiveWhatTheWholeSystemGives) {
  for (const double lambda : {0.01, 1.0, 100.0}) {
    const StreamRows rows = random_rows(12, 30, 96);
    const RowFit fit = fit_rows(rows, lambda);
    ASSERT_TRUE(fit.in.defined());
    EXPECT_EQ(fit.out.size(1), 12);
    EXPECT_LT(relative_difference(whole(fit), primal(rows, lambda)), 1e-10);
  }
}

TEST_F(RowFitTest, ManyRowsGiveTheSame) {
  const StreamRows rows = random_rows(40, 90, 24);
  const RowFit fit = fit_rows(rows, 0.5);
  EXPECT_FALSE(fit.in.defined());
  EXPECT_LT(relative_difference(whole(fit), primal(rows, 0.5)), 1e-10);
}

TEST_F(RowFitTest, RowsThatStayWhereTheyAreChangeNothing) {
  StreamRows rows = random_rows(5, 7, 20);
  rows.to = rows.from.clone();
  EXPECT_EQ(whole(fit_rows(rows, 1.0)).abs().max().item<double>(), 0.0);
  rows = random_rows(5, 0, 20);
  EXPECT_LT(relative_difference(whole(fit_rows(rows, 1.0)), primal(rows, 1.0)), 1e-10);
}

TEST_F(RowFitTest, NotANumberIsRefused) {
  StreamRows rows = random_rows(5, 7, 20);
  rows.from[2][3] = std::nan("");
  EXPECT_THROW(fit_rows(rows, 1.0), Error);
}

ConceptSet cat_to_fog() {
  ConceptSet set;
  set.general_prior = GeneralPriorSize::kNone;
  Concept cat;
  cat.target = "cat";
  cat.anchor = "fog";
  cat.templates = 6;
  set.concepts = {cat};
  return set;
}

// An encoder whose pooled vector is the embedding of the last word.
class PooledEncoder : public testing::FakeTextEncoder {
 public:
  using FakeTextEncoder::FakeTextEncoder;
  TextEmbedding embed(const std::vector<std::string>& prompts) override {
    const at::Tensor context = encode(prompts);
    return {context, context.select(1, 76).clone()};
  }
};

TEST_F(RowFitTest, PooledVectorsOfConceptsMoveToTheirAnchorsAndOthersStay) {
  PooledEncoder encoder(64);
  SilentProgress progress;
  ConceptSet set = cat_to_fog();
  set.preserve = {{"wolf", ConceptKind::kObject, 6}};
  RefinementOptions options;
  options.regularization = 1e-3;
  const at::Tensor n =
      at::eye(64, at::kDouble) + whole(fit_pooled(encoder, set, options, progress));
  const auto pooled = [&](const std::string& text) {
    return encoder.embed({text}).pooled.to(at::kDouble)[0];
  };
  const auto distance = [&](const at::Tensor& a, const at::Tensor& b) {
    return (a - b).norm().item<double>();
  };
  const at::Tensor cat = pooled("a photo of a cat"), fog = pooled("a photo of a fog");
  const at::Tensor wolf = pooled("a photo of a wolf");
  EXPECT_LT(distance(at::matmul(n, cat), fog), 0.5 * distance(cat, fog));
  EXPECT_LT(distance(at::matmul(n, wolf), wolf), 0.5 * distance(wolf, fog));
}

TEST_F(RowFitTest, AnEncoderWithoutPooledVectorsIsRefused) {
  testing::FakeTextEncoder encoder(16);
  SilentProgress progress;
  const ConceptSet set = cat_to_fog();
  try {
    fit_pooled(encoder, set, {}, progress);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("CLIP gives none"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace lacuna
