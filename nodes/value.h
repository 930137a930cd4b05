// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "lacuna/closed_form/refinement.h"
#include "lacuna/concepts/concept_set.h"
#include "lacuna/evaluation/detector.h"
#include "lacuna/evaluation/image_encoder.h"
#include "lacuna/host.h"
#include "lacuna/training/concept_lora.h"

namespace lacuna {

using LoraTensors = std::map<std::string, at::Tensor>;
// Losses by training step, for ComfyUI's loss graph.
struct LossMap {
  std::vector<double> losses;
};

// Anything that travels along a link of the graph. Objects are shared and never modified.
using Value = std::variant<std::monostate, bool, int64_t, double, std::string, at::Tensor,
                           std::shared_ptr<Denoiser>, std::shared_ptr<TextEncoder>,
                           std::shared_ptr<ImageDecoder>, std::shared_ptr<Detector>,
                           std::shared_ptr<ImageEncoder>, std::shared_ptr<const ConceptSet>,
                           std::shared_ptr<const Refinement>, std::shared_ptr<const LoraTensors>,
                           std::shared_ptr<const LoraBundle>, std::shared_ptr<const LossMap>>;

}  // namespace lacuna
