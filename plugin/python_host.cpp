// SPDX-License-Identifier: Apache-2.0
#include "plugin/python_host.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>

#include "lacuna/error.h"

namespace lacuna {
namespace py = pybind11;
namespace {

// Owns a Python object and may be destroyed without the GIL.
class Handle {
 public:
  explicit Handle(py::object object) : object_(std::move(object)) {}
  ~Handle() {
    py::gil_scoped_acquire gil;
    object_ = py::object();
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  const py::object& get() const { return object_; }

  template <typename T>
  T attribute(const char* name) const {
    py::gil_scoped_acquire gil;
    return convert<T>(object_.attr(name), name);
  }

  template <typename T, typename... Args>
  T call(const char* method, Args&&... args) const {
    py::gil_scoped_acquire gil;
    py::object result = object_.attr(method)(std::forward<Args>(args)...);
    if constexpr (!std::is_void_v<T>) return convert<T>(std::move(result), method);
  }

 private:
  template <typename T>
  static T convert(py::object value, const char* name) {
    if constexpr (std::is_same_v<T, py::object>) {
      return value;
    } else {
      try {
        return value.cast<T>();
      } catch (const py::cast_error&) {
        throw Error(std::string("the host returned an unexpected value from '") + name +
                    "'; this is a fault in the host adapter, please report it");
      }
    }
  }

  py::object object_;
};

py::object optional(const at::Tensor& tensor) {
  return tensor.defined() ? py::cast(tensor) : py::none();
}

// Handed to the host for the length of one forward pass.
class TapRef {
 public:
  explicit TapRef(AttentionTap* tap) : tap_(tap) {}
  at::Tensor attend(const std::string& layer, const at::Tensor& query, const at::Tensor& key,
                    const at::Tensor& value, int64_t heads) const {
    if (tap_ == nullptr) throw Error("the attention tap was called after its forward pass");
    py::gil_scoped_release release;
    return tap_->attend(layer, query, key, value, heads);
  }
  void close() { tap_ = nullptr; }

 private:
  AttentionTap* tap_;
};

class PythonTextEncoder final : public TextEncoder {
 public:
  explicit PythonTextEncoder(py::object object) : handle_(std::move(object)) {}
  int64_t width() override { return handle_.attribute<int64_t>("width"); }
  int64_t window() override { return handle_.attribute<int64_t>("window"); }
  std::string fingerprint() override { return handle_.attribute<std::string>("fingerprint"); }
  WeightSamples weight_samples() override {
    return handle_.attribute<WeightSamples>("weight_samples");
  }
  std::string cache_directory() override {
    return handle_.attribute<std::string>("cache_directory");
  }
  std::vector<int64_t> tokenize(const std::string& text) override {
    return handle_.call<std::vector<int64_t>>("tokenize", text);
  }
  std::vector<std::string> vocabulary() override {
    return handle_.call<std::vector<std::string>>("vocabulary");
  }
  at::Tensor encode(const std::vector<std::string>& prompts) override {
    return handle_.call<at::Tensor>("encode", prompts);
  }
  at::Tensor encode_start(const std::vector<std::string>& prompts, int64_t length) override {
    return handle_.call<at::Tensor>("encode_start", prompts, length);
  }
  TextEmbedding embed(const std::vector<std::string>& prompts) override {
    py::gil_scoped_acquire gil;
    const auto pair = handle_.call<std::pair<at::Tensor, py::object>>("embed", prompts);
    return {pair.first, pair.second.is_none() ? at::Tensor() : pair.second.cast<at::Tensor>()};
  }
  std::shared_ptr<TextEncoder> with_map(const TextMap& map, double strength,
                                        const std::vector<std::string>& phrases) override {
    py::gil_scoped_acquire gil;
    py::object mapped =
        handle_.call<py::object>("with_map", map.out, optional(map.in), strength, phrases);
    return mapped.is_none() ? nullptr : wrap_text_encoder(std::move(mapped));
  }
  at::Tensor conditioning(const std::vector<std::string>& prompts) override {
    return handle_.call<at::Tensor>("conditioning", prompts);
  }
  const py::object& object() const { return handle_.get(); }

 private:
  Handle handle_;
};

class PythonDenoiser final : public Denoiser {
 public:
  explicit PythonDenoiser(py::object object) : handle_(std::move(object)) {}
  std::string family() override { return handle_.attribute<std::string>("family"); }
  std::string fingerprint() override { return handle_.attribute<std::string>("fingerprint"); }
  WeightSamples weight_samples() override {
    return handle_.attribute<WeightSamples>("weight_samples");
  }
  std::string revision() override { return handle_.attribute<std::string>("revision"); }
  bool patchable() override { return handle_.attribute<bool>("patchable"); }

  std::vector<TextEntry> text_entries() override {
    using Entry = std::tuple<std::string, std::string, std::string, std::string, int64_t, int64_t>;
    std::vector<TextEntry> entries;
    for (auto& [name, lora_name, role, stream, first, columns] :
         handle_.call<std::vector<Entry>>("text_entries")) {
      entries.push_back({std::move(name), std::move(lora_name),
                         role == "key"     ? EntryRole::kKey
                         : role == "value" ? EntryRole::kValue
                                           : EntryRole::kInput,
                         std::move(stream), first, columns});
    }
    return entries;
  }

  at::Tensor effective_weight(const std::string& name) override {
    return handle_.call<at::Tensor>("effective_weight", name);
  }

  std::shared_ptr<Denoiser> with_weight_deltas(const std::vector<WeightDelta>& deltas,
                                               double strength) override {
    py::gil_scoped_acquire gil;
    return wrap_denoiser(
        handle_.call<py::object>("with_weight_deltas", to_python(deltas), strength));
  }

  std::shared_ptr<Denoiser> with_weight_maps(const std::vector<TextMap>& maps,
                                             double strength) override {
    py::gil_scoped_acquire gil;
    return wrap_denoiser(handle_.call<py::object>("with_weight_maps", to_python(maps), strength));
  }

  std::shared_ptr<Denoiser> with_input_maps(const std::vector<TextMap>& maps,
                                            const std::vector<WeightDelta>& deltas, double strength,
                                            const std::shared_ptr<const TextGate>& gate) override {
    py::gil_scoped_acquire gil;
    const py::object when = gate == nullptr ? py::none() : to_python(*gate);
    return wrap_denoiser(handle_.call<py::object>("with_input_maps", to_python(maps), strength,
                                                  when, to_python(deltas)));
  }

  at::Tensor acts_on(const at::Tensor& context) override {
    py::gil_scoped_acquire gil;
    const py::object acts = handle_.call<py::object>("acts_on", context);
    return acts.is_none() ? at::Tensor() : acts.cast<at::Tensor>();
  }

  at::Tensor noise_levels() override { return handle_.attribute<at::Tensor>("noise_levels"); }
  std::vector<int64_t> latent_shape(int64_t width, int64_t height) override {
    return handle_.call<std::vector<int64_t>>("latent_shape", width, height);
  }
  at::Tensor to_host_latent(const at::Tensor& latent) override {
    return handle_.call<at::Tensor>("to_host_latent", latent);
  }
  at::Tensor from_host_latent(const at::Tensor& latent) override {
    return handle_.call<at::Tensor>("from_host_latent", latent);
  }

  at::Tensor denoise(const DenoiseRequest& request, AttentionTap* tap) override {
    py::gil_scoped_acquire gil;
    py::object python_tap = py::none();
    if (tap != nullptr) python_tap = py::cast(TapRef(tap));
    struct Closer {
      py::object& tap;
      ~Closer() {
        if (!tap.is_none()) tap.cast<TapRef&>().close();
      }
    } closer{python_tap};
    const py::object clean =
        handle_.call<py::object>("denoise", request.noisy, request.sigma, request.text.context,
                                 optional(request.text.pooled), python_tap, request.attention_only);
    return clean.is_none() ? at::Tensor() : clean.cast<at::Tensor>();
  }

  at::Tensor sample(const SamplingRequest& request,
                    const std::function<void(int64_t, int64_t)>& on_step) override {
    return handle_.call<at::Tensor>("sample", request.seed, request.steps, request.cfg,
                                    request.sampler, request.scheduler, request.positive,
                                    request.negative, request.latent, request.denoise, on_step);
  }
  const py::object& object() const { return handle_.get(); }

 private:
  // (tests, window), a test as (now, before, offset, last row only).
  static py::object to_python(const TextGate& gate) {
    py::list tests;
    for (const TextGate::Test& test : gate.tests) {
      tests.append(
          py::make_tuple(test.now, optional(test.before), test.offset, test.last_row_only));
    }
    return py::make_tuple(tests, gate.window);
  }

  static py::list to_python(const std::vector<WeightDelta>& deltas) {
    py::list list;
    for (const WeightDelta& delta : deltas) {
      list.append(py::make_tuple(delta.name, delta.up, optional(delta.down)));
    }
    return list;
  }

  static py::list to_python(const std::vector<TextMap>& maps) {
    py::list list;
    for (const TextMap& map : maps) {
      py::list entries;
      for (const TextEntry& entry : map.entries) {
        entries.append(py::make_tuple(entry.name, entry.first_column, entry.columns));
      }
      list.append(py::make_tuple(entries, map.out, optional(map.in)));
    }
    return list;
  }

  Handle handle_;
};

class PythonImageDecoder final : public ImageDecoder {
 public:
  explicit PythonImageDecoder(py::object object) : handle_(std::move(object)) {}
  at::Tensor decode(const at::Tensor& latent) override {
    return handle_.call<at::Tensor>("decode", latent);
  }
  at::Tensor encode(const at::Tensor& images) override {
    return handle_.call<at::Tensor>("encode", images);
  }
  const py::object& object() const { return handle_.get(); }

 private:
  Handle handle_;
};

class PythonDetector final : public Detector {
 public:
  explicit PythonDetector(py::object object) : handle_(std::move(object)) {}
  std::string name() override { return handle_.attribute<std::string>("name"); }
  std::string version() override { return handle_.attribute<std::string>("version"); }
  at::Tensor score(const at::Tensor& images, const std::vector<std::string>& names) override {
    py::gil_scoped_acquire gil;
    const auto answer = handle_.call<py::object>("score", images, names);
    if (py::isinstance<py::str>(answer)) throw Error(answer.cast<std::string>());
    return answer.cast<at::Tensor>();
  }
  const py::object& object() const { return handle_.get(); }

 private:
  Handle handle_;
};

class PythonImageEncoder final : public ImageEncoder {
 public:
  explicit PythonImageEncoder(py::object object) : handle_(std::move(object)) {}
  at::Tensor embed(const at::Tensor& images) override {
    return handle_.call<at::Tensor>("embed", images);
  }
  const py::object& object() const { return handle_.get(); }

 private:
  Handle handle_;
};

class PythonApplication final : public Application {
 public:
  explicit PythonApplication(py::object object) : handle_(std::move(object)) {}
  std::string output_directory() override {
    return handle_.attribute<std::string>("output_directory");
  }
  Checkpoint load_checkpoint(const std::string& name) override {
    py::gil_scoped_acquire gil;
    auto [denoiser, encoder, decoder] =
        handle_.call<std::tuple<py::object, py::object, py::object>>("load_checkpoint", name);
    return {wrap_denoiser(denoiser), wrap_text_encoder(encoder), wrap_image_decoder(decoder)};
  }
  std::shared_ptr<Denoiser> load_lora(const std::shared_ptr<Denoiser>& model,
                                      const std::string& name, double strength) override {
    py::gil_scoped_acquire gil;
    return wrap_denoiser(handle_.call<py::object>("load_lora", unwrap(model), name, strength));
  }

 private:
  Handle handle_;
};

class PythonProgress final : public Progress {
 public:
  explicit PythonProgress(py::object object) : handle_(std::move(object)) {}
  void report(int64_t done, int64_t total) override { handle_.call<void>("report", done, total); }
  void check() override { handle_.call<void>("check"); }
  void status(const std::string& line) override { handle_.call<void>("status", line); }
  void preview(const at::Tensor& image) override { handle_.call<void>("preview", image); }

 private:
  Handle handle_;
};

template <typename Wrapper, typename Interface>
py::object unwrap_as(const std::shared_ptr<Interface>& value) {
  const auto* wrapper = dynamic_cast<const Wrapper*>(value.get());
  TORCH_INTERNAL_ASSERT(wrapper != nullptr, "not a Python host object");
  return wrapper->object();
}

}  // namespace

std::shared_ptr<Denoiser> wrap_denoiser(py::object object) {
  return std::make_shared<PythonDenoiser>(std::move(object));
}
std::shared_ptr<TextEncoder> wrap_text_encoder(py::object object) {
  return std::make_shared<PythonTextEncoder>(std::move(object));
}
std::shared_ptr<ImageDecoder> wrap_image_decoder(py::object object) {
  return std::make_shared<PythonImageDecoder>(std::move(object));
}
std::shared_ptr<Detector> wrap_detector(py::object object) {
  return std::make_shared<PythonDetector>(std::move(object));
}
std::shared_ptr<ImageEncoder> wrap_image_encoder(py::object object) {
  return std::make_shared<PythonImageEncoder>(std::move(object));
}
std::shared_ptr<Application> wrap_application(py::object object) {
  return std::make_shared<PythonApplication>(std::move(object));
}
std::shared_ptr<Progress> wrap_progress(py::object object) {
  if (object.is_none()) return std::make_shared<SilentProgress>();
  return std::make_shared<PythonProgress>(std::move(object));
}

void register_attention_tap(py::module_& module) {
  py::class_<TapRef>(module, "AttentionTap", py::module_local(),
                     "Stands in for the attention inside every text cross-attention layer.")
      .def("__call__", &TapRef::attend, py::arg("layer"), py::arg("query"), py::arg("key"),
           py::arg("value"), py::arg("heads"));
}

py::object unwrap(const std::shared_ptr<Denoiser>& denoiser) {
  return unwrap_as<PythonDenoiser>(denoiser);
}
py::object unwrap(const std::shared_ptr<TextEncoder>& encoder) {
  return unwrap_as<PythonTextEncoder>(encoder);
}
py::object unwrap(const std::shared_ptr<ImageDecoder>& decoder) {
  return unwrap_as<PythonImageDecoder>(decoder);
}
py::object unwrap(const std::shared_ptr<Detector>& detector) {
  return unwrap_as<PythonDetector>(detector);
}
py::object unwrap(const std::shared_ptr<ImageEncoder>& encoder) {
  return unwrap_as<PythonImageEncoder>(encoder);
}

}  // namespace lacuna
