// How a batch's statistics enter a memory, and how they are read from it: commit.py's arithmetic for one number a
// column.
#pragma once

#include <cmath>
#include <cstdint>

namespace normwise {

// The buffers of a memory, (columns,) each.
struct Memory {
  float* mean;       // null where no mean is remembered
  float* spread;     // variances, or mean squares
  int64_t* batches;  // one number; null: nobody counts
  int64_t columns;
};

// What a batch brings.
struct Entry {
  const double* mean;
  const double* m2;
  double divisor;  // of m2: the number of samples, or one less

  float mean_of(int64_t column) const { return static_cast<float>(mean[column]); }
  float spread_of(int64_t column) const { return static_cast<float>(m2[column] / divisor); }
};

inline bool is_finite(const Entry& entry, const Memory& memory) {
  for (int64_t c = 0; c < memory.columns; ++c) {
    if (!std::isfinite(entry.spread_of(c)) || (memory.mean && !std::isfinite(entry.mean_of(c)))) return false;
  }
  return true;
}

// old * (1 - rate) + new * rate, each product and the sum rounded to float. A negative rate: one over the number of
// batches. False, and nothing is touched, if a statistic is not finite.
inline bool commit(const Entry& entry, double rate, const Memory& memory) {
  if (!is_finite(entry, memory)) return false;
  const float taken = rate < 0 ? 1.0f / static_cast<float>(*memory.batches + 1) : static_cast<float>(rate);
  const float kept = rate < 0 ? 1.0f - taken : static_cast<float>(1 - rate);
  for (int64_t c = 0; c < memory.columns; ++c) {
    if (memory.mean) memory.mean[c] = memory.mean[c] * kept + entry.mean_of(c) * taken;
    memory.spread[c] = memory.spread[c] * kept + entry.spread_of(c) * taken;
  }
  if (memory.batches) ++*memory.batches;
  return true;
}

// Rows of inverse, mean and spread, as a kernel that is given statistics reads them.
inline void recall(const Memory& memory, double eps, double* rows) {
  for (int64_t c = 0; c < memory.columns; ++c) {
    const double spread = memory.spread[c];
    rows[c] = 1 / std::sqrt(spread + eps);
    rows[memory.columns + c] = memory.mean ? memory.mean[c] : 0;
    rows[2 * memory.columns + c] = spread;
  }
}

}  // namespace normwise
