// Sums for the gradients of columns whose samples lie in contiguous runs: over columns, and for weights and biases.
#pragma once

#include "runs.h"

namespace {

constexpr int kRowsTogether = 4;  // columns that share what is read and written of a weight for each element

struct GradientSums {
  double d = 0, dv = 0;

  void operator+=(const GradientSums& other) {
    d += other.d;
    dv += other.dv;
  }
};

// The gradients of a weight and a bias for each element, over one block of columns: summed as floats, and before those
// have become long sums, added as doubles.
struct ElementGradients {
  float *d_weight, *d_bias;
  double *d_weight_sum, *d_bias_sum;
  int64_t size, added;

  // After `count` more numbers for each weight.
  void count(int64_t count) {
    added += count;
    if (added >= kLongest) flush();
  }
  void flush() {
    for (int64_t e = 0; e < size; ++e) d_weight_sum[e] += d_weight[e], d_bias_sum[e] += d_bias[e];
    std::memset(d_weight, 0, size * sizeof(float));
    std::memset(d_bias, 0, size * sizeof(float));
    added = 0;
  }

 private:
  static constexpr int64_t kLongest = 128;
};

// Sums over the columns of a batch, of d_value and of d_value * value, and where those of the parameters go.
struct BatchGradients {
  alignas(kLine) double d[kBatch], dv[kBatch];
  ElementGradients* elements;  // with a weight for each element
  double *run_d, *run_dv;      // with one a run: a place for each run, or for each column if all of its runs share one
};

// The gradient of the recovered value, from y's.
template <int kRecovery, int kAct>
inline F through_activation(F d_y, F centred, F value, const RunWeights& w, F weight, F bias) {
  if constexpr (kAct == kActNone) return d_y;
  const F z = kRecovery == kConstant ? fma(centred, F{} + w.slope, F{} + w.shift)
              : kRecovery == kScale  ? value * weight
                                     : fma(value, weight, bias);
  return d_y * activation_slope<kAct>(z, w.activation);
}

// One run of each of kRows columns.
template <class T, int kRows>
struct RunGroup {
  const T *x[kRows], *d_y[kRows];
  T* d_x[kRows];  // null: not to be asked for
  const Line* lines[kRows];
  const uint8_t* mask;  // of one column
};

// Add the sums of runs with a weight for each element to those of their columns, `d` and `dv`, and to the weights'.
template <class T, int kRecovery, bool kMasked, int kAct, int kRows>
NW_INLINE void add_element_runs(const RunGroup<T, kRows>& group, int64_t n, const RunWeights& w, float* d_weight,
                                float* d_bias, D* d_total, D* dv_total) {
  F high[kRows], inverse[kRows], offset[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    high[i] = F{} + group.lines[i]->high;
    inverse[i] = F{} + group.lines[i]->inverse;
    offset[i] = F{} + group.lines[i]->offset;
  }
  for (int64_t e = 0; e < n;) {
    const int64_t last = n - e < kChain * kLanes ? n : e + kChain * kLanes;
    F d_sum[kRows] = {}, dv_sum[kRows] = {};
    const auto add = [&](auto size) {
      const F weight = load_some(w.weight + e, size), bias = kRecovery == kAffine ? load_some(w.bias + e, size) : F{};
      F d_w = load_some(d_weight + e, size), d_b = load_some(d_bias + e, size);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        if (group.d_x[i]) fetch_to_write(group.d_x[i] + e);
        F centred = load_some(group.x[i] + e, size, group.lines[i]->high) - high[i],
          d = load_some(group.d_y[i] + e, size);
        if constexpr (kMasked) centred = keep(centred, group.mask + e, size), d = keep(d, group.mask + e, size);
        const F value = fma(centred, inverse[i], offset[i]);
        d = through_activation<kRecovery, kAct>(d, centred, value, w, weight, bias);
        d_w = fma(d, value, d_w);
        d_b += d;
        d *= weight;
        d_sum[i] += d;
        dv_sum[i] = fma(d, value, dv_sum[i]);
      }
      store_some(d_weight + e, d_w, size);
      store_some(d_bias + e, d_b, size);
    };
    for (; e + kLanes <= last; e += kLanes) add(std::integral_constant<int, kLanes>());
    if (e < last) add(int(last - e)), e = last;
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) d_total[i] += halves(d_sum[i]), dv_total[i] += halves(dv_sum[i]);
  }
}

// Add the sums of d_y and d_y * value of one run with one weight; meanwhile ask for the memory of d_x, if it is given.
template <class T, bool kMasked, int kAct>
NW_INLINE void add_constant_run(const T* x, const T* d_y, T* d_x, int64_t n, const Line& line, const RunWeights& w,
                                const uint8_t* mask, D* d_total, D* dv_total) {
  constexpr int64_t kBlock = 2 * kChain * kLanes;
  const F high = F{} + line.high, inverse = F{} + line.inverse, offset = F{} + line.offset;
  for (int64_t e = 0; e < n;) {
    const int64_t last = n - e < kBlock ? n : e + kBlock;
    F d_sum[2] = {}, dv_sum[2] = {};
    const auto add = [&](int slot, int64_t at, auto size) {
      if (d_x) fetch_to_write(d_x + at);
      F centred = load_some(x + at, size, line.high) - high, d = load_some(d_y + at, size);
      if constexpr (kMasked) centred = keep(centred, mask + at, size), d = keep(d, mask + at, size);
      const F value = fma(centred, inverse, offset);
      d = through_activation<kConstant, kAct>(d, centred, value, w, F{}, F{});
      d_sum[slot] += d;
      dv_sum[slot] = fma(d, value, dv_sum[slot]);
    };
    constexpr std::integral_constant<int, kLanes> whole;
    for (; e + 2 * kLanes <= last; e += 2 * kLanes) add(0, e, whole), add(1, e + kLanes, whole);
    for (; e + kLanes <= last; e += kLanes) add(0, e, whole);
    if (e < last) add(1, e, int(last - e)), e = last;
    *d_total += halves(d_sum[0] + d_sum[1]);
    *dv_total += halves(dv_sum[0] + dv_sum[1]);
  }
}

// The sums of one run as doubles, of a column that float cannot hold: weighted, where each element has its weight.
template <class T>
GradientSums exact_gradients(const RunsOf<T>& column, int64_t r, const Backward& t, const Line& line, double* d_weight,
                             double* d_bias) {
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
      d_weight[s] += d * value;
      d_bias[s] += d;
      d *= weight;
    }
    sums += {d, d * value};
  }
  return sums;
}

// Sums of a batch, with a weight for each element.
template <class T, int kRecovery, bool kMasked, int kAct>
void element_gradient_sums(const Call& call, const Batch& batch, const Backward& t, const Line* lines,
                           BatchGradients* found) {
  const T *x = static_cast<const T*>(t.x), *d_y = static_cast<const T*>(t.d_y);
  T* d_x = output_to_fetch<T>(call, batch, t.streams, t.d_x);
  ElementGradients& elements = *found->elements;
  D d[kBatch], dv[kBatch];
  clear_rest(d, batch.size), clear_rest(dv, batch.size);
  const auto add = [&](auto rows, int b, const RunsOf<T>& column, int64_t r) {
    constexpr int kRows = decltype(rows)::value;
    const int64_t index = batch.places[b] + r * call.weight_r0;
    RunGroup<T, kRows> group;
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const int64_t at = batch.starts[b + i] + r * call.k1 * call.r1;
      group.x[i] = x + at, group.d_y[i] = d_y + at, group.lines[i] = lines + b + i;
      group.d_x[i] = d_x ? d_x + at : nullptr;
    }
    group.mask = kMasked ? column.mask_of(t.mask, r) : nullptr;
    D of_d[kRows], of_dv[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) of_d[i] = of_dv[i] = D{};
    if (lines[b].fits && !column.is_out(t.mask, r))
      add_element_runs<T, kRecovery, kMasked, kAct>(group, call.r1, weights_of(call, t.weight, t.bias, index, lines[b]),
                                                    elements.d_weight + index, elements.d_bias + index, of_d, of_dv);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      d[b + i] = r ? d[b + i] + of_d[i] : of_d[i];
      dv[b + i] = r ? dv[b + i] + of_dv[i] : of_dv[i];
    }
  };
  bool alike = !t.mask && !call.weight_k0 && !call.weight_k1;  // whether the columns have the same weights
  for (int b = 0; b < batch.size; ++b) alike &= lines[b].fits;
  for (int64_t r = 0; r < call.r0; ++r) {
    int b = 0;
    if constexpr (!kMasked)
      for (; alike && b + kRowsTogether <= batch.size; b += kRowsTogether)
        add(std::integral_constant<int, kRowsTogether>(), b, RunsOf<T>(call, batch.first + b), r);
    for (; b < batch.size; ++b) add(std::integral_constant<int, 1>(), b, RunsOf<T>(call, batch.first + b), r);
    if (!call.weight_r0 || r + 1 == call.r0) elements.count(batch.size);
  }
  totals(d, found->d);
  totals(dv, found->dv);
  for (int b = 0; b < batch.size; ++b) {
    if (lines[b].fits) continue;
    const RunsOf<T> column(call, batch.first + b);
    GradientSums exact;
    for (int64_t r = 0; r < call.r0; ++r) {
      const int64_t index = batch.places[b] + r * call.weight_r0;
      exact += exact_gradients(column, r, t, lines[b], elements.d_weight_sum + index, elements.d_bias_sum + index);
    }
    found->d[b] = exact.d, found->dv[b] = exact.dv;
  }
}

// Sums of `count` runs with one weight each, from run `first` of a column on, whose weight lies at `place`.
template <class T, bool kMasked, int kAct>
void sum_runs(const RunsOf<T>& column, int64_t first, int count, int64_t place, const Backward& t, T* d_x,
              const Line& line, GradientSums* found) {
  const Call& call = column.call;
  D d[kBatch], dv[kBatch];
  clear_rest(d, count), clear_rest(dv, count);
  for (int i = 0; i < count; ++i) {
    const int64_t r = first + i, at = column.at(r);
    const RunWeights w = weights_of(call, t.weight, t.bias, place + i * call.weight_r0, line);
    d[i] = dv[i] = D{};
    if (line.fits && !column.is_out(t.mask, r))
      add_constant_run<T, kMasked, kAct>(static_cast<const T*>(t.x) + at, static_cast<const T*>(t.d_y) + at,
                                         d_x ? d_x + at : nullptr, call.r1, line, w,
                                         kMasked ? column.mask_of(t.mask, r) : nullptr, d + i, dv + i);
  }
  double of_d[kBatch], of_dv[kBatch];
  totals(d, of_d);
  totals(dv, of_dv);
  for (int i = 0; i < count; ++i)
    found[i] =
        line.fits ? GradientSums{of_d[i], of_dv[i]} : exact_gradients<T>(column, first + i, t, line, nullptr, nullptr);
}

// Sums of a batch, with one weight a run.
template <class T, bool kMasked, int kAct>
void run_gradient_sums(const Call& call, const Batch& batch, const Backward& t, const Line* lines,
                       BatchGradients* found) {
  for (int b = 0; b < batch.size; ++b) {
    const RunsOf<T> column(call, batch.first + b);
    GradientSums whole;
    for (int64_t first = 0; first < call.r0; first += kBatch) {
      const int count = int(call.r0 - first < kBatch ? call.r0 - first : kBatch);
      GradientSums sums[kBatch];
      const int64_t place = batch.places[b] + first * call.weight_r0;
      sum_runs<T, kMasked, kAct>(column, first, count, place, t, output_to_fetch<T>(call, batch, t.streams, t.d_x),
                                 lines[b], sums);
      for (int i = 0; i < count; ++i) {
        const double weight = t.weight ? t.weight[place + i * call.weight_r0] : 1;
        const int64_t run = (column.a * call.r0 + first + i) * call.k1 + column.k;
        found->run_d[run] = sums[i].d;
        found->run_dv[run] = sums[i].dv;
        whole += {sums[i].d * weight, sums[i].dv * weight};
      }
    }
    found->d[b] = whole.d, found->dv[b] = whole.dv;
  }
}

// Sums of a batch, with one weight a column.
template <class T, bool kMasked, int kAct>
void column_gradient_sums(const Call& call, const Batch& batch, const Backward& t, const Line* lines,
                          BatchGradients* found) {
  const T *x = static_cast<const T*>(t.x), *d_y = static_cast<const T*>(t.d_y);
  T* d_x = output_to_fetch<T>(call, batch, t.streams, t.d_x);
  const bool dense = call.dense && !t.mask;
  const int64_t runs = dense ? 1 : call.r0, n = dense ? call.r0 * call.r1 : call.r1, stride = call.k1 * call.r1;
  D d[kBatch], dv[kBatch];
  RunWeights weights[kBatch];
  clear_rest(d, batch.size), clear_rest(dv, batch.size);
  for (int b = 0; b < batch.size; ++b) weights[b] = weights_of(call, t.weight, t.bias, batch.places[b], lines[b]);
  for (int64_t r = 0; r < runs; ++r)
    for (int b = 0; b < batch.size; ++b) {
      const RunsOf<T> column(call, batch.first + b);
      const int64_t at = batch.starts[b] + r * stride;
      D of_d = {}, of_dv = {};
      if (lines[b].fits && !column.is_out(t.mask, r))
        add_constant_run<T, kMasked, kAct>(x + at, d_y + at, d_x ? d_x + at : nullptr, n, lines[b], weights[b],
                                           kMasked ? column.mask_of(t.mask, r) : nullptr, &of_d, &of_dv);
      d[b] = r ? d[b] + of_d : of_d;
      dv[b] = r ? dv[b] + of_dv : of_dv;
    }
  totals(d, found->d);
  totals(dv, found->dv);
  for (int b = 0; b < batch.size; ++b) {
    const RunsOf<T> column(call, batch.first + b);
    GradientSums sums{found->d[b], found->dv[b]};
    if (!lines[b].fits) {
      sums = GradientSums();
      for (int64_t r = 0; r < call.r0; ++r) sums += exact_gradients<T>(column, r, t, lines[b], nullptr, nullptr);
    }
    const double weight = t.weight ? t.weight[batch.places[b]] : 1;
    found->run_d[batch.first + b] = sums.d;
    found->run_dv[batch.first + b] = sums.dv;
    found->d[b] = sums.d * weight, found->dv[b] = sums.dv * weight;
  }
}

template <class T, int kRecovery, bool kMasked, int kAct>
void batch_gradient_sums(const Call& call, const Batch& batch, const Backward& t, const Line* lines,
                         BatchGradients* found) {
  if constexpr (kRecovery != kConstant)
    element_gradient_sums<T, kRecovery, kMasked, kAct>(call, batch, t, lines, found);
  else if (call.weight_r0)
    run_gradient_sums<T, kMasked, kAct>(call, batch, t, lines, found);
  else
    column_gradient_sums<T, kMasked, kAct>(call, batch, t, lines, found);
}

}  // namespace
