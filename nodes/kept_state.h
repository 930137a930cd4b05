// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mutex>
#include <optional>
#include <utility>

namespace lacuna {

// What a node keeps from one run to the next to save work. A run borrows it whole; a second run
// beside it, in another thread or started by a callback of the first, begins with an empty one, and
// what is given back last is kept. Nobody waits: a lock held during a run would be held while the
// host is called, which may wait for another thread of its own (in Python, for the GIL).
template <typename T>
class KeptState {
 public:
  class Loan {
   public:
    Loan(KeptState& owner, T value) : owner_(owner), value_(std::move(value)) {}
    ~Loan() {
      std::optional<T> replaced(std::move(value_));
      const std::lock_guard lock(owner_.mutex_);
      owner_.kept_.swap(replaced);
    }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    T& operator*() { return value_; }
    T* operator->() { return &value_; }

   private:
    KeptState& owner_;
    T value_;
  };

  // empty...: arguments of T, for when nothing is kept or it is lent out.
  template <typename... Args>
  Loan borrow(const Args&... empty) {
    std::optional<T> kept;
    {
      const std::lock_guard lock(mutex_);
      kept.swap(kept_);
    }
    return Loan(*this, kept ? std::move(*kept) : T(empty...));
  }

 private:
  std::mutex mutex_;
  std::optional<T> kept_;
};

}  // namespace lacuna
