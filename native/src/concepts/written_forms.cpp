// SPDX-License-Identifier: Apache-2.0
#include "lacuna/concepts/written_forms.h"

#include <array>
#include <string_view>
#include <utility>

#include "lacuna/files/text.h"

namespace lacuna {
namespace {

std::vector<std::string> plurals(const std::string& phrase) {
  std::vector<std::string> forms{phrase + "s"};
  const auto ending = [&](std::string_view from, std::string_view to) {
    if (!phrase.ends_with(from)) return;
    forms.push_back(phrase.substr(0, phrase.size() - from.size()) + std::string(to));
  };
  for (const std::string_view sibilant : {"s", "x", "z", "ch", "sh", "o"}) {
    ending(sibilant, std::string(sibilant) + "es");
  }
  ending("y", "ies");
  ending("f", "ves");
  ending("fe", "ves");
  ending("man", "men");
  return forms;
}

}  // namespace

std::vector<std::string> written_forms(const std::vector<Concept>& concepts) {
  constexpr std::array<std::string_view, 3> kArticles{"a ", "an ", "the "};
  constexpr std::array<std::string_view, 7> kBehindTheHead{" of ", " in ",   " with ", " on ",
                                                           " at ", " from ", " for "};
  constexpr std::string_view kStyle = " style";
  std::vector<std::string> forms;
  const auto add = [&](std::string phrase) {
    for (const std::string_view article : kArticles) {
      if (phrase.starts_with(article)) phrase.erase(0, article.size());
    }
    std::vector<std::string> numbers{phrase};
    for (std::string& each : plurals(phrase)) numbers.push_back(std::move(each));
    // Flags of norway.
    for (const std::string_view behind : kBehindTheHead) {
      const size_t at = phrase.find(behind);
      if (at == std::string::npos) continue;
      for (const std::string& each : plurals(phrase.substr(0, at))) {
        numbers.push_back(each + phrase.substr(at));
      }
    }
    for (std::string& each : numbers) {
      std::string joined = each;
      std::erase(joined, '-');
      if (joined != each) forms.push_back(std::move(joined));
      forms.push_back(std::move(each));
    }
  };
  for (const Concept& item : concepts) {
    for (const std::string& phrase : phrases(item)) {
      std::string folded = fold_case(phrase);
      add(folded);
      // By van gogh, in the manner of van gogh.
      if (item.kind == ConceptKind::kStyle && folded.ends_with(kStyle)) {
        add(folded.substr(0, folded.size() - kStyle.size()));
      }
    }
  }
  return forms;
}

}  // namespace lacuna
