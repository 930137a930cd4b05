// SPDX-License-Identifier: Apache-2.0
#include "lacuna/closed_form/edit_method.h"

#include <array>

#include "lacuna/error.h"

namespace lacuna {
namespace {

void append(TokenAlignment& out, int64_t target, int64_t anchor) {
  out.target.push_back(target);
  out.anchor.push_back(anchor);
}

// MACE Eq. 1: every position except the phrase itself follows the anchor prompt. The phrase is left
// to LoRA Erase.
class MaceMethod final : public EditMethod {
 public:
  std::string_view name() const override { return "mace"; }

  void check(ReadAt read_at) const override {
    if (read_at == ReadAt::kSubject) {
      throw Error(
          "method 'mace' leaves the phrase's own tokens untouched, so 'read_at' cannot be "
          "'subject'; choose 'all' or method 'uce'");
    }
  }

  TokenAlignment rows(const PromptPair& pair, ReadAt read_at) const override {
    const TokenAlignment all = align_tokens(pair.target_ids, pair.anchor_ids, pair.window);
    if (read_at == ReadAt::kAll) return all;
    TokenAlignment out;
    for (size_t k = static_cast<size_t>(all.first_end_of_text); k < all.target.size(); ++k) {
      append(out, all.target[k], all.anchor[k]);
    }
    return out;
  }
};

// Unified Concept Editing: the phrase's tokens themselves move to the anchor's.
class UceMethod final : public EditMethod {
 public:
  std::string_view name() const override { return "uce"; }

  void check(ReadAt) const override {}

  TokenAlignment rows(const PromptPair& pair, ReadAt read_at) const override {
    if (read_at == ReadAt::kSubject) return align_phrases(pair.target_phrase, pair.anchor_phrase);
    TokenAlignment around = MaceMethod().rows(pair, read_at);
    if (read_at == ReadAt::kEndOfText) return around;
    // Tokens that phrase and anchor share are paired as phrase tokens, once.
    TokenAlignment out = align_phrases(pair.target_phrase, pair.anchor_phrase);
    for (size_t k = 0; k < around.target.size(); ++k) {
      const int64_t position = around.target[k];
      if (position >= pair.target_phrase.begin && position < pair.target_phrase.end) continue;
      append(out, position, around.anchor[k]);
    }
    return out;
  }
};

const MaceMethod kMace;
const UceMethod kUce;
const std::array<const EditMethod*, 2> kMethods{&kMace, &kUce};

constexpr std::array<std::pair<ReadAt, std::string_view>, 3> kReadAt{{
    {ReadAt::kAll, "all"},
    {ReadAt::kSubject, "subject"},
    {ReadAt::kEndOfText, "end_of_text"},
}};

}  // namespace

std::string_view to_string(ReadAt read_at) {
  for (const auto& [value, name] : kReadAt) {
    if (value == read_at) return name;
  }
  return "";
}

ReadAt read_at_from_string(std::string_view text) {
  for (const auto& [value, name] : kReadAt) {
    if (name == text) return value;
  }
  throw Error("unknown read_at '" + std::string(text) + "'; use one of: all, subject, end_of_text");
}

std::vector<std::string> edit_method_names() {
  std::vector<std::string> names;
  for (const EditMethod* method : kMethods) names.emplace_back(method->name());
  return names;
}

const EditMethod& edit_method(std::string_view name) {
  std::string known;
  for (const EditMethod* method : kMethods) {
    if (method->name() == name) return *method;
    known += (known.empty() ? "" : ", ") + std::string(method->name());
  }
  throw Error("unknown method '" + std::string(name) + "'; use one of: " + known);
}

}  // namespace lacuna
