// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/statistics_cache.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace lacuna {

const std::vector<at::Tensor>* StatisticsCache::find(const std::string& key) {
  auto it = index_.find(key);
  if (it == index_.end()) return nullptr;
  entries_.splice(entries_.begin(), entries_, it->second);
  return &entries_.front().tensors;
}

void StatisticsCache::insert(const std::string& key, std::vector<at::Tensor> tensors) {
  int64_t bytes = 0;
  for (const at::Tensor& tensor : tensors) bytes += static_cast<int64_t>(tensor.nbytes());
  if (index_.contains(key) || bytes > capacity_) return;
  bytes_ += bytes;
  entries_.push_front({key, std::move(tensors), bytes});
  index_[key] = entries_.begin();
  const int64_t small = capacity_ / 512;
  while (bytes_ > capacity_) {
    auto last = std::find_if(entries_.rbegin(), entries_.rend(),
                             [&](const Entry& entry) { return entry.bytes > small; });
    if (last == entries_.rend()) last = entries_.rbegin();
    bytes_ -= last->bytes;
    index_.erase(last->key);
    entries_.erase(std::next(last).base());
  }
}

std::string prompt_ends_key(ConceptKind kind, int templates, const std::string& phrase) {
  return "ends\n" + std::string(to_string(kind)) + '\n' +
         std::to_string(std::min(templates, kPromptEnds)) + '\n' + phrase;
}

}  // namespace lacuna
