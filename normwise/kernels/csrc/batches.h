// Columns whose samples lie in contiguous runs, and how threads have them: in batches of neighbouring columns, whose
// statistics are finished side by side. The second look at a batch hits the cache.
#pragma once

#include "call.h"
#include "column.h"
#include "team.h"
#include "vectors.h"

namespace {

constexpr int kBatch = 8;                 // columns of a batch at most
constexpr int64_t kItem = 16384;          // elements that are worth a thread's while
constexpr int64_t kTogether = 4096;       // elements of a batch whose columns follow one another, in the forward
constexpr int64_t kPrefetched = 1 << 18;  // bytes of a batch that leave room in the cache for the next one
constexpr int64_t kFetched = 1 << 19;     // bytes of a batch that leave room in the cache for its output

// Where the runs of one column are, and what is read beside them.
template <class T>
struct RunsOf {
  const Call& call;
  int64_t a, k;

  RunsOf(const Call& c, int64_t column)
      : call(c), a(c.k1 == 1 ? column : column / c.k1), k(c.k1 == 1 ? 0 : column % c.k1) {}
  RunsOf(const Call& c, int64_t a_, int64_t k_) : call(c), a(a_), k(k_) {}

  int64_t at(int64_t r) const { return ((a * call.r0 + r) * call.k1 + k) * call.r1; }
  // A run that one byte of the mask leaves out.
  bool is_out(const uint8_t* mask, int64_t r) const { return mask && !call.mask_r1 && !mask[call.mask_at(a, r, k, 0)]; }
  const uint8_t* mask_of(const uint8_t* mask, int64_t r) const { return mask + call.mask_at(a, r, k, 0); }

  // The first element that counts; 0 if none does.
  double shift(const T* x, const uint8_t* mask) const {
    if (!mask) return to_float(x[at(0)]);
    for (int64_t r = 0; r < call.r0; ++r)
      for (int64_t s = 0; s < call.r1; ++s)
        if (mask[call.mask_at(a, r, k, s)]) return to_float(x[at(r) + s]);
    return 0;
  }

  // Sums as doubles, one element after another.
  Sums exact_sums(const T* x, const uint8_t* mask, double shift) const {
    Sums sums;
    for (int64_t r = 0; r < call.r0; ++r)
      for (int64_t s = 0; s < call.r1; ++s) {
        if (mask && !mask[call.mask_at(a, r, k, s)]) continue;
        const double d = double(to_float(x[at(r) + s])) - shift;
        sums += {d, d * d, 1};
      }
    return sums;
  }
};

// A few neighbouring columns.
struct Batch {
  int64_t first;
  int size;
  int64_t starts[kBatch];  // where their first runs begin
  int64_t places[kBatch];  // where the weights of their first runs lie
  int64_t ahead;           // how far behind each run the next batch's lies; 0: that is not to be fetched
  bool fetches_output;     // whether the output's memory is to be asked for while sums are made
};

// The columns of a call in batches of a multiple of `least`: what one column waits for, the others fill.
struct Batches {
  const Call& call;
  int64_t bytes_of_element, together;
  int size;

  Batches(const Call& c, int64_t bytes, int64_t elements, int64_t least = 1) : call(c), bytes_of_element(bytes) {
    const int64_t column = call.r0 * call.r1;
    int64_t most = call.k1 == 1 ? elements / column : kPrefetched / (column * bytes);
    if (most > kBatch) most = kBatch;
    size = int(most > least ? most / least * least : least);
    together = divided_up(kItem, column * size) * size;
  }

  Batch batch(int64_t first, int64_t last) const {
    Batch found;
    found.first = first;
    found.size = int(last - first < size ? last - first : size);
    for (int b = 0; b < found.size; ++b) {
      const RunsOf<float> column(call, first + b);
      found.starts[b] = column.at(0);
      found.places[b] = call.weight_at(column.a, 0, column.k, 0);
    }
    const int64_t bytes = size * call.r0 * call.r1 * bytes_of_element;
    const bool fetches = call.size() * bytes_of_element > (1 << 20);
    found.ahead = fetches && bytes <= kPrefetched ? size * call.r1 * (call.k1 == 1 ? call.r0 : 1) : 0;
    found.fetches_output = fetches && bytes <= kFetched;
    return found;
  }

  // Call body(batch) for all columns.
  template <class Body>
  void each_of(const Team& team, Body body) const {
    const int64_t columns = call.columns();
    each(team, divided_up(columns, together), [&](int64_t item) {
      const int64_t last = columns < (item + 1) * together ? columns : (item + 1) * together;
      for (int64_t c = item * together; c < last; c += size) body(batch(c, last));
    });
  }
};

// Whether runs are written past the caches, where that pays for the whole of them.
template <class T>
inline bool streams(const Call& call, bool pays, const void* y) {
  return pays && fits_stream(static_cast<const T*>(y), call.r1);
}

// The output, if its memory is to be asked for while sums are made.
template <class T>
inline T* output_to_fetch(const Call& call, const Batch& batch, bool pays, void* output) {
  return batch.fetches_output && !streams<T>(call, pays, output) ? static_cast<T*>(output) : nullptr;
}

}  // namespace
