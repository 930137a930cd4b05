// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "lacuna/concepts/concept_set.h"
#include "lacuna/host.h"

namespace lacuna {

// What an edit did to the text, read off the weights alone, before any picture is drawn: how far
// the keys and values that the model reads for a phrase have gone from the phrase (share 1) to the
// concept's anchor (share 0).
//
// With W a key or value matrix, W' the edited one, c and a the embeddings of a phrase and of its
// anchor, m the mean of common words, sums over matrices and paired positions:
//   remaining = sqrt(sum ||W' c - W a||^2 / sum ||W c - W a||^2)
//   content of a word w = sum <W' w - W m, W (c - m)> / sum ||W (c - m)||^2
// Content is 1 for the target before the edit, and about 0 for a word that has nothing to do with
// it. Sums over layers are quadratic forms in three d x d matrices, so that a word costs d^2 and
// not a product with every matrix of every layer.

struct PhraseResidual {
  std::string phrase;
  std::string form;        // "target", "synonym", "plural", "style", "by", "typo"
  double remaining = 1.0;  // 1: as before the edit, 0: read as the anchor; above 1: elsewhere
};

// One matrix; entries belong to ConceptResidual::positions.
struct LayerResidual {
  std::string layer;
  EntryRole role = EntryRole::kKey;
  std::vector<double> before;  // ||W c - W a|| / ||W c||
  std::vector<double> after;   // ||W' c - W a|| / ||W c||
};

struct WordContent {
  std::string word;
  double before = 0.0;
  double after = 0.0;
};

struct ConceptResidual {
  std::string target;
  std::vector<PhraseResidual> phrases;  // the target first
  std::vector<std::string> positions;   // of the target's prompt: its tokens, end of text, padding
  std::vector<LayerResidual> layers;
  std::vector<WordContent> leaks;       // words that still carry most of the concept, worst first
  std::vector<std::string> closest;     // common words that carry most of it after the edit
  std::vector<std::string> neighbours;  // nearest words that nobody listed, nearest first
};

struct WordDrift {
  std::string word;
  double drift = 0.0;  // sqrt(sum ||(W' - W) w||^2 / sum ||W w||^2)
};

// Sums over all key and value matrices, [d, d] float64 CPU; D = W' - W.
struct WeightForms {
  at::Tensor base;   // W^T W
  at::Tensor cross;  // D^T W
  at::Tensor edit;   // D^T D
};

struct ResidualScan {
  bool weights_differ = false;  // false: no key or value matrix was changed
  WeightForms forms;
  std::vector<ConceptResidual> concepts;
  std::vector<WordDrift> preserved;   // listed
  std::vector<WordDrift> neighbours;  // never listed: the given ones, else the concepts' nearest
};

// The forms of a phrase that an edit should reach, too: plural, "<phrase> style", "by <phrase>" and
// a typing error.
std::vector<PhraseResidual> phrase_variants(const std::string& phrase);

// Words of the general prior's captions: what else a user may say.
std::vector<std::string> common_words();

// neighbours: words that nobody listed, whose drift is wanted; empty: the nearest are looked up.
// Encodes some ten prompts for each concept, and the common words once for each text encoder: they
// are kept in encoder.cache_directory(). Throws Error when the models do not have the same layers
// or the text encoder is another model's.
ResidualScan scan_residuals(Denoiser& base, Denoiser& edited, TextEncoder& encoder,
                            const ConceptSet& set, const std::vector<std::string>& neighbours,
                            Progress& progress);

// Throws Error that says how the two differ unless `edited` can be an edit of `base`.
void check_same_family(Denoiser& base, Denoiser& edited);

}  // namespace lacuna
