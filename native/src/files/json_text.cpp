// SPDX-License-Identifier: Apache-2.0
#include "lacuna/files/json_text.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <type_traits>
#include <utility>
#include <vector>

#include "lacuna/error.h"
#include "lacuna/files/text.h"

namespace lacuna {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

constexpr size_t kMostOrderedMembers = 1'000;

// nlohmann's parser calls this for everything it reads. It has a handler of its own that builds
// values, but with a callback that one searches a parent again for every child, and without a
// callback it knows no limits.
template <typename Json>
class JsonBuilder {
 public:
  using OnMember = std::function<void(const std::string&, const Json&)>;

  // With `on_member`, the members of the outermost object go there and are not kept.
  JsonBuilder(std::string_view text, const std::string& what, const JsonLimits& limits,
              const OnMember* on_member)
      : text_(text), what_(what), limits_(limits), on_member_(on_member) {}

  Json take() { return std::move(root_); }

  bool null() { return add(nullptr); }
  bool boolean(bool value) { return add(value); }
  bool number_integer(int64_t value) { return add(value); }
  bool number_unsigned(uint64_t value) { return add(value); }
  bool number_float(double value, const std::string&) { return add(value); }
  bool string(std::string& value) { return add(std::move(value)); }
  bool binary(std::vector<uint8_t>&) { return false; }  // not in text

  bool start_object(size_t) { return open(Json::object()); }
  bool start_array(size_t) { return open(Json::array()); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }

  bool key(std::string& name) {
    if constexpr (std::is_same_v<Json, ordered_json>) {
      if (open_.back()->size() >= kMostOrderedMembers) {
        throw Error(what_ + " has more than " + std::to_string(kMostOrderedMembers) +
                    " members in one object");
      }
    }
    name_ = std::move(name);
    return true;
  }

  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception& e) {
    // The parser's own words hold what it read last, which may be megabytes, or half a character.
    const size_t end = std::min(position, text_.size());
    const std::string_view before = text_.substr(0, end > 0 ? end - 1 : 0);
    const auto line = 1 + std::count(before.begin(), before.end(), '\n');
    const std::string_view in_line = before.substr(before.rfind('\n') + 1);
    throw Error(what_ + " cannot be read as JSON: line " + std::to_string(line) + ", column " +
                std::to_string(count_characters(in_line) + 1) + " " + reason(position, before, e));
  }

 private:
  std::string reason(size_t position, std::string_view before,
                     const nlohmann::detail::exception& e) const {
    if (e.id == 406) return "holds a number that is too large";
    if (position > text_.size() || text_.empty()) return "is where it breaks off";
    // From the last byte that was read, back to the beginning of its character.
    size_t begin = before.size();
    while (begin > 0 && (static_cast<unsigned char>(text_[begin]) & 0xc0) == 0x80) --begin;
    const std::string_view rest = text_.substr(begin);
    for (const std::string_view curly : {"“", "”", "„", "‘", "’", "«", "»", "'"}) {
      if (rest.starts_with(curly)) {
        return "has the quote " + std::string(curly) + "; JSON needs straight double ones (\")";
      }
    }
    return "does not go on as JSON does, at " + in_quotes(rest, 20);
  }

  void count() {
    if (++values_ > limits_.values) {
      throw Error(what_ + " has more than " + std::to_string(limits_.values) + " values");
    }
  }

  // Where the value that comes next belongs.
  Json* place(Json&& value) {
    count();
    if (open_.empty()) return &(root_ = std::move(value));
    Json& parent = *open_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    // With on_member the outermost object stays empty, and each member is built in `member_`.
    if (on_member_ != nullptr && open_.size() == 1) {
      member_name_ = std::move(name_);
      return &(member_ = std::move(value));
    }
    if (limits_.unique && parent.contains(name_)) throw named_twice();
    return &(parent[std::move(name_)] = std::move(value));
  }

  void finished() {
    if (on_member_ == nullptr || open_.size() != 1) return;
    (*on_member_)(member_name_, member_);
    values_ = 0;
  }

  bool add(Json&& value) {
    if (on_member_ != nullptr && open_.empty()) throw not_an_object();
    place(std::move(value));
    finished();
    return true;
  }

  bool open(Json&& value) {
    if (on_member_ != nullptr && open_.empty() && !value.is_object()) throw not_an_object();
    if (open_.size() >= limits_.depth) throw Error(what_ + " is nested too deeply");
    // A parent's list does not grow while a child is open, so that the pointers stay.
    open_.push_back(place(std::move(value)));
    return true;
  }

  bool close() {
    open_.pop_back();
    finished();
    return true;
  }

  Error named_twice() const {
    std::string place;
    for (const Json* parent : open_) {
      if (parent->is_array()) place = ", entry " + std::to_string(parent->size()) + " of a list,";
    }
    return Error(what_ + place + " has the member " + in_quotes(name_) +
                 " twice in one object; remove one of them");
  }

  Error not_an_object() const { return Error(what_ + " is not an object"); }

  std::string_view text_;
  const std::string& what_;
  const JsonLimits limits_;
  const OnMember* on_member_;
  Json root_;
  Json member_;
  std::string member_name_;
  std::string name_;
  std::vector<Json*> open_;
  size_t values_ = 0;
};

template <typename Json>
Json built(std::string_view text, const std::string& what, const JsonLimits& limits,
           const typename JsonBuilder<Json>::OnMember* on_member = nullptr) {
  if (!is_utf8(text)) throw Error(what + " is not text in UTF-8");
  JsonBuilder<Json> builder(text, what, limits, on_member);
  Json::sax_parse(text, &builder);
  return builder.take();
}

}  // namespace

json parse_json(std::string_view text, const std::string& what, const JsonLimits& limits) {
  return built<json>(text, what, limits);
}

ordered_json parse_ordered_json(std::string_view text, const std::string& what,
                                const JsonLimits& limits) {
  return built<ordered_json>(text, what, limits);
}

void parse_json_members(
    std::string_view text, const std::string& what, const JsonLimits& limits,
    const std::function<void(const std::string& name, const json& value)>& on_member) {
  built<json>(text, what, limits, &on_member);
}

}  // namespace lacuna
