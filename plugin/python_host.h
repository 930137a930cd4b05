// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <memory>

#include "lacuna/evaluation/detector.h"
#include "lacuna/evaluation/image_encoder.h"
#include "lacuna/host.h"

namespace lacuna {

// Raised with every change of what is asked of a host written in Python: a module of other files
// is then refused in a sentence (python_shim/loader.py) instead of failing in the middle of a run.
inline constexpr int kHostInterface = 4;

// Hosts written in Python, seen from C++. Every call takes the GIL; exceptions raised in Python
// pass through as the identical object. The Python side of each class is described in
// python_shim/protocol.py.

std::shared_ptr<Denoiser> wrap_denoiser(pybind11::object object);
std::shared_ptr<TextEncoder> wrap_text_encoder(pybind11::object object);
std::shared_ptr<ImageDecoder> wrap_image_decoder(pybind11::object object);
// Its score() answers with a tensor, or with a sentence when it failed on the pictures at hand.
std::shared_ptr<Detector> wrap_detector(pybind11::object object);
std::shared_ptr<ImageEncoder> wrap_image_encoder(pybind11::object object);
std::shared_ptr<Application> wrap_application(pybind11::object object);
// None: a silent one.
std::shared_ptr<Progress> wrap_progress(pybind11::object object);

// An AttentionTap as a Python callable (layer, query, key, value, heads) -> attention output.
void register_attention_tap(pybind11::module_& module);

// The Python object behind a wrapped one. Needs the GIL.
pybind11::object unwrap(const std::shared_ptr<Denoiser>& denoiser);
pybind11::object unwrap(const std::shared_ptr<TextEncoder>& encoder);
pybind11::object unwrap(const std::shared_ptr<ImageDecoder>& decoder);
pybind11::object unwrap(const std::shared_ptr<Detector>& detector);
pybind11::object unwrap(const std::shared_ptr<ImageEncoder>& encoder);

}  // namespace lacuna
