// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <list>
#include <string>
#include <unordered_map>
#include <vector>

#include "lacuna/concepts/concept_kind.h"

namespace lacuna {

// Keeps embeddings and sums between runs, so that changing a weight or one concept of a hundred
// does not encode the others again. Least recently used entries go first, and large ones before
// those that are too small to make room. Not thread-safe.
class StatisticsCache {
 public:
  explicit StatisticsCache(int64_t capacity_bytes) : capacity_(capacity_bytes) {}
  // Moved, never copied: the index points into the list.
  StatisticsCache(StatisticsCache&&) = default;
  StatisticsCache& operator=(StatisticsCache&&) = default;
  // Null when unknown; valid until the next insert().
  const std::vector<at::Tensor>* find(const std::string& key);
  void insert(const std::string& key, std::vector<at::Tensor> tensors);
  int64_t bytes() const { return bytes_; }

 private:
  struct Entry {
    std::string key;
    std::vector<at::Tensor> tensors;
    int64_t bytes = 0;
  };
  std::list<Entry> entries_;  // most recent first
  std::unordered_map<std::string, std::list<Entry>::iterator> index_;
  int64_t capacity_;
  int64_t bytes_ = 0;
};

// What make() returned for this encoder and key before, or returns now. Nothing is kept where
// `cache` is null, or of an encoder without a fingerprint.
template <typename Make>
std::vector<at::Tensor> remembered(StatisticsCache* cache, const std::string& fingerprint,
                                   const std::string& key, const Make& make) {
  if (cache == nullptr || fingerprint.empty()) return make();
  const std::string whole = fingerprint + '\n' + key;
  if (const std::vector<at::Tensor>* known = cache->find(whole)) return *known;
  std::vector<at::Tensor> made = make();
  cache->insert(whole, made);
  return made;
}

// The last rows of the windows of a phrase's prompts, [min(templates, kPromptEnds), d] float32,
// which have read the whole prompt: collect_problem comes by them, and a gate is made of them.
inline constexpr int kPromptEnds = 8;
std::string prompt_ends_key(ConceptKind kind, int templates, const std::string& phrase);

}  // namespace lacuna
