// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/general_prior.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <string>
#include <vector>

#include "embedded_lines.h"
#include "lacuna/closed_form/text_statistics.h"
#include "lacuna/concepts/concept_prompts.h"
#include "lacuna/files/cached_tensor.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

constexpr size_t kSmallCaptions = 200;
// Raised when the captions change, so that old cache files are not used.
constexpr std::string_view kCaptionsVersion = "1";
constexpr std::string_view kPriorFormat = "lacuna.general_prior/2";

}  // namespace

std::span<const std::string_view> generic_captions(GeneralPriorSize size) {
  const std::span<const std::string_view> all = embedded::generic_captions();
  switch (size) {
    case GeneralPriorSize::kNone:
      return {};
    case GeneralPriorSize::kSmall:
      return all.first(std::min(kSmallCaptions, all.size()));
    case GeneralPriorSize::kFull:
      break;
  }
  return all;
}

std::vector<std::string> captions_naming(GeneralPriorSize size,
                                         const std::vector<std::string>& phrases) {
  std::vector<std::string> found;
  for (std::string_view caption : generic_captions(size)) {
    for (const std::string& phrase : phrases) {
      if (names_phrase(caption, fold_case(phrase))) {
        found.emplace_back(caption);
        break;
      }
    }
  }
  return found;
}

at::Tensor general_prior_gram(TextEncoder& encoder, GeneralPriorSize size, Progress& progress) {
  const int64_t d = encoder.width();
  const std::span<const std::string_view> captions = generic_captions(size);
  if (captions.empty()) return at::zeros({d, d}, at::kDouble);

  std::string cache;
  if (!encoder.cache_directory().empty() && !encoder.fingerprint().empty()) {
    cache = encoder.cache_directory() + "/general_prior_" + encoder.fingerprint() + "_" +
            std::string(to_string(size)) + "_v" + std::string(kCaptionsVersion) + ".safetensors";
    if (auto known = load_cached(cache, kPriorFormat, at::kDouble, {d, d})) return *known;
  }

  GramSum sum(d);
  for (size_t begin = 0; begin < captions.size(); begin += kPromptsPerCall) {
    const size_t end = std::min(captions.size(), begin + kPromptsPerCall);
    progress.check();
    const std::vector<std::string> batch(captions.begin() + begin, captions.begin() + end);
    const at::Tensor read = encoder.encode(batch).reshape({-1, d}).to(at::kCPU);
    check_embeddings(read);
    sum.add(read, 1.0 / static_cast<double>(captions.size()));
    progress.report(static_cast<int64_t>(end), static_cast<int64_t>(captions.size()));
  }
  const at::Tensor gram = sum.finish();
  if (!cache.empty()) save_cached(gram, cache, kPriorFormat);
  return gram;
}

}  // namespace lacuna
