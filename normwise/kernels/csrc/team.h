// Work for several threads, and memory for what they leave behind.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "call.h"

namespace {

using normwise::Team;

// Call body(item) for every item, by the team's threads.
template <class Body>
void each(const Team& team, int64_t items, Body body) {
  if (team.threads <= 1 || items <= 1) {
    for (int64_t item = 0; item < items; ++item) body(item);
    return;
  }
  team.run(team, items, [](void* context, int64_t item) { (*static_cast<Body*>(context))(item); }, &body);
}

// n elements that are not initialized; `data` is null if there is no memory.
template <class E>
struct Scratch {
  E* data;
  explicit Scratch(int64_t n) : data(static_cast<E*>(std::malloc(n > 0 ? n * sizeof(E) : 1))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

inline int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

}  // namespace
