// SPDX-License-Identifier: Apache-2.0
#include "plugin/python_values.h"

#include <pybind11/stl.h>

#include <string>

#include "lacuna/error.h"
#include "plugin/python_host.h"

namespace lacuna {
namespace py = pybind11;

Value to_value(const InputSpec& input, py::handle object) {
  const auto owned = [&] { return py::reinterpret_borrow<py::object>(object); };
  if (input.type == socket::kModel) return wrap_denoiser(owned());
  if (input.type == socket::kClip) return wrap_text_encoder(owned());
  if (input.type == socket::kVae) return wrap_image_decoder(owned());
  if (input.type == socket::kClipVision) return wrap_image_encoder(owned());
  if (input.type == socket::kDetector) return wrap_detector(owned());
  try {
    if (input.type == socket::kConcepts) return object.cast<ConceptSetRef>().value;
    if (input.type == socket::kRefinement) return object.cast<RefinementRef>().value;
    if (input.type == socket::kLoras) return object.cast<LoraBundleRef>().value;
    if (input.type == socket::kLoraModel) {
      return std::make_shared<const LoraTensors>(object.cast<LoraTensors>());
    }
    if (py::isinstance<py::bool_>(object)) return object.cast<bool>();
    if (py::isinstance<py::int_>(object)) return object.cast<int64_t>();
    if (py::isinstance<py::float_>(object)) return object.cast<double>();
    if (py::isinstance<py::str>(object)) return object.cast<std::string>();
    return object.cast<at::Tensor>();
  } catch (const py::cast_error&) {
    throw Error("input '" + input.id + "' is not a " + input.type +
                "; connect the output of a matching node");
  }
}

py::object to_python(const Value& value) {
  return std::visit(
      [](const auto& item) -> py::object {
        using T = std::decay_t<decltype(item)>;
        if constexpr (std::is_same_v<T, std::monostate>) {
          return py::none();
        } else if constexpr (std::is_same_v<T, std::shared_ptr<const ConceptSet>>) {
          return py::cast(ConceptSetRef{item});
        } else if constexpr (std::is_same_v<T, std::shared_ptr<const Refinement>>) {
          return py::cast(RefinementRef{item});
        } else if constexpr (std::is_same_v<T, std::shared_ptr<const LoraBundle>>) {
          return py::cast(LoraBundleRef{item});
        } else if constexpr (std::is_same_v<T, std::shared_ptr<const LossMap>>) {
          return py::dict(py::arg("loss") = item->losses);
        } else if constexpr (std::is_same_v<T, std::shared_ptr<const LoraTensors>>) {
          return py::cast(*item);
        } else if constexpr (std::is_same_v<T, std::shared_ptr<Denoiser>> ||
                             std::is_same_v<T, std::shared_ptr<TextEncoder>> ||
                             std::is_same_v<T, std::shared_ptr<ImageDecoder>> ||
                             std::is_same_v<T, std::shared_ptr<Detector>> ||
                             std::is_same_v<T, std::shared_ptr<ImageEncoder>>) {
          return unwrap(item);
        } else {
          return py::cast(item);
        }
      },
      value);
}

}  // namespace lacuna
