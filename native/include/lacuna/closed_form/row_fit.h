// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace lacuna {

// The closed form on rows themselves, for streams with few rows or wide ones: the pooled vector of
// SDXL, language models. Exact, like the form on Gram matrices of refinement.h.

// Rows of one text stream, float32 or float64 on the CPU.
struct StreamRows {
  at::Tensor from;          // [n, d]: what moves ...
  at::Tensor to;            // [n, d]: ... to these
  at::Tensor weights;       // [n]
  at::Tensor kept;          // [m, d]: what stays
  at::Tensor kept_weights;  // [m]
};

// N - I = out in.
struct RowFit {
  at::Tensor out;  // [d, r] float64; or N - I itself, [d, d] ...
  at::Tensor in;   // [r, d] float64; undefined then
};

// N - I = (T - F)^T W F (F^T W F + K^T V K + lambda I)^-1 with F, T, K the rows and W, V their
// weights. Where there are fewer rows than columns, by the n x n system of the dual problem
// (push-through identity): with X = [F sqrt W; K sqrt V],
//   F_w G^-1 = S (X X^T + lambda I)^-1 X,  S selecting the first n rows,
// so that no d x d matrix is made. Throws Error for NaN and infinity.
RowFit fit_rows(const StreamRows& rows, double lambda);

}  // namespace lacuna
