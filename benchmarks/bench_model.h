// SPDX-License-Identifier: Apache-2.0
#pragma once

// What benchmarks share: processor time, peak memory, and a model that is nothing but key and value
// matrices of the right shapes.
#include <ATen/ATen.h>
#include <sys/resource.h>

#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lacuna/error.h"
#include "lacuna/host.h"

namespace lacuna::bench {

inline double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// Of the process's memory since the last forget_peak().
inline double peak_mb() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stod(line.substr(6)) / 1024.0;
  }
  return 0.0;
}

inline void forget_peak() { std::ofstream("/proc/self/clear_refs") << 5; }

inline double timed(const std::function<void()>& work) {
  const double begin = cpu_seconds();
  work();
  return cpu_seconds() - begin;
}

struct Shape {
  int64_t width = 0;
  std::map<int64_t, int64_t> matrices;  // rows -> how many K and V matrices have them
};

inline Shape shape_of(const std::string& family) {
  if (family == "sdxl") return {2048, {{640, 20}, {1280, 120}}};
  return {768, {{320, 10}, {640, 10}, {1280, 12}}};
}

class BenchModel : public Denoiser {
 public:
  explicit BenchModel(const Shape& shape) {
    for (const auto& [rows, count] : shape.matrices) {
      for (int64_t i = 0; i < count; ++i) {
        const std::string name = std::to_string(rows) + "." + std::to_string(i);
        projections_.push_back({name, name, i % 2 ? EntryRole::kValue : EntryRole::kKey});
        weights_[name] = at::randn({rows, shape.width}) * 0.03;
      }
    }
  }
  std::string family() override { return "benchmark"; }
  std::string fingerprint() override { return ""; }
  bool patchable() override { return true; }
  std::vector<TextEntry> text_entries() override { return projections_; }
  at::Tensor effective_weight(const std::string& name) override { return weights_.at(name); }
  std::shared_ptr<Denoiser> with_weight_deltas(const std::vector<WeightDelta>& deltas,
                                               double strength) override {
    auto edited = std::make_shared<BenchModel>(*this);
    for (const WeightDelta& delta : deltas) {
      const at::Tensor change = delta.down.defined() ? at::matmul(delta.up, delta.down) : delta.up;
      edited->weights_[delta.name] = weights_.at(delta.name) + strength * change;
    }
    return edited;
  }
  std::shared_ptr<Denoiser> with_weight_maps(const std::vector<TextMap>&, double) override {
    throw unused();
  }
  std::shared_ptr<Denoiser> with_input_maps(const std::vector<TextMap>&,
                                            const std::vector<WeightDelta>&, double,
                                            const std::shared_ptr<const TextGate>&) override {
    throw unused();
  }
  at::Tensor noise_levels() override { throw unused(); }
  std::vector<int64_t> latent_shape(int64_t, int64_t) override { throw unused(); }
  at::Tensor to_host_latent(const at::Tensor&) override { throw unused(); }
  at::Tensor from_host_latent(const at::Tensor&) override { throw unused(); }
  at::Tensor denoise(const DenoiseRequest&, AttentionTap*) override { throw unused(); }
  at::Tensor sample(const SamplingRequest&, const std::function<void(int64_t, int64_t)>&) override {
    throw unused();
  }

 private:
  static Error unused() { return Error("not part of this benchmark"); }
  std::vector<TextEntry> projections_;
  std::map<std::string, at::Tensor> weights_;
};

}  // namespace lacuna::bench
