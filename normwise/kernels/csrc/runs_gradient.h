// The gradients of columns whose samples lie in contiguous runs; see batches.h for how they are divided.
#pragma once

#include "runs_sums.h"

namespace {

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
  int64_t e = unaligned(d_x, n);
  if (e) store_part(d_x, one(0, int(e)), int(e));
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
