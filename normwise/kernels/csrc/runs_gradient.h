// The gradients of columns whose samples lie in contiguous runs; see runs.h for how they are divided.
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

// d_x, if its memory is to be asked for while sums are made.
template <class T>
inline T* written_soon(const Call& call, const Batch& batch, const Backward& t) {
  return batch.fetches_output && !streams<T>(call, t.streams, t.d_x) ? static_cast<T*>(t.d_x) : nullptr;
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
  T* d_x = written_soon<T>(call, batch, t);
  ElementGradients& elements = *found->elements;
  D d[kBatch], dv[kBatch];
  clear(d, batch.size), clear(dv, batch.size);
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
  clear(d, count), clear(dv, count);
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
      sum_runs<T, kMasked, kAct>(column, first, count, place, t, written_soon<T>(call, batch, t), lines[b], sums);
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
  T* d_x = written_soon<T>(call, batch, t);
  const bool dense = call.dense && !t.mask;
  const int64_t runs = dense ? 1 : call.r0, n = dense ? call.r0 * call.r1 : call.r1, stride = call.k1 * call.r1;
  D d[kBatch], dv[kBatch];
  RunWeights weights[kBatch];
  clear(d, batch.size), clear(dv, batch.size);
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

// d_x of one run.
template <class T, int kRecovery, bool kMasked, int kAct>
NW_INLINE void run_gradient(const T* x, const T* d_y, const T* d_sum, T* d_x, int64_t n, const Line& line,
                            const RunWeights& w, const Descent& descent, const uint8_t* mask, int64_t ahead,
                            bool streamed) {
  const F high = F{} + line.high, inverse = F{} + line.inverse, offset = F{} + line.offset, along = F{} + descent.along,
          level = F{} + descent.level, constant = F{} + w.constant;
  const auto one = [&](int64_t e, auto size) {
    const F centred = load_some(x + e, size, line.high) - high;
    const F weight = kRecovery != kConstant ? load_some(w.weight + e, size) : constant;
    F d = load_some(d_y + e, size);
    if constexpr (kAct != kActNone) {
      const F bias = kRecovery == kAffine ? load_some(w.bias + e, size) : F{};
      d = through_activation<kRecovery, kAct>(d, centred, fma(centred, inverse, offset), w, weight, bias);
    }
    F gradient = (d * weight + fma(only(centred, descent.measured), along, level)) * inverse;
    if constexpr (kMasked) gradient = keep(gradient, mask + e, size);
    return d_sum ? gradient + load_some(d_sum + e, size) : gradient;
  };
  int64_t e = 0;
  for (; e + kLanes <= n; e += kLanes) {
    if (ahead) fetch(x + e + ahead), fetch(d_y + e + ahead);
    const F gradient = one(e, std::integral_constant<int, kLanes>());
    streamed ? stream(d_x + e, gradient) : store(d_x + e, gradient);
  }
  if (e < n) store_part(d_x + e, one(e, int(n - e)), int(n - e));
}

// d_x of the columns of a batch whose lines fit.
template <class T, int kRecovery, bool kMasked, int kAct>
void batch_gradient(const Call& call, const Batch& batch, const Backward& t, const Line* lines,
                    const Descent* descents) {
  const T *x = static_cast<const T*>(t.x), *d_y = static_cast<const T*>(t.d_y), *d_sum = static_cast<const T*>(t.d_sum);
  const int64_t n = call.r1;
  const bool streamed = streams<T>(call, t.streams, t.d_x);
  for (int64_t r = 0; r < call.r0; ++r)
    for (int b = 0; b < batch.size; ++b) {
      if (!lines[b].fits) continue;
      const RunsOf<T> column(call, batch.first + b);
      const int64_t at = batch.starts[b] + r * call.k1 * n;
      T* d_x = static_cast<T*>(t.d_x) + at;
      const T* of_sum = d_sum ? d_sum + at : nullptr;
      if (!column.is_out(t.mask, r)) {
        const RunWeights w = weights_of(call, t.weight, t.bias, batch.places[b] + r * call.weight_r0, lines[b]);
        run_gradient<T, kRecovery, kMasked, kAct>(x + at, d_y + at, of_sum, d_x, n, lines[b], w, descents[b],
                                                  kMasked ? column.mask_of(t.mask, r) : nullptr, batch.ahead, streamed);
      } else if (of_sum) {
        std::memcpy(d_x, of_sum, n * sizeof(T));
      } else {
        std::memset(d_x, 0, n * sizeof(T));
      }
    }
  if (streamed) end_of_stream();
}

// The gradients of a batch of columns.
template <class T>
void backward_of_batch(const Call& call, const Batch& batch, const Backward& t, BatchGradients* sums,
                       const RunLoops<T>& loops) {
  Line lines[kBatch];
  for (int b = 0; b < batch.size; ++b) lines[b] = remembered(t.statistics, batch.first + b);
  loops.gradient_sums(call, batch, t, lines, sums);
  if (!t.d_x) return;
  const bool centers = call.normalizer == kStandardize;
  Descent descents[kBatch];
  for (int b = 0; b < batch.size; ++b) {
    const double n = divisor(call, count_of(call, t.statistics, batch.first + b));
    descents[b] = Descent(call, lines[b], centers ? sums->d[b] / n : 0, sums->dv[b] / n);
  }
  loops.gradient(call, batch, t, lines, descents);
  for (int b = 0; b < batch.size; ++b) {
    const RunsOf<T> column(call, batch.first + b);
    const double n = divisor(call, count_of(call, t.statistics, batch.first + b));
    if (!lines[b].fits) column_backward<T>(call, t, column.a, column.k, lines[b], n);
  }
}

// A weight for each element: blocks of columns are summed, and the blocks, in order.
template <class T>
bool runs_backward_by_element(const Call& call, const Backward& t, const Team& team, const RunLoops<T>& loops) {
  const int64_t columns = call.columns(), size = call.weight_size, stride = padded(size);
  const int64_t most = divided_up(call.size(), 4 * size);  // blocks whose sums take no more memory than x
  const int64_t least = divided_up(columns, most), usual = columns >= 4096 ? 128 : columns >= 64 ? 32 : 4;
  const int64_t block = usual > least ? usual : least, blocks = divided_up(columns, block);
  Scratch<double> partial(2 * blocks * stride);
  Scratch<float> own(2 * stride * blocks);
  if (!partial.data || !own.data) return false;
  const Batches batches(call, 2 * sizeof(T), kTogether / 4, call.r0 * call.r1 <= kItem ? kRowsTogether : 1);
  each(team, blocks, [&](int64_t item) {
    double* sums = partial.data + 2 * item * stride;
    float* floats = own.data + 2 * item * stride;
    std::memset(sums, 0, 2 * stride * sizeof(double));
    std::memset(floats, 0, 2 * stride * sizeof(float));
    ElementGradients elements{floats, floats + stride, sums, sums + stride, size, 0};
    BatchGradients of_batch = {};
    of_batch.elements = &elements;
    const int64_t last = columns < (item + 1) * block ? columns : (item + 1) * block;
    for (int64_t c = item * block; c < last; c += batches.size)
      backward_of_batch(call, batches.batch(c, last), t, &of_batch, loops);
    elements.flush();
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
  Batches(call, 2 * sizeof(T), kTogether / 4).each_of(team, [&](const Batch& batch) {
    BatchGradients of_batch = {};
    of_batch.run_d = d.data, of_batch.run_dv = dv.data;
    backward_of_batch(call, batch, t, &of_batch, loops);
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

template <class T, int kRecovery, bool kMasked, int kAct>
RunLoops<T> run_loops(bool centers) {
  return {kMasked,
          kRecovery != kConstant,
          centers ? batch_sums<T, true> : batch_sums<T, false>,
          exact_run_sums<T, kMasked>,
          batch_apply<T, kRecovery, kMasked, kAct>,
          given_apply<T, kAct>,
          batch_gradient_sums<T, kRecovery, kMasked, kAct>,
          batch_gradient<T, kRecovery, kMasked, kAct>};
}

}  // namespace
