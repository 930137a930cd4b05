// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <nlohmann/json.hpp>

#include "lacuna/error.h"
#include "lacuna/evaluation/evaluation_report.h"
#include "lacuna/files/json_text.h"

namespace lacuna {
namespace {

using nlohmann::ordered_json;

// A report names every picture: a million of them are a large evaluation.
constexpr JsonLimits kReportLimits{.depth = 16, .values = 50'000'000};

std::string escape(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string base64(std::string_view bytes) {
  constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t group = 0;
    for (size_t k = 0; k < 3; ++k) {
      group = group << 8 | (i + k < bytes.size() ? static_cast<unsigned char>(bytes[i + k]) : 0u);
    }
    for (size_t k = 0; k < 4; ++k) {
      out += i + k <= bytes.size() ? kDigits[group >> (18 - 6 * k) & 63] : '=';
    }
  }
  return out;
}

std::string whole_percent(double share) {
  char text[16];
  std::snprintf(text, sizeof text, "%.0f", 100 * share);
  return text;
}

std::string text_of(const ordered_json& value) {
  if (value.is_null()) return "-";
  if (value.is_string()) return escape(value.get<std::string>());
  if (value.is_number_float()) {
    char text[32];
    std::snprintf(text, sizeof text, "%.3g", value.get<double>());
    return text;
  }
  return escape(value.dump());
}

std::string table(const std::vector<std::string>& head,
                  const std::vector<std::vector<std::string>>& rows) {
  std::string out = "<table><tr>";
  for (const std::string& cell : head) out += "<th>" + cell + "</th>";
  out += "</tr>";
  for (const std::vector<std::string>& row : rows) {
    out += "<tr>";
    for (const std::string& cell : row) out += "<td>" + cell + "</td>";
    out += "</tr>";
  }
  return out + "</table>\n";
}

// A share with its interval on a line from 0 to 100 %.
std::string plot(double low, double value, double high) {
  char text[500];
  std::snprintf(text, sizeof text,
                "<svg width=\"220\" height=\"16\" role=\"img\"><line x1=\"10\" y1=\"8\" x2=\"210\" "
                "y2=\"8\" stroke=\"#ccc\"/><line x1=\"%.1f\" y1=\"8\" x2=\"%.1f\" y2=\"8\" "
                "stroke=\"#0072b2\" stroke-width=\"5\"/><circle cx=\"%.1f\" cy=\"8\" r=\"5\" "
                "fill=\"#d55e00\"/></svg>",
                10 + 200 * low, 10 + 200 * high, 10 + 200 * value);
  return text;
}

std::string lists_table(const ordered_json& lists) {
  std::vector<std::vector<std::string>> rows;
  for (const ordered_json& list : lists) {
    const auto hits = list.at("hits").at(0).get<double>();
    const auto trials = list.at("hits").at(1).get<double>();
    if (trials == 0) continue;
    const auto low = list.at("interval").at(0).get<double>();
    const auto high = list.at("interval").at(1).get<double>();
    const ordered_json& change = list.at("latent_change");
    const auto fraction = [](const ordered_json& pair) {
      return text_of(pair.at(0)) + " of " + text_of(pair.at(1));
    };
    rows.push_back({list.at("concept").is_null() ? "all" : text_of(list.at("concept")),
                    text_of(list.at("list")), fraction(list.at("hits")),
                    plot(low, hits / trials, high),
                    whole_percent(low) + " to " + whole_percent(high) + " %",
                    fraction(list.at("seen_before")) + " / " + fraction(list.at("seen_after")),
                    text_of(list.at("mcnemar_p_holm")),
                    text_of(change.at("mean")) + " (" + text_of(change.at("interval").at(0)) +
                        " to " + text_of(change.at("interval").at(1)) + ")",
                    text_of(list.at("attention_ratio")), text_of(list.at("noise_gap_ratio"))});
  }
  return table({"concept", "list", "as wanted", "share with its 95 % interval", "interval",
                "seen before / after", "p (McNemar, Holm)", "change of pictures", "attention left",
                "noise gap left"},
               rows);
}

std::string benchmark_table(const ordered_json& lines) {
  std::vector<std::vector<std::string>> rows;
  for (const ordered_json& line : lines) {
    rows.push_back(
        {text_of(line.at("line")) + ", " + text_of(line.at("better")) + " is better",
         text_of(line.at("before")), text_of(line.at("after")),
         text_of(line.at("interval").at(0)) + " to " + text_of(line.at("interval").at(1)),
         text_of(line.at("pictures"))});
  }
  return table({"line", "before", "after", "interval", "pictures"}, rows);
}

std::string scan_tables(const ordered_json& scan) {
  std::string out;
  for (const ordered_json& item : scan.at("concepts")) {
    out += "<h3>" + text_of(item.at("target")) + "</h3>";
    std::vector<std::vector<std::string>> rows;
    for (const ordered_json& phrase : item.at("phrases")) {
      rows.push_back({text_of(phrase.at("phrase")), text_of(phrase.at("form")),
                      text_of(phrase.at("remaining"))});
    }
    out += table({"phrase", "form", "left of its distance to the anchor"}, rows);
    rows.clear();
    for (const ordered_json& leak : item.at("leaks")) {
      rows.push_back({text_of(leak.at("word")), text_of(leak.at("content_before")),
                      text_of(leak.at("content_after"))});
    }
    if (!rows.empty()) {
      out += table({"words that still carry it", "share before", "share after"}, rows);
    }
  }
  std::vector<std::vector<std::string>> rows;
  for (const char* key : {"preserved", "neighbours"}) {
    for (const ordered_json& word : scan.at(key)) {
      rows.push_back({text_of(word.at("word")), key, text_of(word.at("drift"))});
    }
  }
  if (!rows.empty()) out += "<h3>What should stay</h3>" + table({"word", "list", "drift"}, rows);
  return out;
}

std::string gate_table(const ordered_json& gate) {
  std::vector<std::vector<std::string>> rows;
  const auto add = [&](const std::string& target, const ordered_json& count, bool should_act) {
    std::string wrong;
    for (const ordered_json& prompt : count.at("wrong")) {
      wrong += (wrong.empty() ? "" : "; ") + text_of(prompt);
    }
    const std::string acted =
        text_of(count.at("acted").at(0)) + " of " + text_of(count.at("acted").at(1));
    rows.push_back(
        {target, text_of(count.at("prompts")), should_act ? "yes" : "no", acted,
         text_of(count.at("interval").at(0)) + " to " + text_of(count.at("interval").at(1)),
         wrong});
  };
  for (const ordered_json& item : gate.at("concepts")) {
    for (const ordered_json& form : item.at("named")) add(text_of(item.at("target")), form, true);
    add(text_of(item.at("target")), item.at("disguised"), true);
  }
  for (const ordered_json& item : gate.at("others")) add("", item, false);
  return table({"concept", "prompts", "should act", "acts on", "interval", "wrong"}, rows);
}

std::string failing_table(const ordered_json& failing) {
  std::vector<std::vector<std::string>> rows;
  for (const ordered_json& item : failing) {
    rows.push_back({text_of(item.at("concept")), text_of(item.at("list")),
                    text_of(item.at("attack")), text_of(item.at("prompt")),
                    text_of(item.at("back").at(0)) + " of " + text_of(item.at("back").at(1))});
  }
  return table({"concept", "list", "attack", "prompt", "pictures that still show it"}, rows);
}

}  // namespace

std::string to_html(std::string_view json, const std::vector<std::string>& pages) {
  try {
    const ordered_json root = parse_ordered_json(json, "the report", kReportLimits);
    if (root.at("format") != "lacuna.evaluation/1") {
      throw Error("this is not a report of Evaluate Erasure (format lacuna.evaluation/1)");
    }
    std::string out =
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Lacuna: Evaluate "
        "Erasure</title>\n<style>body{font:16px/1.5 sans-serif;max-width:1200px;margin:2em auto;"
        "padding:0 1em}table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;"
        "padding:.2em .6em;text-align:left}img{max-width:100%}.verdict{font-size:1.15em}"
        "</style></head><body>\n<h1>Evaluate Erasure</h1>\n<div class=\"verdict\">";
    for (const ordered_json& line : root.at("verdict")) out += "<p>" + text_of(line) + "</p>\n";
    out += "</div>\n";
    for (const std::string& page : pages) {
      out += "<p><img alt=\"pictures before and after the edit\" src=\"data:image/png;base64," +
             base64(page) + "\"></p>\n";
    }
    if (!root.at("lists").empty()) out += "<h2>Results</h2>\n" + lists_table(root.at("lists"));
    if (!root.at("failing_prompts").empty()) {
      out += "<h2>Prompts that still show what should be gone</h2>\n" +
             failing_table(root.at("failing_prompts"));
    }
    if (!root.at("benchmarks").empty()) {
      out += "<h2>Under the names of published benchmarks</h2>\n" +
             benchmark_table(root.at("benchmarks"));
    }
    // Reports of earlier versions know no gate.
    if (const auto gate = root.find("gate"); gate != root.end() && !gate->is_null()) {
      out += "<h2>Where the edit acts</h2>\n" + gate_table(*gate);
    }
    out += "<h2>What the weights say</h2>\n" + scan_tables(root.at("preflight"));
    out += "<h2>Protocol</h2>\n";
    std::vector<std::vector<std::string>> rows;
    for (const auto& [key, value] : root.at("protocol").items()) {
      rows.push_back({escape(key), key == "concepts" ? "<pre>" + escape(value.dump(1)) + "</pre>"
                                                     : text_of(value)});
    }
    return out + table({"", ""}, rows) + "</body></html>\n";
  } catch (const ordered_json::exception& e) {
    throw Error(std::string("the report cannot be read: ") + e.what());
  }
}

}  // namespace lacuna
