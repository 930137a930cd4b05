// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace lacuna {

// A few weights of every matrix, as the host stores them, at places that follow from the matrix's
// size alone. By a name that is the same in every host.
using WeightSamples = std::map<std::string, std::vector<float>>;

// What a set of weights is known by: a hash of their exact values (empty: unknown; behind a '-' the
// hash of what was done to them: clip skip, LoRAs), and samples (empty: not known).
struct WeightIdentity {
  std::string fingerprint;
  WeightSamples samples;
};

// How far two sets of weights are apart, seen through the coarser of the two types they are stored
// in (found from the values themselves). Rounding both to one grid before comparing takes rounding
// out of the mean: equal weights stay equal however coarse the grid is, and different ones keep
// their mean distance, because each crosses a border between two grid points in proportion.
struct WeightDistance {
  double difference = 0.0;  // mean |a - b| over mean |a|
  double rounding = 0.0;    // the most that conversions between weight types can explain

  bool same() const { return difference <= rounding; }
};

// Throws nothing; weights of another architecture are at distance 1.
WeightDistance distance_between(const WeightSamples& a, const WeightSamples& b);

// The coarsest type that holds all of these: "fp8_e5m2", "fp8_e4m3", "bf16", "fp16", "fp32".
std::string_view weight_type_of(const WeightSamples& samples);

enum class WeightMatch {
  kSame,         // equal hashes, one of them unknown, or equal as far as the weight types can tell
  kDifferent,    // in their weights
  kOtherState,   // the same weights with another clip skip or other LoRAs
  kUnknownType,  // the hashes differ, and there are no samples: other weights, or another type
};

struct WeightComparison {
  WeightMatch match = WeightMatch::kSame;
  WeightDistance distance;  // where samples were compared
};

WeightComparison compare(const WeightIdentity& a, const WeightIdentity& b);

// Both by name and how they differ, for the middle of a sentence: "3f2a9c81 in fp16 and 77d0be12 in
// fp8_e4m3, 3.1 % apart where rounding explains 0.3 %".
std::string describe(const WeightIdentity& a, const WeightIdentity& b, const WeightComparison& how);

// "3f2a9c81 in fp16": short enough to be compared by eye.
std::string short_name(const WeightIdentity& identity);

// One line a matrix: its name, a space, eight hex digits (IEEE float32) a value. Exact both ways.
std::string to_text(const WeightSamples& samples);
// Throws Error when the text is not of that form.
WeightSamples weight_samples_from_text(std::string_view text);

}  // namespace lacuna
