// Columns whose samples lie in contiguous runs: KR (one run a column) and RKR (r0 runs of r1); see batches.h for how
// they are divided.
#pragma once

#include <type_traits>

#include "activations.h"
#include "batches.h"
#include "call.h"
#include "column.h"
#include "team.h"
#include "vectors.h"

namespace {

enum Recovery { kConstant, kScale, kAffine };  // one weight and bias a run; a weight, or both, for each element

constexpr int kChain = 16;            // vectors that are summed as floats before they are added as doubles
constexpr int64_t kShort = kGuessed;  // columns of fewer elements are summed as doubles at once
// Sums of a batch's columns as floats, and what the elements were shifted by.
struct BatchSums {
  alignas(kLine) double sum[kBatch], square[kBatch];
  alignas(kLine) float shift[kBatch];
};

// Add one run to a column's sums; meanwhile ask for the memory that will be written, if `y` is given.
template <class T, bool kCenters>
NW_INLINE void add_run(const T* x, T* y, int64_t n, float shift, D* sum_total, D* square_total) {
  constexpr int64_t kBlock = 4 * kChain * kLanes;  // elements in four chains
  for (int64_t e = 0; e < n;) {
    const int64_t last = n - e < kBlock ? n : e + kBlock;
    F sum[4] = {}, square[4] = {};
    const auto add = [&](int slot, F values) {
      const F d = kCenters ? values - shift : values;
      if (kCenters) sum[slot] += d;
      square[slot] = fma(d, d, square[slot]);
    };
    for (; e + 4 * kLanes <= last; e += 4 * kLanes)
      for (int slot = 0; slot < 4; ++slot) {
        if (y) fetch_to_write(y + e + slot * kLanes);
        add(slot, load<F>(x + e + slot * kLanes));
      }
    for (; e + kLanes <= last; e += kLanes) {
      if (y) fetch_to_write(y + e);
      add(0, load<F>(x + e));
    }
    if (e < last) add(3, load_part<F>(x + e, int(last - e), shift)), e = last;
    if (kCenters) *sum_total += halves((sum[0] + sum[1]) + (sum[2] + sum[3]));
    *square_total += halves((square[0] + square[1]) + (square[2] + square[3]));
  }
}

// Make zeros of what a batch of `size` columns leaves unused.
inline void clear_rest(D* of_columns, int size) {
  for (int b = size; b < kBatch; ++b) of_columns[b] = D{};
}

// Numbers near the columns' means: those of the first elements, or the first one where runs are short.
template <class T>
void guess(const T* x, const Batch& batch, int64_t n, float* shift) {
  if (n < kGuessed) {
    for (int b = 0; b < batch.size; ++b) shift[b] = to_float(x[batch.starts[b]]);
    return;
  }
  D firsts[kBatch];
  clear_rest(firsts, batch.size);
  for (int b = 0; b < batch.size; ++b) {
    F sum = {};
    for (int64_t e = 0; e < kGuessed; e += kLanes) sum += load<F>(x + batch.starts[b] + e);
    firsts[b] = halves(sum);
  }
  double sums[kBatch];
  totals(firsts, sums);
  for (int b = 0; b < kBatch; ++b) shift[b] = float(sums[b] / kGuessed);
}

// Sums of floats; see column.h for when they are trusted.
template <class T, bool kCenters>
void batch_sums(const Call& call, const Batch& batch, const Forward& t, const T* x, BatchSums* found) {
  const bool dense = call.dense;
  const int64_t runs = dense ? 1 : call.r0, n = dense ? call.r0 * call.r1 : call.r1, stride = call.k1 * call.r1;
  std::memset(found->shift, 0, sizeof(found->shift));
  if (kCenters) guess(x, batch, n, found->shift);
  T* y = output_to_fetch<T>(call, batch, t.streams, t.y);
  D sum[kBatch], square[kBatch];
  clear_rest(sum, batch.size), clear_rest(square, batch.size);
  for (int64_t r = 0; r < runs; ++r)
    for (int b = 0; b < batch.size; ++b) {
      D of_run[2] = {};
      const int64_t at = batch.starts[b] + r * stride;
      add_run<T, kCenters>(x + at, y ? y + at : nullptr, n, found->shift[b], of_run, of_run + 1);
      sum[b] = r ? sum[b] + of_run[0] : of_run[0];
      square[b] = r ? square[b] + of_run[1] : of_run[1];
    }
  totals(sum, found->sum);
  totals(square, found->square);
}

// Sums of one run as doubles, of what the mask lets count.
template <class T, bool kMasked>
Sums exact_run_sums(const T* x, int64_t n, double shift, const uint8_t* mask) {
  D sum[2] = {}, square[2] = {};
  const auto add = [&](int slot, H values, int64_t at, int size) {
    D d = widen(values) - shift;
    if constexpr (kMasked) d = keep(d, mask + at, size);
    sum[slot] += d;
    square[slot] = fma(d, d, square[slot]);
  };
  int64_t e = 0;
  for (; e + 2 * kHalf <= n; e += 2 * kHalf)
    for (int slot = 0; slot < 2; ++slot) add(slot, load<H>(x + e + slot * kHalf), e + slot * kHalf, kHalf);
  for (; e + kHalf <= n; e += kHalf) add(0, load<H>(x + e), e, kHalf);
  if (e < n) add(1, load_part<H>(x + e, int(n - e), float(shift)), e, int(n - e));
  Sums sums{total(sum[0] + sum[1]), total(square[0] + square[1]), n};
  if constexpr (kMasked) {
    sums.count = 0;
    for (int64_t i = 0; i < n; ++i) sums.count += mask[i] != 0;
  }
  return sums;
}

// What the loops over one run read.
struct RunWeights {
  float slope, shift, constant;  // kConstant: y = (x - high) * slope + shift, and the weight in the slope
  const float *weight, *bias;    // otherwise: of the run's first element
  int activation;
};

inline RunWeights weights_of(const Call& call, const float* weight, const float* bias, int64_t place,
                             const Line& line) {
  if (call.weight_r1 && weight) return {0, 0, 1, weight + place, bias ? bias + place : nullptr, call.activation};
  const float w = weight ? weight[place] : 1, b = bias ? bias[place] : 0;
  return {line.slope(w), line.shift(w, b), w, nullptr, nullptr, call.activation};
}

// Whether float holds a column's line, and with the weight of each of its runs.
inline bool fits(const Call& call, const float* weight, int64_t place, const Line& line) {
  if (!weight || call.weight_r1) return line.fits;
  bool good = line.fits;
  for (int64_t r = 0; r < (call.weight_r0 ? call.r0 : 1); ++r)
    good &= has_slope(line.exact_inverse, double(weight[place + r * call.weight_r0]));
  return good;
}

// Normalize one run.
template <class T, int kRecovery, bool kMasked, int kAct>
NW_INLINE void apply_run(const T* x, T* y, int64_t n, const Line& line, const RunWeights& w, const uint8_t* mask,
                         int64_t ahead, bool streamed) {
  const F high = F{} + line.high, inverse = F{} + line.inverse, offset = F{} + line.offset;
  const F slope = F{} + w.slope, shift = F{} + w.shift;
  const float *weight = w.weight, *bias = w.bias;
  const int activation = w.activation;
  const auto one = [&](int64_t e, auto size) {
    const F centred = load_some(x + e, size, line.high) - high;
    F z = kRecovery == kConstant ? fma(centred, slope, shift) : fma(centred, inverse, offset);
    if constexpr (kRecovery == kScale) z *= load_some(weight + e, size);
    if constexpr (kRecovery == kAffine) z = fma(z, load_some(weight + e, size), load_some(bias + e, size));
    z = activate<kAct>(z, activation);
    if constexpr (kMasked) z = keep(z, mask + e, size);
    return z;
  };
  int64_t e = unaligned(y, n);
  if (e) store_part(y, one(0, int(e)), int(e));
  for (; e + kLanes <= n; e += kLanes) {
    if (ahead) fetch(x + e + ahead);
    const F z = one(e, std::integral_constant<int, kLanes>());
    streamed ? stream(y + e, z) : store(y + e, z);
  }
  if (e < n) store_part(y + e, one(e, int(n - e)), int(n - e));
}

// Normalize the columns of a batch whose lines fit.
template <class T, int kRecovery, bool kMasked, int kAct>
void batch_apply(const Call& call, const Batch& batch, const Forward& t, const T* x, const Line* lines) {
  RunWeights weights[kBatch];
  for (int b = 0; b < batch.size; ++b) weights[b] = weights_of(call, t.weight, t.bias, batch.places[b], lines[b]);
  const int64_t n = call.r1, stride = call.k1 * call.r1;
  const bool streamed = streams<T>(call, t.streams, t.y);
  for (int64_t r = 0; r < call.r0; ++r)
    for (int b = 0; b < batch.size; ++b) {
      if (!lines[b].fits) continue;
      T* y = static_cast<T*>(t.y) + batch.starts[b] + r * stride;
      const uint8_t* mask = nullptr;
      if (kMasked || t.mask) {
        const RunsOf<T> column(call, batch.first + b);
        mask = column.mask_of(t.mask, r);
        if (column.is_out(t.mask, r)) {
          std::memset(y, 0, n * sizeof(T));
          continue;
        }
      }
      if (r && call.weight_r0)
        weights[b] = weights_of(call, t.weight, t.bias, batch.places[b] + r * call.weight_r0, lines[b]);
      apply_run<T, kRecovery, kMasked, kAct>(x + batch.starts[b] + r * stride, y, n, lines[b], weights[b], mask,
                                             batch.ahead, streamed);
    }
  if (streamed) end_of_stream();
}

// Normalize runs as they lie in memory, with one weight and bias a column.
template <class T, int kAct>
void given_apply(const Call& call, const Forward& t, const T* x, int64_t first, int64_t last, const Line* lines,
                 const RunWeights* weights) {
  int64_t k = first % call.k1, r = first / call.k1 % call.r0, a = first / call.k1 / call.r0;
  T* y = static_cast<T*>(t.y);
  const bool streamed = streams<T>(call, t.streams, y);
  for (int64_t run = first; run < last; ++run) {
    const int64_t column = a * call.k1 + k, at = run * call.r1;
    if (lines[column].fits)
      apply_run<T, kConstant, false, kAct>(x + at, y + at, call.r1, lines[column], weights[column], nullptr, 0,
                                           streamed);
    if (++k < call.k1) continue;
    k = 0;
    if (++r == call.r0) r = 0, ++a;
  }
  if (streamed) end_of_stream();
}

struct BatchGradients;  // runs_gradient.h

// The loops over runs, for one recovery, mask and activation; the rest is compiled once for each dtype.
template <class T>
struct RunLoops {
  bool masked;  // whether the mask has a byte for each element of a run
  bool by_element;
  void (*sums)(const Call&, const Batch&, const Forward&, const T*, BatchSums*);
  Sums (*exact_sums)(const T*, int64_t, double, const uint8_t*);
  void (*apply)(const Call&, const Batch&, const Forward&, const T*, const Line*);
  void (*given_apply)(const Call&, const Forward&, const T*, int64_t, int64_t, const Line*, const RunWeights*);
  void (*gradient_sums)(const Call&, const Batch&, const Backward&, const Line*, BatchGradients*);
  void (*gradient)(const Call&, const Batch&, const Backward&, const Line*, const Descent*);
};

// A column summed as doubles.
template <class T>
Line measure_exactly(const Call& call, const Forward& t, const T* x, const RunsOf<T>& column,
                     const RunLoops<T>& loops) {
  const double shift = call.normalizer == kStandardize ? column.shift(x, t.mask) : 0;
  Sums sums;
  for (int64_t r = 0; r < call.r0; ++r) {
    if (column.is_out(t.mask, r)) continue;
    sums += loops.exact_sums(x + column.at(r), call.r1, shift, loops.masked ? column.mask_of(t.mask, r) : nullptr);
  }
  return measured(call, sums, shift, t.statistics, column.a * call.k1 + column.k);
}

// Statistics of a batch from sums of floats, side by side; returns a bit for each column whose sums are trusted.
inline unsigned finish(const Call& call, const Batch& batch, const BatchSums& sums, const Statistics& out,
                       Line* lines) {
  alignas(kLine) double mean[kBatch], inverse[kBatch], m2[kBatch];
  const D n = D{} + double(call.r0 * call.r1);
  unsigned good = 0;
  for (int b = 0; b < kBatch; b += kHalf) {
    const D sum = load(sums.sum + b), square = load(sums.square + b);
    const Found<D> found(call, sum, square, n, widen(load<H>(sums.shift + b)));
    store(mean + b, found.mean), store(inverse + b, found.inverse), store(m2 + b, found.m2);
    good |= lanes_of(trusted(sum, square, n, call.normalizer == kStandardize)) << b;
  }
  for (int b = 0; b < batch.size; ++b) {
    const int64_t column = batch.first + b;
    lines[b] = Line(mean[b], inverse[b]);
    if (out.mean) out.mean[column] = mean[b];
    if (out.inverse) out.inverse[column] = inverse[b];
    if (out.m2) out.m2[column] = m2[b];
  }
  return good;
}

// The lines of a batch: measured, or of given statistics.
template <class T>
void find_lines(const Call& call, const Batch& batch, const Forward& t, const T* x, const RunLoops<T>& loops,
                Line* lines) {
  if (!call.measured) {
    for (int b = 0; b < batch.size; ++b) lines[b] = remembered(t.statistics, batch.first + b);
    return;
  }
  unsigned good = 0;
  if (!t.mask && call.r0 * call.r1 >= kShort) {
    BatchSums sums;
    loops.sums(call, batch, t, x, &sums);
    good = finish(call, batch, sums, t.statistics, lines);
  }
  for (int b = 0; b < batch.size; ++b)
    if (!(good >> b & 1)) lines[b] = measure_exactly(call, t, x, RunsOf<T>(call, batch.first + b), loops);
}

// With given statistics, and one weight and bias a column: run after run, as they lie in memory.
template <class T>
bool runs_forward_given(const Call& call, const Forward& t, const Team& team, const RunLoops<T>& loops) {
  const int64_t runs = call.k0 * call.r0 * call.k1, together = 1 + kItem / call.r1;
  Scratch<Line> lines(call.columns());
  Scratch<RunWeights> weights(call.columns());
  if (!lines.data || !weights.data) return false;
  for (int64_t c = 0; c < call.columns(); ++c) {
    lines.data[c] = remembered(t.statistics, c);
    const int64_t place = call.weight_at(c / call.k1, 0, c % call.k1, 0);
    weights.data[c] = weights_of(call, t.weight, t.bias, place, lines.data[c]);
    lines.data[c].fits = fits(call, t.weight, place, lines.data[c]);
  }
  const T* x = static_cast<const T*>(t.x);
  each(team, divided_up(runs, together), [&](int64_t item) {
    const int64_t first = item * together, last = runs - first < together ? runs : first + together;
    loops.given_apply(call, t, x, first, last, lines.data, weights.data);
  });
  for (int64_t c = 0; c < call.columns(); ++c)
    if (!lines.data[c].fits) column_forward<T>(call, t, x, c / call.k1, c % call.k1, lines.data[c]);
  return true;
}

template <class T>
bool runs_forward(const Call& call, const Forward& t, const Team& team, const RunLoops<T>& loops) {
  if (!call.measured && !t.mask && !t.residual && !loops.by_element && !call.weight_r0)
    return runs_forward_given(call, t, team, loops);
  const T* x = static_cast<const T*>(t.residual ? t.sum : t.x);
  Batches(call, sizeof(T), kTogether).each_of(team, [&](const Batch& batch) {
    Line lines[kBatch];
    for (int64_t r = 0; t.residual && r < call.r0; ++r)
      for (int b = 0; b < batch.size; ++b) {
        const int64_t at = batch.starts[b] + r * call.k1 * call.r1;
        add_residual(static_cast<const T*>(t.x) + at, static_cast<const T*>(t.residual) + at,
                     static_cast<T*>(t.sum) + at, call.r1);
      }
    find_lines(call, batch, t, x, loops, lines);
    for (int b = 0; b < batch.size; ++b) lines[b].fits = fits(call, t.weight, batch.places[b], lines[b]);
    loops.apply(call, batch, t, x, lines);
    for (int b = 0; b < batch.size; ++b) {
      const RunsOf<T> column(call, batch.first + b);
      if (!lines[b].fits) column_forward<T>(call, t, x, column.a, column.k, lines[b]);
    }
  });
  return true;
}

}  // namespace
