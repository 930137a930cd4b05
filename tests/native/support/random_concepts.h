// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <memory>
#include <string>

#include "lacuna/training/concept_lora.h"
#include "support/random_data.h"

namespace lacuna::testing {

// Rows with a common mean, as text embeddings have it, [n, d] float64.
at::Tensor embeddings(int64_t n, int64_t width);

// A concept with the statistics of these rows and random LoRA pairs; rows_of: output rows by LoRA
// name. With a refinement when `mapped`. All float64.
std::shared_ptr<ConceptLora> random_concept(const std::string& target,
                                            const std::map<std::string, int64_t>& rows_of,
                                            const at::Tensor& rows, bool mapped = true,
                                            int64_t rank = 1);

}  // namespace lacuna::testing
