// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/concepts/concept_set.h"
#include "lacuna/host.h"

namespace lacuna {

// The general prior: what a text-to-image model must keep whatever is erased. Generic captions of
// our own (native/data/generic_captions.txt), all positions of every caption.

std::span<const std::string_view> generic_captions(GeneralPriorSize size);

// Mean over captions of sum_positions e e^T, [d, d] float64 CPU; all zeros for kNone. Depends on
// the text encoder only, so it is kept in encoder.cache_directory() under the encoder's
// fingerprint. A cache file that is damaged or cannot be written is ignored: the matrix is then
// computed again.
at::Tensor general_prior_gram(TextEncoder& encoder, GeneralPriorSize size, Progress& progress);

// Captions of the prior that name one of the phrases as whole words: a prior must not protect what
// is to be erased, so their rows are taken out of the matrix again.
std::vector<std::string> captions_naming(GeneralPriorSize size,
                                         const std::vector<std::string>& phrases);

}  // namespace lacuna
