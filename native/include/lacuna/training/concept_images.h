// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>

#include "lacuna/concepts/concept_prompts.h"
#include "lacuna/host.h"
#include "lacuna/training/lora_options.h"

namespace lacuna {

// The pictures a concept's LoRA is trained on.

// Pictures drawn by the model, one prompt after the other, with masks from its own cross-attention
// if `masked`. subject: the text that seeds them. on_step(pictures) is called after every step of
// every batch of pictures.
TrainingImages draw_concept(Denoiser& model, const ConceptPrompts& prompts,
                            const TextEmbedding& negative, const LoraOptions& options,
                            const std::string& subject, bool masked, Progress& progress,
                            const std::function<void(int64_t)>& on_step);

// [n, h, w] masks of pictures that were not drawn here: what the model attends to in them at a few
// noise levels.
at::Tensor masks_of(Denoiser& model, const ConceptPrompts& prompts, const at::Tensor& latents,
                    const std::string& subject, Progress& progress);

// [k, H, W, 3] in 0..1: the first `count` pictures, darkened outside their masks; without a decoder
// the masks themselves, as large as the pictures would be.
at::Tensor picture_masks(Denoiser& model, ImageDecoder* decoder, const TrainingImages& images,
                         int64_t count, int64_t width, int64_t height, Progress& progress);

}  // namespace lacuna
