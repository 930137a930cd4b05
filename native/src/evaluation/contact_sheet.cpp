// SPDX-License-Identifier: Apache-2.0
#include "lacuna/evaluation/contact_sheet.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "embedded_lines.h"
#include "lacuna/evaluation/attack.h"

namespace lacuna {
namespace {

struct Colour {
  float red, green, blue;
};
// Of the palette of Okabe and Ito, made for all kinds of colour vision.
constexpr Colour kWanted{0.000f, 0.447f, 0.698f};    // blue
constexpr Colour kUnwanted{0.835f, 0.369f, 0.000f};  // vermilion
constexpr Colour kInk{0.10f, 0.10f, 0.12f};
constexpr Colour kBar{0.90f, 0.91f, 0.93f};

constexpr int64_t kLine = 22;  // from one line of text to the next
constexpr int64_t kGlyphHeight = 20;
constexpr int64_t kMargin = 16;
constexpr int64_t kFrame = 4;
constexpr int64_t kSmallestTile = 128;
constexpr int64_t kLargestTile = 192;
constexpr int64_t kPageWidth = 1180;
constexpr int64_t kMostPages = 16;
constexpr int64_t kRowsOfList = 2;

struct Glyph {
  int64_t advance = 0;
  int64_t width = 0;
  std::string_view coverage;  // width x kGlyphHeight hexadecimal digits
};

// The glyphs of the printable ASCII characters (native/data/sheet_font.txt).
const std::array<Glyph, 95>& glyphs() {
  static const std::array<Glyph, 95> all = [] {
    std::array<Glyph, 95> out;
    for (std::string_view line : embedded::sheet_font()) {
      std::array<int64_t, 3> numbers{};
      for (int64_t& number : numbers) {
        std::from_chars(line.data(), line.data() + line.size(), number);
        line.remove_prefix(line.find(' ') + 1);
      }
      out.at(static_cast<size_t>(numbers[0] - 32)) = {numbers[1], numbers[2], line};
    }
    return out;
  }();
  return all;
}

// What the font can draw: letters with marks lose them, everything else becomes '?'.
std::string drawable(std::string_view text) {
  constexpr std::string_view kLatin1 =
      "AAAAAAACEEEEIIIIDNOOOOOxOUUUUYPsaaaaaaaceeeeiiiidnooooo/ouuuuypy";
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    if (byte >= 0x20 && byte < 0x7f) {
      out += text[i];
    } else if (byte == 0xc3 && i + 1 < text.size()) {
      const auto next = static_cast<unsigned char>(text[++i]);
      out += next >= 0x80 && next < 0xc0 ? kLatin1[next - 0x80] : '?';
    } else if ((byte & 0xc0) != 0x80) {
      out += '?';
    }
  }
  return out;
}

int64_t text_width(std::string_view ascii) {
  int64_t width = 0;
  for (const char c : ascii) width += glyphs()[static_cast<size_t>(c - 32)].advance;
  return width;
}

// Cut to fit, with "..." where something is missing.
std::string fitted(const std::string& text, int64_t width) {
  std::string out = drawable(text);
  if (text_width(out) <= width) return out;
  while (!out.empty() && text_width(out + "...") > width) out.pop_back();
  return out + "...";
}

std::vector<std::string> wrapped(const std::string& text, int64_t width) {
  std::vector<std::string> lines{""};
  const std::string all = drawable(text);
  for (size_t begin = 0; begin < all.size();) {
    const size_t end = std::min(all.find(' ', begin), all.size());
    const std::string word = all.substr(begin, end - begin);
    const std::string longer = lines.back().empty() ? word : lines.back() + " " + word;
    if (text_width(longer) > width && !lines.back().empty()) {
      lines.push_back(word);
    } else {
      lines.back() = longer;
    }
    begin = end + 1;
  }
  return lines;
}

std::string in_percent(double share) {
  char text[16];
  std::snprintf(text, sizeof text, "%.0f %%", 100 * share);
  return text;
}

// A page that grows downwards.
class Page {
 public:
  explicit Page(int64_t width) : width_(width) {}

  int64_t width() const { return width_; }
  int64_t cursor = kMargin;  // where the next row begins

  void fill(int64_t x, int64_t y, int64_t width, int64_t height, Colour colour) {
    reserve(y + height);
    for (int64_t row = y; row < y + height; ++row) {
      for (int64_t column = x; column < std::min(x + width, width_); ++column) {
        blend(column, row, colour, 1.0f);
      }
    }
  }

  void text(int64_t x, int64_t y, std::string_view ascii, Colour colour) {
    reserve(y + kGlyphHeight);
    for (const char c : ascii) {
      const Glyph& glyph = glyphs()[static_cast<size_t>(c - 32)];
      for (int64_t i = 0; i < glyph.width * kGlyphHeight; ++i) {
        const char digit = glyph.coverage[static_cast<size_t>(i)];
        const int level = digit <= '9' ? digit - '0' : digit - 'a' + 10;
        const int64_t column = x + i % glyph.width;
        if (level > 0 && column < width_) {
          blend(column, y + i / glyph.width, colour, static_cast<float>(level) / 15.0f);
        }
      }
      x += glyph.advance;
    }
  }

  // picture: [h, w, 3] float32 in 0..1
  void picture(int64_t x, int64_t y, const at::Tensor& picture) {
    reserve(y + picture.size(0));
    const at::Tensor pixels = picture.contiguous();
    const float* from = pixels.const_data_ptr<float>();
    for (int64_t row = 0; row < pixels.size(0); ++row) {
      for (int64_t column = 0; column < pixels.size(1); ++column, from += 3) {
        if (x + column < width_) blend(x + column, y + row, {from[0], from[1], from[2]}, 1.0f);
      }
    }
  }

  // [height, width, 3], the rest of a shorter page left white
  at::Tensor finish(int64_t height) {
    reserve(height);
    return at::from_blob(pixels_.data(), {height, width_, 3}, at::TensorOptions(at::kFloat))
        .clone();
  }
  int64_t height() const { return std::max(height_, cursor) + kMargin; }

 private:
  void reserve(int64_t height) {
    height_ = std::max(height_, height);
    const auto size = static_cast<size_t>(3 * height_ * width_);
    if (pixels_.size() < size) pixels_.resize(size, 1.0f);
  }
  void blend(int64_t x, int64_t y, Colour colour, float weight) {
    float* pixel = &pixels_[static_cast<size_t>(3 * (y * width_ + x))];
    pixel[0] += weight * (colour.red - pixel[0]);
    pixel[1] += weight * (colour.green - pixel[1]);
    pixel[2] += weight * (colour.blue - pixel[2]);
  }

  int64_t width_;
  int64_t height_ = 0;
  std::vector<float> pixels_;
};

void write_lines(Page& page, const std::string& text) {
  for (const std::string& line : wrapped(text, page.width() - 2 * kMargin)) {
    page.text(kMargin, page.cursor, line, kInk);
    page.cursor += kLine;
  }
}

void write_heading(Page& page, const std::string& left, const std::string& right) {
  page.cursor += kLine / 3;
  page.fill(0, page.cursor, page.width(), kLine + 8, kBar);
  page.text(kMargin, page.cursor + 4, drawable(left), kInk);
  const std::string end = drawable(right);
  page.text(page.width() - kMargin - text_width(end), page.cursor + 4, end, kInk);
  page.cursor += kLine + 16;
}

// A picture as shown: small ones with visible pixels, large ones averaged down.
at::Tensor tile(const at::Tensor& picture) {
  const at::Tensor pixels = picture.to(at::kFloat) / 255;
  const int64_t height = pixels.size(0), width = pixels.size(1);
  const int64_t longer = std::max(height, width);
  if (longer < kSmallestTile) {
    const int64_t factor = (kSmallestTile + longer - 1) / longer;
    return pixels.repeat_interleave(factor, 0).repeat_interleave(factor, 1);
  }
  const int64_t shown = std::min(longer, kLargestTile);
  return at::adaptive_avg_pool2d(pixels.permute({2, 0, 1}).unsqueeze(0),
                                 {std::max<int64_t>(1, height * shown / longer),
                                  std::max<int64_t>(1, width * shown / longer)})[0]
      .permute({1, 2, 0});
}

std::string what_is_seen(PromptList list, bool seen) {
  if (should_vanish(list)) return seen ? "after: still there" : "after: gone";
  return seen ? "after: kept" : "after: lost";
}

std::string in_numbers(const PicturePair& pair) {
  std::string text;
  if (!pair.detector_error.empty()) {
    text = "detector failed, ";
  } else if (!std::isnan(pair.score_after)) {
    char scores[48];
    std::snprintf(scores, sizeof scores, "score %.2f > %.2f, ", pair.score_before,
                  pair.score_after);
    text = scores;
  }
  return text +
         (std::isnan(pair.latent_change) ? "broken" : in_percent(pair.latent_change) + " changed");
}

void draw_pair(Page& page, int64_t x, const Evaluation& evaluation, size_t index) {
  const PicturePair& pair = evaluation.pairs[index];
  const EvaluationPrompt& prompt = evaluation.prompts[pair.prompt];
  const at::Tensor before = tile(evaluation.before[static_cast<int64_t>(index)]);
  const at::Tensor after = tile(evaluation.after[static_cast<int64_t>(index)]);
  const int64_t width = before.size(1) + 2 * kFrame, height = before.size(0) + 2 * kFrame;
  const bool wanted = should_vanish(prompt.list) != pair.seen_after;
  int64_t y = page.cursor;
  const std::string attack =
      prompt.attack ? std::string(to_string(*prompt.attack)) + ": " : std::string();
  page.text(x, y, fitted(attack + prompt.text, 2 * width), kInk);
  y += kLine;
  page.fill(x, y, width, height, kBar);
  page.picture(x + kFrame, y + kFrame, before);
  page.fill(x + width, y, width, height, wanted ? kWanted : kUnwanted);
  page.picture(x + width + kFrame, y + kFrame, after);
  y += height + 2;
  page.text(x, y, pair.seen_before ? "before: seen" : "before: not seen", kInk);
  page.text(x + width, y, fitted(what_is_seen(prompt.list, pair.seen_after), width),
            wanted ? kWanted : kUnwanted);
  page.text(x, y + kLine, fitted(in_numbers(pair), 2 * width), kInk);
}

void draw_list(Page& page, const Evaluation& evaluation, const ListSummary& list,
               const std::string& title) {
  std::vector<size_t> pairs;
  for (size_t i = 0; i < evaluation.pairs.size(); ++i) {
    const EvaluationPrompt& prompt = evaluation.prompts[evaluation.pairs[i].prompt];
    if (prompt.list == list.list &&
        (list.concept_index < 0 || prompt.concept_index == list.concept_index)) {
      pairs.push_back(i);
    }
  }
  if (pairs.empty()) return;
  const at::Tensor sample = tile(evaluation.before[0]);
  const int64_t cell = 2 * (sample.size(1) + 2 * kFrame);
  const int64_t columns = std::max<int64_t>(1, (page.width() - kMargin) / (cell + kMargin));
  const auto count = static_cast<int64_t>(pairs.size());
  const int64_t shown = std::min(count, kRowsOfList * columns);
  const Count hits = list.hits();
  const Interval interval = wilson_interval(hits);
  write_heading(page,
                title + (shown < count ? " (" + std::to_string(shown) + " of " +
                                             std::to_string(count) + " pairs shown)"
                                       : ""),
                std::to_string(hits.hits) + " of " + std::to_string(hits.trials) +
                    (should_vanish(list.list) ? " gone" : " kept") + ", 95 % interval " +
                    in_percent(interval.low) + " to " + in_percent(interval.high));
  for (int64_t i = 0; i < shown; ++i) {
    const int64_t column = i % columns;
    draw_pair(page, kMargin + column * (cell + kMargin), evaluation,
              pairs[static_cast<size_t>(i * count / shown)]);
    if (column + 1 == columns || i + 1 == shown) {
      page.cursor += sample.size(0) + 2 * kFrame + 3 * kLine + 12;
    }
  }
}

void draw_bar(Page& page, const std::string& label, double share, Colour colour) {
  constexpr int64_t kLabel = 330, kFull = 600;
  page.text(kMargin, page.cursor, fitted(label, kLabel - kMargin), kInk);
  page.fill(kLabel, page.cursor + 3, kFull, kLine - 8, kBar);
  const double drawn = std::isfinite(share) ? std::clamp(share, 0.0, 1.0) : 1.0;
  page.fill(kLabel, page.cursor + 3, static_cast<int64_t>(std::lround(kFull * drawn)), kLine - 8,
            colour);
  page.text(kLabel + kFull + kMargin, page.cursor, in_percent(share), kInk);
  page.cursor += kLine;
}

void draw_gate(Page& page, const GateScan& gate, size_t index) {
  const ConceptGate& item = gate.concepts[index];
  write_heading(page, "On which prompts with '" + item.target + "' the edit acts",
                "100 %: on all of them");
  for (const GateCount& form : item.named) {
    draw_bar(page, form.form, form.acted.share(), kWanted);
  }
  draw_bar(page, "typing errors, descriptions", item.disguised.acted.share(), kWanted);
  if (index > 0 || gate.others.empty()) return;
  write_heading(page, "On which prompts without a concept it acts", "0 %: on none of them");
  for (const GateCount& other : gate.others) {
    draw_bar(page, other.form, other.acted.share(), kUnwanted);
  }
}

void draw_preflight(Page& page, const Evaluation& evaluation, size_t index) {
  if (evaluation.gate.gated && !evaluation.scan.weights_differ) {
    draw_gate(page, evaluation.gate, index);
    return;
  }
  const ConceptResidual& item = evaluation.scan.concepts[index];
  write_heading(page, "What is left of '" + item.target + "' in what the model reads",
                "0 %: as the anchor, 100 %: as before");
  for (const PhraseResidual& phrase : item.phrases) {
    draw_bar(page, "'" + phrase.phrase + "' (" + phrase.form + ")", phrase.remaining, kUnwanted);
  }
  if (!item.leaks.empty()) {
    write_heading(page, "Words that still carry most of it", "share of the concept");
    for (const WordContent& leak : item.leaks) {
      draw_bar(page, "'" + leak.word + "'", leak.after, kUnwanted);
    }
  }
  if (index > 0) return;
  if (!evaluation.scan.preserved.empty() || !evaluation.scan.neighbours.empty()) {
    write_heading(page, "How far words drift that should stay", "0 %: not at all");
    for (const WordDrift& word : evaluation.scan.preserved) {
      draw_bar(page, "'" + word.word + "' (preserved)", word.drift, kWanted);
    }
    for (const WordDrift& word : evaluation.scan.neighbours) {
      draw_bar(page, "'" + word.word + "' (similar, not listed)", word.drift, kWanted);
    }
  }
}

Page draw_page(const Evaluation& evaluation, const EvaluationSummary& summary, size_t index) {
  Page page(kPageWidth);
  const std::vector<Concept>& concepts = evaluation.concepts.concepts;
  for (const std::string& line : summary.verdict) {
    // What is said of other concepts stands on their pages.
    const bool of_another = std::any_of(concepts.begin(), concepts.end(), [&](const Concept& item) {
      return item.target != concepts[index].target && line.starts_with("'" + item.target + "'") &&
             !line.starts_with("'" + concepts[index].target + "'");
    });
    if (!of_another) write_lines(page, line);
  }
  if (evaluation.pairs.empty()) {
    draw_preflight(page, evaluation, index);
    return page;
  }
  const std::string& target = concepts[index].target;
  const auto number = static_cast<int64_t>(index);
  if (const ListSummary* list = find_list(summary, PromptList::kTarget, number)) {
    draw_list(page, evaluation, *list, "Erased: '" + target + "'");
  }
  if (const ListSummary* list = find_list(summary, PromptList::kSynonyms, number)) {
    draw_list(page, evaluation, *list, "'" + target + "' under other words");
  }
  if (const ListSummary* list = find_list(summary, PromptList::kAttacks, number)) {
    draw_list(page, evaluation, *list, "'" + target + "' under attack");
  }
  if (const ListSummary* list = find_list(summary, PromptList::kFile, number)) {
    draw_list(page, evaluation, *list, "'" + target + "' in the prompt file");
  }
  if (index > 0) return page;
  for (const auto& [list, title] : {std::pair{PromptList::kPreserved, "Listed as preserved"},
                                    std::pair{PromptList::kNeighbours, "Similar, and never listed"},
                                    std::pair{PromptList::kUnrelated, "Unrelated captions"}}) {
    if (const ListSummary* found = find_list(summary, list, -1)) {
      draw_list(page, evaluation, *found, title);
    }
  }
  return page;
}

}  // namespace

at::Tensor draw_contact_sheet(const Evaluation& evaluation, const EvaluationSummary& summary) {
  const size_t count = std::min<size_t>(evaluation.concepts.concepts.size(), kMostPages);
  std::vector<Page> pages;
  int64_t height = 0;
  for (size_t i = 0; i < count; ++i) {
    pages.push_back(draw_page(evaluation, summary, i));
    height = std::max(height, pages.back().height());
  }
  std::vector<at::Tensor> images;
  for (Page& page : pages) images.push_back(page.finish(height));
  return at::stack(images);
}

}  // namespace lacuna
