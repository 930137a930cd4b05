// SPDX-License-Identifier: Apache-2.0
#include "lacuna/attention_projection.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>

#include "lacuna/error.h"
#include "lacuna/text_statistics.h"

namespace lacuna {

std::string layer_of(const AttentionProjection& projection) {
  const size_t end = projection.name.rfind(".to_");
  return projection.name.substr(0, end);
}

std::string_view to_string(EditedMatrices matrices) {
  return matrices == EditedMatrices::kValueOnly ? "value" : "key+value";
}

EditedMatrices edited_matrices_from_string(std::string_view text) {
  if (text == "key+value") return EditedMatrices::kKeyAndValue;
  if (text == "value") return EditedMatrices::kValueOnly;
  throw Error("unknown matrices '" + std::string(text) + "'; use one of: key+value, value");
}

std::vector<AttentionProjection> edited_projections(Denoiser& model, EditedMatrices matrices,
                                                    int64_t text_width) {
  std::vector<AttentionProjection> edited;
  for (AttentionProjection& projection : model.cross_attention()) {
    if (matrices == EditedMatrices::kValueOnly && projection.role == ProjectionRole::kKey) continue;
    edited.push_back(std::move(projection));
  }
  if (edited.empty()) {
    throw Error("this model (" + model.family() +
                ") has no text cross-attention to edit; Lacuna "
                "works with SD1.x, SD2.x and SDXL models");
  }
  const int64_t width = model.effective_weight(edited.front().name).size(1);
  if (width != text_width) {
    throw Error("the CLIP input does not belong to this model: its embeddings have width " +
                std::to_string(text_width) + ", the model (" + model.family() + ") reads " +
                std::to_string(width) + "; connect the CLIP of the same checkpoint");
  }
  return edited;
}

at::Tensor projection_gram(Denoiser& model, const std::vector<AttentionProjection>& projections,
                           Progress& progress) {
  at::Tensor sum;
  for (const AttentionProjection& projection : projections) {
    progress.check();
    const at::Tensor weight = model.effective_weight(projection.name).detach().to(at::kFloat);
    if (!at::isfinite(weight).all().item<bool>()) {
      throw Error("the model's weight '" + projection.name +
                  "' holds NaN or infinity; load an undamaged checkpoint");
    }
    // float32 is enough for a metric; sums over layers are float64.
    at::Tensor gram = at::zeros({weight.size(1), weight.size(1)}, weight.options());
    add_gram_upper(gram, weight, 1.0);
    gram = gram.to(at::kCPU, at::kDouble);
    sum = sum.defined() ? sum.add_(gram) : gram;
  }
  return symmetrize_upper(sum);
}

}  // namespace lacuna
