// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/row_fit.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include "lacuna/closed_form/spd_solver.h"
#include "lacuna/closed_form/text_statistics.h"

namespace lacuna {
namespace {

at::Tensor weighted(const at::Tensor& rows, const at::Tensor& weights) {
  return rows.to(at::kDouble) * weights.to(at::kDouble).sqrt().unsqueeze(1);
}

}  // namespace

RowFit fit_rows(const StreamRows& rows, double lambda) {
  const int64_t n = rows.from.size(0);
  const int64_t d = rows.from.size(1);
  const at::Tensor moved = weighted(rows.to.to(at::kDouble) - rows.from.to(at::kDouble),
                                    rows.weights);  // sqrt W (T - F)
  const at::Tensor all =
      at::cat({weighted(rows.from, rows.weights), weighted(rows.kept, rows.kept_weights)});  // X
  if (all.size(0) <= d) {
    at::Tensor gram = at::matmul(all, all.transpose(0, 1));
    gram.diagonal().add_(lambda);
    at::Tensor selected = at::zeros({all.size(0), n}, at::kDouble);
    selected.narrow(0, 0, n).diagonal().fill_(1.0);
    const at::Tensor mix = SpdSolver(gram, kNoiseFloor).solve(selected);  // [rows, n]
    return {moved.transpose(0, 1), at::matmul(mix.transpose(0, 1), all)};
  }
  at::Tensor gram = at::zeros({d, d}, at::kDouble);
  add_gram_upper(gram, all, 1.0);
  mirror_upper(gram);
  gram.diagonal().add_(lambda);
  const at::Tensor shift = at::matmul(moved.transpose(0, 1), all.narrow(0, 0, n));  // [d, d]
  return {SpdSolver(gram, kNoiseFloor).solve_right(shift), at::Tensor()};
}

}  // namespace lacuna
