// Columns whose samples lie in contiguous runs: KR (one run a column) and RKR (r0 runs of r1).
//
// One thread has a column. It measures, then applies; the second look at the data hits the cache.
#pragma once

#include "activations.h"
#include "call.h"
#include "column.h"
#include "team.h"
#include "vectors.h"

namespace {

enum Recovery { kConstant, kScale, kAffine };  // one weight and bias a run; a weight, or both, for each element

constexpr int kChain = 16;                // vectors that are summed as floats before they are added as doubles
constexpr int64_t kShort = 128;           // columns of fewer elements are summed as doubles at once
constexpr int kBatch = 8;                 // short columns that are measured before the first of them is applied
constexpr int64_t kItem = 16384;          // elements that are worth a thread's while
constexpr int64_t kFetched = 1024;        // elements before they are read that a run is fetched
constexpr int64_t kPrefetched = 1 << 18;  // bytes of a column that leave room in the cache for the next one

// What the loops over one run read.
struct RunWeights {
  float slope, shift, constant;  // kConstant: y = (x - high) * slope + shift, and the weight in the slope
  const float *weight, *bias;
  int activation;
};

constexpr int64_t kBlock = 4 * kChain * kLanes;  // elements in four chains

// Sums as floats; see column.h for when they are trusted.
template <class T, bool kCenters>
Sums fast_run_sums(const T* x, int64_t n, float shift, int64_t ahead) {
  D sum_total = {}, square_total = {};
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
        if (ahead) __builtin_prefetch(x + e + slot * kLanes + ahead);
        add(slot, load<F>(x + e + slot * kLanes));
      }
    for (; e + kLanes <= last; e += kLanes) add(0, load<F>(x + e));
    if (e < last) add(1, load_part<F>(x + e, int(last - e), shift)), e = last;
    sum_total += halves((sum[0] + sum[1]) + (sum[2] + sum[3]));
    square_total += halves((square[0] + square[1]) + (square[2] + square[3]));
  }
  return {total(sum_total), total(square_total), n};
}

// Sums as doubles, of what the mask lets count.
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

template <class T, int kRecovery, bool kMasked, int kAct>
void run_apply(const T* x, T* y, int64_t n, const Line& line, const RunWeights& weights, const uint8_t* mask,
               int64_t ahead) {
  const RunWeights w = weights;  // its own, which no store can change
  const float high = line.high, inverse = line.inverse, offset = line.offset;
  const auto recovered = [&](F values, F weight, F bias) {
    const F centred = values - high;
    if constexpr (kRecovery == kConstant)
      return activate<kAct>(fma(centred, F{} + w.slope, F{} + w.shift), w.activation);
    const F value = fma(centred, F{} + inverse, F{} + offset);
    if constexpr (kRecovery == kScale) return activate<kAct>(value * weight, w.activation);
    return activate<kAct>(fma(value, weight, bias), w.activation);
  };
  int64_t e = 0;
  for (; e + kLanes <= n; e += kLanes) {
    if (ahead) __builtin_prefetch(x + e + ahead);
    F z = recovered(load<F>(x + e), kRecovery != kConstant ? load<F>(w.weight + e) : F{},
                    kRecovery == kAffine ? load<F>(w.bias + e) : F{});
    if constexpr (kMasked) z = keep(z, mask + e);
    store(y + e, z);
  }
  if (e == n) return;
  const int rest = int(n - e);
  F z = recovered(load_part<F>(x + e, rest, high), kRecovery != kConstant ? load_part<F>(w.weight + e, rest, 0) : F{},
                  kRecovery == kAffine ? load_part<F>(w.bias + e, rest, 0) : F{});
  if constexpr (kMasked) z = keep(z, mask + e, rest);
  store_part(y + e, z, rest);
}

struct GradientSums {
  double d = 0, dv = 0;  // of d_value and of d_value * value; with kConstant, of d_y and of d_y * value

  void operator+=(const GradientSums& other) {
    d += other.d;
    dv += other.dv;
  }
};

// The recovered value's gradient, from y's.
template <int kRecovery, int kAct>
inline F through_activation(F d_y, F centred, F value, const RunWeights& w, F weight, F bias) {
  if constexpr (kAct == kActNone) return d_y;
  const F z = kRecovery == kConstant ? fma(centred, F{} + w.slope, F{} + w.shift)
              : kRecovery == kScale  ? value * weight
                                     : fma(value, weight, bias);
  return d_y * activation_slope<kAct>(z, w.activation);
}

// Sums over one run; with a weight for each element, its gradient and the bias' are added to `d_weight` and `d_bias`.
template <class T, int kRecovery, bool kMasked, int kAct>
GradientSums run_gradient_sums(const T* x, const T* d_y, int64_t n, const Line& line, const RunWeights& weights,
                               const uint8_t* mask, float* d_weight, float* d_bias) {
  const RunWeights w = weights;  // its own, which no store can change
  const float high = line.high, inverse = line.inverse, offset = line.offset;
  D d_total = {}, dv_total = {};
  for (int64_t e = 0; e < n;) {
    const int64_t last = n - e < kBlock ? n : e + kBlock;
    F d_sum[2] = {}, dv_sum[2] = {};
    const auto add = [&](int slot, int64_t at, int size) __attribute__((always_inline)) {
      const auto read = [&](auto* from) {
        return size == kLanes ? load<F>(from + at) : load_part<F>(from + at, size, 0);
      };
      F centred = (size == kLanes ? load<F>(x + at) : load_part<F>(x + at, size, high)) - high, d = read(d_y);
      if constexpr (kMasked) centred = keep(centred, mask + at, size), d = keep(d, mask + at, size);
      const F value = fma(centred, F{} + inverse, F{} + offset);
      const F weight = kRecovery != kConstant ? read(w.weight) : F{}, bias = kRecovery == kAffine ? read(w.bias) : F{};
      d = through_activation<kRecovery, kAct>(d, centred, value, w, weight, bias);
      if constexpr (kRecovery != kConstant) {
        const F d_w = fma(d, value, read(d_weight)), d_b = read(d_bias) + d;
        size == kLanes ? store(d_weight + at, d_w) : store_part(d_weight + at, d_w, size);
        size == kLanes ? store(d_bias + at, d_b) : store_part(d_bias + at, d_b, size);
        d *= weight;
      }
      d_sum[slot] += d;
      dv_sum[slot] = fma(d, value, dv_sum[slot]);
    };
    for (; e + 2 * kLanes <= last; e += 2 * kLanes) {
      add(0, e, kLanes);
      add(1, e + kLanes, kLanes);
    }
    for (; e + kLanes <= last; e += kLanes) add(0, e, kLanes);
    if (e < last) add(1, e, int(last - e)), e = last;
    d_total += halves(d_sum[0] + d_sum[1]);
    dv_total += halves(dv_sum[0] + dv_sum[1]);
  }
  return {total(d_total), total(dv_total)};
}

template <class T, int kRecovery, bool kMasked, int kAct>
void run_gradient(const T* x, const T* d_y, const T* d_sum, T* d_x, int64_t n, const Line& line,
                  const RunWeights& weights, const Descent& descends, const uint8_t* mask, int64_t ahead) {
  const RunWeights w = weights;  // its own, which no store can change
  const Descent descent = descends;
  const float high = line.high, inverse = line.inverse, offset = line.offset;
  const auto one = [&](F values, F d, F weight, F bias, const uint8_t* valid, int size) {
    const F centred = values - high;
    if constexpr (kAct != kActNone) {
      const F value = fma(centred, F{} + inverse, F{} + offset);
      d = through_activation<kRecovery, kAct>(d, centred, value, w, weight, bias);
    }
    const F rest = fma(centred, F{} + descent.along, F{} + descent.level);
    F gradient = ((kRecovery == kConstant ? d * w.constant : d * weight) + rest) * inverse;
    if constexpr (kMasked) gradient = keep(gradient, valid, size);
    return gradient;
  };
  int64_t e = 0;
  for (; e + kLanes <= n; e += kLanes) {
    if (ahead) __builtin_prefetch(x + e + ahead), __builtin_prefetch(d_y + e + ahead);
    F gradient = one(load<F>(x + e), load<F>(d_y + e), kRecovery != kConstant ? load<F>(w.weight + e) : F{},
                     kRecovery == kAffine ? load<F>(w.bias + e) : F{}, kMasked ? mask + e : nullptr, kLanes);
    if (d_sum) gradient += load<F>(d_sum + e);
    store(d_x + e, gradient);
  }
  if (e == n) return;
  const int rest = int(n - e);
  F gradient = one(load_part<F>(x + e, rest, high), load_part<F>(d_y + e, rest, 0),
                   kRecovery != kConstant ? load_part<F>(w.weight + e, rest, 0) : F{},
                   kRecovery == kAffine ? load_part<F>(w.bias + e, rest, 0) : F{}, kMasked ? mask + e : nullptr, rest);
  if (d_sum) gradient += load_part<F>(d_sum + e, rest, 0);
  store_part(d_x + e, gradient, rest);
}

template <class T>
void add(const T* x, const T* residual, T* sum, int64_t n) {
  int64_t e = 0;
  for (; e + kLanes <= n; e += kLanes) store(sum + e, load<F>(x + e) + load<F>(residual + e));
  const int rest = int(n - e);
  if (rest) store_part(sum + e, load_part<F>(x + e, rest, 0) + load_part<F>(residual + e, rest, 0), rest);
}

// The loops over one run, for one recovery, mask and activation; the rest is compiled once for each dtype.
template <class T>
struct RunLoops {
  bool masked;  // whether the mask has a byte for each element of a run
  bool by_element;
  Sums (*fast_sums)(const T*, int64_t, float, int64_t);
  Sums (*exact_sums)(const T*, int64_t, double, const uint8_t*);
  void (*apply)(const T*, T*, int64_t, const Line&, const RunWeights&, const uint8_t*, int64_t);
  GradientSums (*gradient_sums)(const T*, const T*, int64_t, const Line&, const RunWeights&, const uint8_t*, float*,
                                float*);
  void (*gradient)(const T*, const T*, const T*, T*, int64_t, const Line&, const RunWeights&, const Descent&,
                   const uint8_t*, int64_t);
};

template <class T, int kRecovery, bool kMasked, int kAct>
RunLoops<T> run_loops(bool centers) {
  return {kMasked,
          kRecovery != kConstant,
          centers ? fast_run_sums<T, true> : fast_run_sums<T, false>,
          exact_run_sums<T, kMasked>,
          run_apply<T, kRecovery, kMasked, kAct>,
          run_gradient_sums<T, kRecovery, kMasked, kAct>,
          run_gradient<T, kRecovery, kMasked, kAct>};
}

// Columns one after another, a few at a time: what one waits for, the next ones fill.
struct Batches {
  int64_t columns, together;
  int size;

  explicit Batches(const Call& call)
      : columns(call.columns()),
        together(divided_up(kItem, call.r0 * call.r1 * kBatch) * kBatch),
        size(call.r0 * call.r1 <= kShort ? kBatch : 1) {
    if (call.r0 * call.r1 > kItem) together = 1;
  }
  // Call body(first column, number of columns).
  template <class Body>
  void each_of(const Team& team, Body body) const {
    each(team, divided_up(columns, together), [&](int64_t item) {
      const int64_t last = columns < (item + 1) * together ? columns : (item + 1) * together;
      for (int64_t c = item * together; c < last; c += size) body(c, last - c < size ? int(last - c) : size);
    });
  }
};

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

inline RunWeights weights_of(const Call& call, const float* weight, const float* bias, int64_t index,
                             const Line& line) {
  if (call.weight_r1 && weight) return {0, 0, 0, weight + index, bias ? bias + index : nullptr, call.activation};
  const float w = weight ? weight[index] : 1, b = bias ? bias[index] : 0;
  return {line.slope(w), line.shift(w, b), w, nullptr, nullptr, call.activation};
}

// A number near the mean: that of the first elements, or the first one where there are few.
template <class T>
float guess(const T* x, int64_t n) {
  if (n < kGuessed) return to_float(*x);
  F sum = {};
  for (int64_t e = 0; e < kGuessed; e += kLanes) sum += load<F>(x + e);
  return float(total(sum) / kGuessed);
}

// A column's sums, and what the elements were shifted by.
struct Measure {
  Sums sums;
  double shift;
};

template <class T>
Measure measure_runs(const Call& call, const Forward& t, const T* x, const RunsOf<T>& column,
                     const RunLoops<T>& loops) {
  const bool centers = call.normalizer == kStandardize;
  if (!t.mask && call.r0 * call.r1 >= kShort) {
    const float shift = centers ? guess(x + column.at(0), call.r1) : 0;
    const int64_t runs_ahead = 1 + kFetched / call.r1, stride = call.k1 * call.r1;
    Sums sums;
    for (int64_t r = 0; r < call.r0; ++r) {
      const int64_t ahead = r + runs_ahead < call.r0 ? runs_ahead * stride : 0;
      sums += loops.fast_sums(x + column.at(r), call.r1, shift, ahead);
    }
    if (trusted(sums, centers)) return {sums, shift};
  }
  const double shift = centers ? column.shift(x, t.mask) : 0;
  Sums sums;
  for (int64_t r = 0; r < call.r0; ++r) {
    if (column.is_out(t.mask, r)) continue;
    sums += loops.exact_sums(x + column.at(r), call.r1, shift, loops.masked ? column.mask_of(t.mask, r) : nullptr);
  }
  return {sums, shift};
}

// How far ahead the next batch's data lie, if they are to be fetched while this one's are written.
template <class T>
int64_t next_batch(const Call& call) {
  const int64_t bytes = call.r0 * call.r1 * int64_t(sizeof(T));
  const bool fetches = bytes <= kPrefetched && call.size() * int64_t(sizeof(T)) > (1 << 20);
  return fetches ? call.r1 * Batches(call).size : 0;
}

// Normalize one run, with `known` or, where each run has its own, with its own weight and bias.
template <class T>
void apply_run(const RunsOf<T>& column, int64_t r, const Forward& t, const T* x, const Line& line,
               const RunWeights& known, const RunLoops<T>& loops, int64_t ahead) {
  const Call& call = column.call;
  const int64_t at = column.at(r);
  T* y = static_cast<T*>(t.y) + at;
  if (column.is_out(t.mask, r)) {
    std::memset(y, 0, call.r1 * sizeof(T));
    return;
  }
  const uint8_t* mask = loops.masked ? column.mask_of(t.mask, r) : nullptr;
  if (!call.weight_r0) {
    loops.apply(x + at, y, call.r1, line, known, mask, ahead);
    return;
  }
  const RunWeights own = weights_of(call, t.weight, t.bias, call.weight_at(column.a, r, column.k, 0), line);
  loops.apply(x + at, y, call.r1, line, own, mask, ahead);
}

template <class T>
RunWeights first_weights(const RunsOf<T>& column, const Forward& t, const Line& line) {
  return weights_of(column.call, t.weight, t.bias, column.call.weight_at(column.a, 0, column.k, 0), line);
}

template <class T>
void add_run(const RunsOf<T>& column, int64_t r, const Forward& t) {
  const int64_t at = column.at(r);
  add(static_cast<const T*>(t.x) + at, static_cast<const T*>(t.residual) + at, static_cast<T*>(t.sum) + at,
      column.call.r1);
}

struct KnownColumn {
  Line line;
  RunWeights weights;
};

// With given statistics: run after run, as they lie in memory.
template <class T>
bool runs_forward_given(const Call& call, const Forward& t, const Team& team, const RunLoops<T>& loops) {
  const int64_t runs = call.k0 * call.r0 * call.k1, together = 1 + kItem / call.r1;
  Scratch<KnownColumn> known(call.columns());
  if (!known.data) return false;
  for (int64_t c = 0; c < call.columns(); ++c) {
    const Line line = remembered(t.statistics, c);
    known.data[c] = {line, first_weights(RunsOf<T>(call, c), t, line)};
  }
  const T* x = static_cast<const T*>(t.residual ? t.sum : t.x);
  each(team, divided_up(runs, together), [&](int64_t item) {
    const int64_t first = item * together, last = runs - first < together ? runs : first + together;
    int64_t k = first % call.k1, r = first / call.k1 % call.r0, a = first / call.k1 / call.r0;
    for (int64_t run = first; run < last; ++run) {
      const RunsOf<T> column(call, a, k);
      const KnownColumn& of = known.data[a * call.k1 + k];
      if (t.residual) add_run(column, r, t);
      if (of.line.fits) apply_run(column, r, t, x, of.line, of.weights, loops, 0);
      if (++k < call.k1) continue;
      k = 0;
      if (++r == call.r0) r = 0, ++a;
    }
  });
  for (int64_t c = 0; c < call.columns(); ++c) {
    const Line& line = known.data[c].line;
    if (!line.fits) column_forward<T>(call, t, x, c / call.k1, c % call.k1, line);
  }
  return true;
}

template <class T>
bool runs_forward(const Call& call, const Forward& t, const Team& team, const RunLoops<T>& loops) {
  if (!call.measured) return runs_forward_given(call, t, team, loops);
  const Batches batches(call);
  const int64_t ahead = next_batch<T>(call);
  const T* x = static_cast<const T*>(t.residual ? t.sum : t.x);
  batches.each_of(team, [&](int64_t first, int size) {
    Measure found[kBatch];
    Line lines[kBatch];
    for (int b = 0; b < size; ++b) {
      const RunsOf<T> column(call, first + b);
      for (int64_t r = 0; t.residual && r < call.r0; ++r) add_run(column, r, t);
      found[b] = measure_runs(call, t, x, column, loops);
    }
    for (int b = 0; b < size; ++b) lines[b] = measured(call, found[b].sums, found[b].shift, t.statistics, first + b);
    for (int b = 0; b < size; ++b) {
      const RunsOf<T> column(call, first + b);
      const RunWeights weights = first_weights(column, t, lines[b]);
      for (int64_t r = 0; lines[b].fits && r < call.r0; ++r)
        apply_run(column, r, t, x, lines[b], weights, loops, ahead);
      if (!lines[b].fits) column_forward<T>(call, t, x, column.a, column.k, lines[b]);
    }
  });
  return true;
}

// The gradients of the parameters while they are summed.
struct ParameterSums {
  float *d_weight, *d_bias;  // with a weight for each element: of one block of columns
  double *run_d, *run_dv;    // with one a run: a place for each run, or for each column if all of its runs share one
};

// What is known of one run of a column: where it lies, what recovers it, and what of it counts.
template <class T>
struct RunAt {
  int64_t at, index;
  RunWeights weights;
  const uint8_t* mask;

  RunAt(const RunsOf<T>& column, int64_t r, const Backward& t, const Line& line, const RunLoops<T>& loops)
      : at(column.at(r)),
        index(column.call.weight_at(column.a, r, column.k, 0)),
        weights(weights_of(column.call, t.weight, t.bias, index, line)),
        mask(loops.masked ? column.mask_of(t.mask, r) : nullptr) {}
};

// The sums of one run as doubles, of a column that float cannot hold; as those of the loops.
template <class T>
GradientSums exact_gradient_sums(const RunsOf<T>& column, int64_t r, const Backward& t, const Line& line,
                                 float* d_weight, float* d_bias) {
  const Call& call = column.call;
  const T* x = static_cast<const T*>(t.x) + column.at(r);
  const T* d_y = static_cast<const T*>(t.d_y) + column.at(r);
  GradientSums sums;
  for (int64_t s = 0; s < call.r1; ++s) {
    if (t.mask && !t.mask[call.mask_at(column.a, r, column.k, s)]) continue;
    const int64_t w = call.weight_at(column.a, r, column.k, s);
    const double value = (double(to_float(x[s])) - line.mean) * line.exact_inverse, weight = t.weight ? t.weight[w] : 1;
    double d = to_float(d_y[s]) * activated_slope(value * weight + (t.bias ? t.bias[w] : 0), call.activation);
    if (d_weight) {
      d_weight[s] += float(d * value);
      d_bias[s] += float(d);
      d *= weight;
    }
    sums += {d, d * value};
  }
  return sums;
}

// The sums of a column's runs, weighted; those of the parameters are left in `parameters`.
template <class T>
GradientSums column_gradient_sums(const RunsOf<T>& column, const Backward& t, const Line& line,
                                  const ParameterSums& parameters, const RunLoops<T>& loops) {
  const Call& call = column.call;
  const T *x = static_cast<const T*>(t.x), *d_y = static_cast<const T*>(t.d_y);
  GradientSums whole;
  if (loops.by_element) {
    for (int64_t r = 0; r < call.r0; ++r) {
      if (column.is_out(t.mask, r)) continue;
      const RunAt<T> run(column, r, t, line, loops);
      float *d_weight = parameters.d_weight + run.index, *d_bias = parameters.d_bias + run.index;
      whole += line.fits ? loops.gradient_sums(x + run.at, d_y + run.at, call.r1, line, run.weights, run.mask, d_weight,
                                               d_bias)
                         : exact_gradient_sums(column, r, t, line, d_weight, d_bias);
    }
    return whole;
  }
  const bool by_run = call.weight_r0 != 0;
  GradientSums sums;
  for (int64_t r = 0; r < call.r0; ++r) {
    const RunAt<T> run(column, r, t, line, loops);
    if (!column.is_out(t.mask, r))
      sums += line.fits ? loops.gradient_sums(x + run.at, d_y + run.at, call.r1, line, run.weights, run.mask, nullptr,
                                              nullptr)
                        : exact_gradient_sums<T>(column, r, t, line, nullptr, nullptr);
    if (!by_run && r + 1 < call.r0) continue;
    const double weight = t.weight ? t.weight[run.index] : 1;
    const int64_t place = by_run ? (column.a * call.r0 + r) * call.k1 + column.k : column.a * call.k1 + column.k;
    parameters.run_d[place] = sums.d;
    parameters.run_dv[place] = sums.dv;
    whole += {sums.d * weight, sums.dv * weight};
    sums = GradientSums();
  }
  return whole;
}

template <class T>
void column_gradient(const RunsOf<T>& column, const Backward& t, const Line& line, const GradientSums& sums, double n,
                     int64_t ahead, const RunLoops<T>& loops) {
  const Call& call = column.call;
  const T *x = static_cast<const T*>(t.x), *d_y = static_cast<const T*>(t.d_y), *d_sum = static_cast<const T*>(t.d_sum);
  if (!line.fits) {
    column_backward<T>(call, t, column.a, column.k, line, n);
    return;
  }
  const bool centers = call.normalizer == kStandardize;
  const Descent descent(line, call.measured && centers ? sums.d / n : 0, call.measured ? sums.dv / n : 0);
  for (int64_t r = 0; r < call.r0; ++r) {
    const RunAt<T> run(column, r, t, line, loops);
    T* d_x = static_cast<T*>(t.d_x) + run.at;
    const T* of_sum = d_sum ? d_sum + run.at : nullptr;
    if (!column.is_out(t.mask, r))
      loops.gradient(x + run.at, d_y + run.at, of_sum, d_x, call.r1, line, run.weights, descent, run.mask, ahead);
    else if (of_sum)
      std::memcpy(d_x, of_sum, call.r1 * sizeof(T));
    else
      std::memset(d_x, 0, call.r1 * sizeof(T));
  }
}

// The gradients of a batch of columns.
template <class T>
void batch_gradient(const Call& call, const Backward& t, int64_t first, int size, const ParameterSums& parameters,
                    int64_t ahead, const RunLoops<T>& loops) {
  Line lines[kBatch];
  GradientSums sums[kBatch];
  for (int b = 0; b < size; ++b) {
    lines[b] = remembered(t.statistics, first + b);
    sums[b] = column_gradient_sums(RunsOf<T>(call, first + b), t, lines[b], parameters, loops);
  }
  for (int b = 0; t.d_x && b < size; ++b) {
    const double n = divisor(call, count_of(call, t.statistics, first + b));
    column_gradient(RunsOf<T>(call, first + b), t, lines[b], sums[b], n, ahead, loops);
  }
}

// A weight for each element: blocks of columns are summed as floats, and the blocks, in order, as doubles.
template <class T>
bool runs_backward_by_element(const Call& call, const Backward& t, const Team& team, const RunLoops<T>& loops) {
  const int64_t columns = call.columns(), size = call.weight_size, stride = padded(size);
  const int64_t most = divided_up(call.size(), 2 * size);  // blocks whose sums are no more than there are elements
  const int64_t least = divided_up(columns, most), usual = columns >= 4096 ? 128 : columns >= 64 ? 32 : 4;
  const int64_t block = usual > least ? usual : least, blocks = divided_up(columns, block);
  Scratch<float> partial(2 * blocks * stride);
  if (!partial.data) return false;
  const int64_t ahead = next_batch<T>(call), batch = Batches(call).size;
  each(team, blocks, [&](int64_t item) {
    float* own = partial.data + 2 * item * stride;
    std::memset(own, 0, 2 * stride * sizeof(float));
    const int64_t last = columns < (item + 1) * block ? columns : (item + 1) * block;
    for (int64_t c = item * block; c < last; c += batch)
      batch_gradient(call, t, c, int(last - c < batch ? last - c : batch), {own, own + stride, nullptr, nullptr}, ahead,
                     loops);
  });
  if (!t.d_weight && !t.d_bias) return true;
  constexpr int64_t kSlice = 256;
  each(team, divided_up(size, kSlice), [&](int64_t slice) {
    const int64_t first = slice * kSlice, width = size - first < kSlice ? size - first : kSlice;
    for (int kind = 0; kind < 2; ++kind) {
      float* to = kind ? t.d_bias : t.d_weight;
      if (!to) continue;
      double sums[kSlice] = {};
      for (int64_t item = 0; item < blocks; ++item)
        for (int64_t e = 0; e < width; ++e) sums[e] += partial.data[(2 * item + kind) * stride + first + e];
      for (int64_t e = 0; e < width; ++e) to[first + e] = float(sums[e]);
    }
  });
  return true;
}

// One weight a run or a column: sums of runs are kept, and those of one weight added in order.
template <class T>
bool runs_backward_by_run(const Call& call, const Backward& t, const Team& team, const RunLoops<T>& loops) {
  const int64_t columns = call.columns(), rows = call.weight_r0 ? call.r0 : 1;
  Scratch<double> d(columns * rows), dv(columns * rows), sums(2 * call.weight_size);
  if (!d.data || !dv.data || !sums.data) return false;
  const int64_t ahead = next_batch<T>(call);
  Batches(call).each_of(team, [&](int64_t first, int size) {
    batch_gradient(call, t, first, size, {nullptr, nullptr, d.data, dv.data}, ahead, loops);
  });
  if (!t.d_weight && !t.d_bias) return true;
  std::memset(sums.data, 0, 2 * call.weight_size * sizeof(double));
  for (int64_t a = 0; a < call.k0; ++a)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < call.k1; ++k) {
        const int64_t index = call.weight_at(a, r, k, 0), place = (a * rows + r) * call.k1 + k;
        sums.data[index] += dv.data[place];
        sums.data[call.weight_size + index] += d.data[place];
      }
  for (int64_t e = 0; e < call.weight_size; ++e) {
    if (t.d_weight) t.d_weight[e] = float(sums.data[e]);
    if (t.d_bias) t.d_bias[e] = float(sums.data[call.weight_size + e]);
  }
  return true;
}

template <class T>
bool runs_backward(const Call& call, const Backward& t, const Team& team, const RunLoops<T>& loops) {
  return loops.by_element ? runs_backward_by_element(call, t, team, loops) : runs_backward_by_run(call, t, team, loops);
}

}  // namespace
