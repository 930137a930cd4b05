// SPDX-License-Identifier: Apache-2.0
#include "support/random_concepts.h"

namespace lacuna::testing {

at::Tensor embeddings(int64_t n, int64_t width) {
  return random_matrix(n, width) + 2.0 * random_matrix(1, width);
}

std::shared_ptr<ConceptLora> random_concept(const std::string& target,
                                            const std::map<std::string, int64_t>& rows_of,
                                            const at::Tensor& rows, bool mapped, int64_t rank) {
  const int64_t d = rows.size(1);
  auto item = std::make_shared<ConceptLora>();
  item->item.target = target;
  item->item.anchor = "scenery";
  item->item.templates = 2;
  item->training = R"({"steps": 50})";
  item->prompt_gram = at::matmul(rows.t(), rows);
  item->prompt_gram = (item->prompt_gram + item->prompt_gram.t()) * 0.5;
  if (mapped) {
    const at::Tensor f = embeddings(25, d);
    item->refinement_gram = at::matmul(f.t(), f);
    item->refinement_gram = (item->refinement_gram + item->refinement_gram.t()) * 0.5;
    item->refinement_shift = at::matmul(0.3 * random_matrix(d, d), item->prompt_gram);
  }
  for (const auto& [name, out] : rows_of) {
    item->pairs[name] = {random_matrix(out, rank), random_matrix(rank, d)};
  }
  return item;
}

}  // namespace lacuna::testing
