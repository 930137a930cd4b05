// SPDX-License-Identifier: Apache-2.0
#include "lacuna/training/lora_options.h"

#include <ATen/TensorOperators.h>

#include <string>

#include "lacuna/error.h"
#include "lacuna/files/option_range.h"
#include "lacuna/training/attention_mask.h"

namespace lacuna {

std::string_view to_string(LoraGradient gradient) {
  return gradient == LoraGradient::kFull ? "full" : "cached";
}

std::string_view to_string(MaskSource mask) {
  return mask == MaskSource::kAttention ? "attention" : "none";
}

LoraGradient lora_gradient_from_string(std::string_view text) {
  if (text == "full") return LoraGradient::kFull;
  if (text == "cached") return LoraGradient::kCached;
  throw Error("unknown gradient '" + std::string(text) + "'; use one of: full, cached");
}

MaskSource mask_source_from_string(std::string_view text) {
  if (text == "attention") return MaskSource::kAttention;
  if (text == "none") return MaskSource::kNone;
  throw Error("unknown mask '" + std::string(text) + "'; use one of: attention, none");
}

void check(const LoraOptions& options) {
  check_range(static_cast<double>(options.rank), 1, 1024, "rank");
  check_range(static_cast<double>(options.steps), 1, 100000, "steps");
  check_range(options.learning_rate, 1e-9, 10, "learning_rate");
  check_range(static_cast<double>(options.images), 1, 1024, "images");
  check_range(static_cast<double>(options.sampling_steps), 1, 1000, "sampling_steps");
  check_range(options.cfg, 0, 100, "cfg");
  check_range(static_cast<double>(options.width), 8, 8192, "width");
  check_range(static_cast<double>(options.height), 8, 8192, "height");
  check_range(static_cast<double>(options.batch), 1, 1024, "batch");
  check_range(static_cast<double>(options.refresh), 0, 100, "refresh");
  check_range(static_cast<double>(options.captures), 1, 1024, "captures");
  check_range(static_cast<double>(options.evaluations), 1, 1024, "evaluations");
  check_range(options.suppress_value, 0, 1000, "suppress_value");
  if (options.width % 8 != 0 || options.height % 8 != 0) {
    throw Error("width and height must be multiples of 8, not " + std::to_string(options.width) +
                " x " + std::to_string(options.height));
  }
  check(options.focal);
}

void check(const TrainingImages& images) {
  if (!images.latents.defined()) {
    if (images.masks.defined()) throw Error("masks need the pictures they belong to");
    return;
  }
  const at::Tensor& latents = images.latents;
  if (latents.dim() != 4 || latents.size(0) == 0) throw Error("there are no pictures to train on");
  if (!images.masks.defined()) return;
  const at::Tensor& masks = images.masks;
  if (masks.dim() != 3 || masks.size(0) != latents.size(0)) {
    throw Error("there must be one mask for each picture");
  }
  for (int64_t i = 0; i < masks.size(0); ++i) {
    if (!resize_nearest(masks[i], latents.size(2), latents.size(3)).gt(0).any().item<bool>()) {
      throw Error("mask " + std::to_string(i + 1) +
                  " is empty, or too small for the model to see; paint over the whole subject");
    }
  }
}

}  // namespace lacuna
