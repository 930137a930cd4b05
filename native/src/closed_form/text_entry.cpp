// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/text_entry.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "lacuna/closed_form/text_statistics.h"
#include "lacuna/error.h"

namespace lacuna {
namespace {

constexpr int64_t kSketchRows = 4096;

// float32, on the model's device.
at::Tensor float_weight(Denoiser& model, const TextEntry& projection) {
  return entry_weight(model, projection).detach().to(at::kFloat);
}

// sum: what was added up over the entries. It is finite only where every weight is.
void check_finite(const at::Tensor& sum, Denoiser& model, const std::vector<TextEntry>& entries) {
  if (at::isfinite(sum).all().item<bool>()) return;
  for (const TextEntry& entry : entries) {
    if (at::isfinite(float_weight(model, entry)).all().item<bool>()) continue;
    throw Error("the model's weight '" + entry.name +
                "' holds NaN or infinity; load an undamaged checkpoint");
  }
  throw Error("the model's weights are too large to be edited; load an undamaged checkpoint");
}

}  // namespace

std::vector<TextEntry> cross_attention(Denoiser& model) {
  std::vector<TextEntry> entries = model.text_entries();
  std::erase_if(entries, [](const TextEntry& entry) { return entry.role == EntryRole::kInput; });
  return entries;
}

std::vector<TextEntry> pooled_entries(Denoiser& model) {
  std::vector<TextEntry> entries = model.text_entries();
  std::erase_if(entries, [](const TextEntry& entry) { return entry.stream != kPooledStream; });
  return entries;
}

at::Tensor entry_weight(Denoiser& model, const TextEntry& entry) {
  const at::Tensor weight = model.effective_weight(entry.name);
  const int64_t all = weight.size(1) - entry.first_column;
  return weight.narrow(1, entry.first_column, entry.columns > 0 ? entry.columns : all);
}

std::string layer_of(const TextEntry& projection) {
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

std::vector<TextEntry> edited_entries(Denoiser& model, EditedMatrices matrices,
                                      int64_t text_width) {
  std::vector<TextEntry> edited;
  for (TextEntry& projection : cross_attention(model)) {
    if (matrices == EditedMatrices::kValueOnly && projection.role == EntryRole::kKey) continue;
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

at::Tensor entry_rows(Denoiser& model, const std::vector<TextEntry>& projections,
                      Progress& progress) {
  at::Generator generator = at::detail::createCPUGenerator(1);
  std::vector<at::Tensor> kept;  // the rows themselves, while they are few
  int64_t count = 0;
  at::Tensor sums;
  // One pass over the weight: every row is added, with a random sign, to a row of its own,
  // beginning at a random one. No two rows of a call meet, so that the sums do not depend on the
  // device's order.
  const auto fold = [&](const at::Tensor& weight) {
    if (!sums.defined()) sums = at::zeros({kSketchRows, weight.size(1)}, weight.options());
    const at::Tensor signs =
        at::randint(0, 2, {weight.size(0), 1}, generator, at::TensorOptions(at::kFloat))
            .mul_(2)
            .sub_(1)
            .to(weight.device());
    int64_t place =
        at::randint(0, kSketchRows, {1}, generator, at::TensorOptions(at::kLong)).item<int64_t>();
    for (int64_t begin = 0; begin < weight.size(0);) {
      const int64_t size = std::min(kSketchRows - place, weight.size(0) - begin);
      sums.narrow(0, place, size)
          .addcmul_(weight.narrow(0, begin, size), signs.narrow(0, begin, size));
      begin += size;
      place = 0;
    }
  };
  for (const TextEntry& projection : projections) {
    progress.check();
    const at::Tensor weight = float_weight(model, projection);
    count += weight.size(0);
    if (!sums.defined() && count <= kSketchRows) {
      kept.push_back(weight.to(at::kCPU));
      continue;
    }
    for (const at::Tensor& earlier : kept) fold(earlier.to(weight.device()));
    kept.clear();
    fold(weight);
  }
  const at::Tensor rows = sums.defined() ? sums.to(at::kCPU) : at::cat(kept);
  check_finite(rows, model, projections);
  return rows;
}

at::Tensor entry_gram(Denoiser& model, const std::vector<TextEntry>& projections,
                      Progress& progress) {
  at::Tensor sum;
  for (const TextEntry& projection : projections) {
    progress.check();
    const at::Tensor weight = float_weight(model, projection);
    // float32 is enough for a metric; sums over layers are float64.
    at::Tensor gram = at::zeros({weight.size(1), weight.size(1)}, weight.options());
    add_gram_upper(gram, weight, 1.0);
    gram = gram.to(at::kCPU, at::kDouble);
    sum = sum.defined() ? sum.add_(gram) : gram;
  }
  mirror_upper(sum);
  check_finite(sum, model, projections);
  return sum;
}

}  // namespace lacuna
