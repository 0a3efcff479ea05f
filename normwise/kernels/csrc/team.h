// Work for several threads, and memory for what they leave behind.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "call.h"

namespace {

using normwise::Team;

// Call body(item) for every item, by the team's threads; `from_last` finds in the cache what was done last.
template <class Body>
void each(const Team& team, int64_t items, Body body, bool from_last = false) {
  if (team.threads <= 1 || items <= 1) {
    for (int64_t i = 0; i < items; ++i) body(from_last ? items - 1 - i : i);
    return;
  }
  const auto call = [](void* context, int64_t item) { (*static_cast<Body*>(context))(item); };
  team.run(team, items, from_last, call, &body);
}

constexpr int64_t kLine = 64;  // bytes of a cache line: vectors that cross one cost twice

inline int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The next number of elements of four bytes that fills cache lines.
inline int64_t padded(int64_t n) { return divided_up(n, kLine / 4) * (kLine / 4); }

// n elements that are not initialized, from the start of a cache line; `data` is null if there is no memory.
template <class E>
struct Scratch {
  E* data;
  explicit Scratch(int64_t n)
      : data(static_cast<E*>(std::aligned_alloc(kLine, divided_up(n > 0 ? n * sizeof(E) : 1, kLine) * kLine))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace
