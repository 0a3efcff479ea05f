// The gradients of columns that lie side by side; see lanes.h for how they are divided.
#pragma once

#include "lanes.h"

namespace {

// Fetch what the next chunk will read of a row.
template <class T>
inline void fetch_next(const T* from, int vectors) {
  for (int v = 0; v < vectors * kLanes * int(sizeof(T)); v += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(from + vectors * kLanes) + v);
}

// Add the sums of rows `first` to `last`, a panel at most, to the lanes' sums of d and of d * (x - high) * scale, for
// `vectors` vectors of lanes; with `kDown` d includes the weight.
template <class T, bool kDown, bool kMasked, int kAct, class Vectors, class Size>
NW_INLINE void add_panel(const Tile& tile, const Backward& t, T* d_x, int64_t first, int64_t last, const Lanes& lanes,
                         int64_t lane, Vectors vectors, Size size, F* row_weight, F* row_bias) {
  const T *x = static_cast<const T*>(t.x), *d_y = static_cast<const T*>(t.d_y);
  const bool by_row = !kMasked && t.mask;
  const int64_t stride = tile.call.lanes();
  F high[vectors], slope[vectors], shift[vectors], scale[vectors], sum[vectors], along[vectors];
  for (int v = 0; v < vectors; ++v) {
    const int64_t of_lane = lane + v * kLanes;
    high[v] = load_some(lanes.high + of_lane, size), scale[v] = load_some(lanes.scale + of_lane, size);
    slope[v] = load_some(lanes.slope + of_lane, size), shift[v] = load_some(lanes.shift + of_lane, size);
    sum[v] = along[v] = F{};
  }
  int64_t at = tile.at(first) + lane;
  for (int64_t j = first; j < last; ++j, at += stride) {
    if (by_row && tile.is_out(t.mask, j)) continue;
    if (kDown && lane + 2 * vectors * kLanes <= tile.width) fetch_next(x + at, vectors), fetch_next(d_y + at, vectors);
    const auto [weight, bias] = kDown ? tile.weights(t.weight, t.bias, j) : RowWeights{1, 0};
    for (int v = 0; v < vectors; ++v) {
      const int64_t of_lane = lane + v * kLanes;
      if (d_x) fetch_to_write(d_x + at + v * kLanes);
      F centred = load_some(x + at + v * kLanes, size) - high[v];
      F d = load_some(d_y + at + v * kLanes, size);
      if constexpr (kMasked) {
        const uint8_t* valid = tile.mask_of(t.mask, j) + of_lane;
        centred = keep(centred, valid, size), d = keep(d, valid, size);
      }
      if constexpr (kDown || kAct != kActNone) {
        const F value = fma(centred, slope[v], shift[v]);
        if constexpr (kAct != kActNone)
          d *= activation_slope<kAct>(kDown ? fma(value, F{} + weight, F{} + bias) : value, tile.call.activation);
        if constexpr (kDown) {
          row_weight[j - first] = fma(d, value, row_weight[j - first]);
          row_bias[j - first] += d;
          d *= weight;
        }
      }
      sum[v] += d;
      along[v] = fma(d, centred * scale[v], along[v]);  // exact but for the sum
    }
  }
  for (int v = 0; v < vectors; ++v) {
    add_some_to(lanes.first + lane + v * kLanes, sum[v], size);
    add_some_to(lanes.second + lane + v * kLanes, along[v], size);
  }
}

// Call body(row, end) for panels of rows.
template <class Body>
inline void in_panels(int64_t first, int64_t last, Body body) {
  for (int64_t row = first; row < last; row += kPanel) body(row, last - row < kPanel ? last : row + kPanel);
}

template <class T, bool kDown, bool kMasked, int kAct>
void lane_gradient_sums(const Tile& tile, const Backward& t, T* d_x, int64_t first, int64_t last, const Lanes& lanes,
                        const RowSums& row_sums) {
  std::memset(lanes.first, 0, tile.width * sizeof(double));
  std::memset(lanes.second, 0, tile.width * sizeof(double));
  if constexpr (kDown)
    in_panels(first, last, [&](int64_t row, int64_t end) {
      F row_weight[kPanel] = {}, row_bias[kPanel] = {};
      in_chunks(tile.width, [&](int64_t lane, auto vectors, auto size) {
        add_panel<T, kDown, kMasked, kAct>(tile, t, d_x, row, end, lanes, lane, vectors, size, row_weight, row_bias);
      });
      for (int64_t j = row; j < end; ++j) {
        row_sums.d_weight[j] = total(row_weight[j - row]);
        row_sums.d_bias[j] = total(row_bias[j - row]);
      }
    });
  else
    in_chunks<2 * kWide>(tile.width, [&](int64_t lane, auto vectors, auto size) {
      in_panels(first, last, [&](int64_t row, int64_t end) {
        add_panel<T, kDown, kMasked, kAct>(tile, t, d_x, row, end, lanes, lane, vectors, size, nullptr, nullptr);
      });
    });
}

// high, slope and shift, as in the forward, the inverse and the scale.
template <class T>
bool prepare_lines(const Tile& tile, const Backward& t, const Lanes& lanes) {
  const double* inverse = t.statistics.inverse + tile.column(0);
  for (int64_t k = 0; k < tile.columns(); ++k)
    for (int64_t lane = k * tile.call.r1; lane < (k + 1) * tile.call.r1; ++lane) {
      lanes.inverse[lane] = float(inverse[k]);
      lanes.scale[lane] = bit_cast<float>(bit_cast<uint32_t>(float(inverse[k])) & 0x7f800000u);
    }
  Forward given{};
  given.weight = t.weight;
  given.bias = t.bias;
  given.statistics = t.statistics;
  Call remembers = tile.call;
  remembers.measured = 0;
  return prepare_lanes<T>(Tile{remembers, tile.a, tile.lane, tile.width, tile.cached}, given, nullptr, lanes);
}

// The sums of columns that float cannot hold, once more, in double; with `kDown` those of all rows as well.
template <class T>
void mend_gradient_sums(const Tile& tile, const Backward& t, const Lanes& lanes, const RowSums& row_sums) {
  const Call& call = tile.call;
  const T *x = static_cast<const T*>(t.x), *d_y = static_cast<const T*>(t.d_y);
  const bool down = row_sums.d_weight;
  for (int64_t r = 0; down && r < call.r0; ++r) row_sums.d_weight[r] = row_sums.d_bias[r] = 0;
  for (int64_t lane = 0; lane < tile.width; ++lane) {
    const int64_t k = (tile.lane + lane) / call.r1, s = lane % call.r1;
    const Line line = remembered(t.statistics, tile.a * call.k1 + k);
    if (line.fits && !down) continue;
    double first = 0, second = 0;
    for (int64_t r = 0; r < call.r0; ++r) {
      if (t.mask && !t.mask[call.mask_at(tile.a, r, k, s)]) continue;
      const int64_t at = tile.at(r) + lane, w = call.weight_at(tile.a, r, k, s);
      const double value = (double(to_float(x[at])) - line.mean) * line.exact_inverse,
                   weight = t.weight ? t.weight[w] : 1;
      double d = to_float(d_y[at]) * activated_slope(value * weight + (t.bias ? t.bias[w] : 0), call.activation);
      if (down) {
        row_sums.d_weight[r] += d * value;
        row_sums.d_bias[r] += d;
        d *= weight;
      }
      first += d;
      second += d * value;
    }
    if (!line.fits) lanes.first[lane] = first, lanes.second[lane] = second;
  }
}

// From the sums of kHalf columns of one lane each: as `descend_column`.
inline void descend_columns(const Tile& tile, const Backward& t, const Lanes& lanes, int64_t k) {
  const Call& call = tile.call;
  const int64_t column = tile.column(k);
  const D mean = t.statistics.mean ? load(t.statistics.mean + column) : D{};
  const D inverse = load(t.statistics.inverse + column), low = widen(narrow(mean - widen(narrow(mean))));
  const H weight = of_columns(call, t.weight, tile.a, tile.lane + k, 1);
  const D first = load(lanes.first + k), sum = load(lanes.second + k), scale = widen(load<H>(lanes.scale + k));
  const D second = is_within_float(inverse) ? (sum / scale - low * first) * inverse : sum;  // or mended already
  D n = D{} + 1;
  if (call.normalizer != kL2) {
    n = t.statistics.count ? load(t.statistics.count + column) : D{} + double(call.r0);
    n = n > 0 ? n : D{} + 1;
  }
  const bool centers = call.normalizer == kStandardize;
  const D mean_d = call.measured && centers ? first * widen(weight) / n : D{};
  const D along = call.measured ? -inverse * (second * widen(weight) / n) : D{};
  store(lanes.second + k, second);
  store(lanes.along + k, narrow(along));
  store(lanes.level + k, call.measured ? narrow(-mean_d - along * low) : H{});
  store(lanes.weight + k, weight);
}

// From a column's sums: the gradients of weight and bias for each lane, left in the sums, and what d_x is made of.
inline void descend_column(const Tile& tile, const Backward& t, const Lanes& lanes, int64_t k) {
  const Call& call = tile.call;
  const Line line = remembered(t.statistics, tile.column(k));
  double d = 0, dv = 0;
  for (int64_t s = 0; s < call.r1; ++s) {
    const int64_t lane = k * call.r1 + s, index = call.weight_at(tile.a, 0, tile.lane / call.r1 + k, s);
    const float weight = t.weight && !call.weight_r0 ? t.weight[index] : 1;
    if (line.fits)  // otherwise it has been mended
      lanes.second[lane] = (lanes.second[lane] / lanes.scale[lane] - line.low * lanes.first[lane]) * line.exact_inverse;
    lanes.weight[lane] = weight;
    d = s ? d + lanes.first[lane] * weight : lanes.first[lane] * weight;  // whose sign counts if it is 0
    dv = s ? dv + lanes.second[lane] * weight : lanes.second[lane] * weight;
  }
  const double n = divisor(call, count_of(call, t.statistics, tile.column(k)));
  const bool centers = call.normalizer == kStandardize;
  const Descent descent(call, line, centers ? d / n : 0, dv / n);
  for (int64_t lane = k * call.r1; lane < (k + 1) * call.r1; ++lane) {
    lanes.along[lane] = descent.along;
    lanes.level[lane] = descent.level;
  }
}

inline void descend(const Tile& tile, const Backward& t, const Lanes& lanes) {
  int64_t k = 0;
  for (; tile.call.r1 == 1 && k + kHalf <= tile.columns(); k += kHalf) descend_columns(tile, t, lanes, k);
  for (; k < tile.columns(); ++k) descend_column(tile, t, lanes, k);
}

// d_x of rows `first` to `last` of a tile.
template <class T, bool kDown, bool kMasked, int kAct>
void lane_gradient(const Tile& given, const Backward& t, int64_t first, int64_t last, const Lanes& lanes) {
  const Call call = given.call;  // copies of its own, which no store can change
  const Tile tile{call, given.a, given.lane, given.width, given.cached};
  const float *row_weights = t.weight, *row_biases = t.bias;
  const uint8_t* mask = t.mask;
  T* d_x = static_cast<T*>(t.d_x);
  const bool by_row = !kMasked && mask, measured = call.measured;
  const T *x = static_cast<const T*>(t.x), *d_y = static_cast<const T*>(t.d_y), *d_sum = static_cast<const T*>(t.d_sum);
  const Order order(first, last, tile);
  for (int64_t row = order.begin; row != order.end; row += order.stride)
    in_chunks(tile.width, [&](int64_t lane, auto vectors, auto size) {
      F high[vectors], along[vectors], level[vectors], inverse[vectors], weights[vectors];
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = lane + v * kLanes;
        high[v] = load_some(lanes.high + at, size), along[v] = load_some(lanes.along + at, size);
        level[v] = load_some(lanes.level + at, size), inverse[v] = load_some(lanes.inverse + at, size);
        weights[v] = load_some(lanes.weight + at, size);
      }
      for (int64_t j = row; j != row + order.stride; j += order.step) {
        const int64_t row_at = tile.at(j) + lane;
        const bool out = by_row && tile.is_out(mask, j);
        const auto [weight, bias] = kDown ? tile.weights(row_weights, row_biases, j) : RowWeights{1, 0};
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = row_at + v * kLanes;
          const F centred = load_some(x + at, size) - high[v];
          F d = load_some(d_y + at, size);
          if constexpr (kAct != kActNone) {
            const int64_t of_lane = lane + v * kLanes;
            const F value =
                fma(centred, load_some(lanes.slope + of_lane, size), load_some(lanes.shift + of_lane, size));
            d *= activation_slope<kAct>(kDown ? fma(value, F{} + weight, F{} + bias) : value, call.activation);
          }
          d *= kDown ? F{} + weight : weights[v];
          F gradient = (d + fma(only(centred, measured), along[v], level[v])) * inverse[v];
          if constexpr (kMasked) gradient = keep(gradient, tile.mask_of(mask, j) + lane + v * kLanes, size);
          if (out) gradient = F{};
          if (d_sum) gradient += load_some(d_sum + at, size);
          store_some(d_x + at, gradient, size);
        }
      }
    });
}

template <class T>
void mend_backward(const Tile& tile, const Backward& t) {
  for (int64_t k = 0; k < tile.columns(); ++k) {
    const Line line = remembered(t.statistics, tile.column(k));
    const double n = divisor(tile.call, count_of(tile.call, t.statistics, tile.column(k)));
    if (!line.fits) column_backward<T>(tile.call, t, tile.a, tile.lane / tile.call.r1 + k, line, n);
  }
}

// Sums for the parameters' gradients: of each lane of each a, or with `kDown` of each row of each tile.
struct ParameterParts {
  Scratch<double> d_weight, d_bias;
  explicit ParameterParts(int64_t n) : d_weight(n), d_bias(n) {}
  bool ok() const { return d_weight.data && d_bias.data; }
};

// One thread has the tile.
template <class T>
void tile_backward(const Tile& tile, const Backward& t, const ParameterParts& parts, int64_t item,
                   const LaneLoops<T>& loops) {
  const Call& call = tile.call;
  TileLanes own, piece;
  const Lanes lanes = own.lanes();
  const bool all_fit = prepare_lines<T>(tile, t, lanes);
  Lanes part = piece.lanes();
  part.high = lanes.high, part.slope = lanes.slope, part.shift = lanes.shift, part.scale = lanes.scale;
  clear_sums(lanes, tile.width);
  RowSums row_sums{nullptr, nullptr};
  if (loops.down) {
    row_sums = {parts.d_weight.data + item * call.r0, parts.d_bias.data + item * call.r0};
    std::memset(row_sums.d_weight, 0, call.r0 * sizeof(double));
    std::memset(row_sums.d_bias, 0, call.r0 * sizeof(double));
  }
  for (int64_t p = 0; p < pieces_of(call); ++p) {
    loops.gradient_sums(tile, t, output_to_fetch<T>(call, t.d_x), p * kRowsOfPiece, end_of(call, p), part, row_sums);
    add_piece(part, lanes, tile.width, false);
  }
  if (!all_fit) mend_gradient_sums<T>(tile, t, lanes, row_sums);
  descend(tile, t, lanes);
  if (!loops.down) {
    std::memcpy(parts.d_bias.data + tile.place(), lanes.first, tile.width * sizeof(double));
    std::memcpy(parts.d_weight.data + tile.place(), lanes.second, tile.width * sizeof(double));
  }
  if (!t.d_x) return;
  loops.gradient(tile, t, 0, call.r0, lanes);
  if (!all_fit) mend_backward<T>(tile, t);
}

// All threads sum pieces, then all apply. Not with one weight a row.
template <class T>
bool backward_together(const Tiling& tiling, const Backward& t, const ParameterParts& parts, const Team& team,
                       const LaneLoops<T>& loops) {
  const Call& call = tiling.call;
  const int64_t pieces = pieces_of(call), tiles = tiling.tiles();
  const SharedLanes shared(call.k0 * call.lanes(), pieces);
  Scratch<uint8_t> fits(tiles);
  if (!shared.ok() || !fits.data) return false;
  each(team, tiles, [&](int64_t item) {
    const Tile tile = tiling.tile(item);
    const Lanes lanes = shared.part(0).from(tile.place());
    clear_sums(lanes, tile.width);
    fits.data[item] = prepare_lines<T>(tile, t, lanes);
  });
  each(team, tiles * pieces, [&](int64_t item) {
    const Tile tile = tiling.tile(item % tiles);
    const int64_t p = item / tiles;
    const Lanes part = shared.part(p + 1).from(tile.place());
    loops.gradient_sums(tile, t, nullptr, p * kRowsOfPiece, end_of(call, p), part, {nullptr, nullptr});
  });
  each(team, tiles, [&](int64_t item) {
    const Tile tile = tiling.tile(item);
    const Lanes lanes = shared.part(0).from(tile.place());
    for (int64_t p = 0; p < pieces; ++p) add_piece(shared.part(p + 1).from(tile.place()), lanes, tile.width, false);
    if (!fits.data[item]) mend_gradient_sums<T>(tile, t, lanes, {nullptr, nullptr});
    descend(tile, t, lanes);
    std::memcpy(parts.d_bias.data + tile.place(), lanes.first, tile.width * sizeof(double));
    std::memcpy(parts.d_weight.data + tile.place(), lanes.second, tile.width * sizeof(double));
  });
  if (!t.d_x) return true;
  each(
      team, tiles * pieces,
      [&](int64_t item) {
        const Tile tile = tiling.tile(item % tiles);
        const int64_t p = item / tiles;
        loops.gradient(tile, t, p * kRowsOfPiece, end_of(call, p), shared.part(0).from(tile.place()));
      },
      true);
  for (int64_t item = 0; item < tiles; ++item)
    if (!fits.data[item]) mend_backward<T>(tiling.tile(item), t);
  return true;
}

// Add what belongs to one weight, in order.
inline bool add_parts(const Tiling& tiling, const Backward& t, const ParameterParts& parts, bool down) {
  const Call& call = tiling.call;
  Scratch<double> sums(2 * call.weight_size);
  if (!sums.data) return false;
  double *weight = sums.data, *bias = sums.data + call.weight_size;
  std::memset(sums.data, 0, 2 * call.weight_size * sizeof(double));
  // `count` places from `place` on, whose weights are `step` apart
  const auto put = [&](int64_t index, int64_t step, int64_t place, int64_t count) {
    for (int64_t j = 0; j < count; ++j) weight[index + j * step] += parts.d_weight.data[place + j];
    for (int64_t j = 0; j < count; ++j) bias[index + j * step] += parts.d_bias.data[place + j];
  };
  if (down) {
    for (int64_t item = 0; item < tiling.tiles(); ++item)
      put(call.weight_at(item / tiling.each_a, 0, 0, 0), call.weight_r0, item * call.r0, call.r0);
  } else if (call.r1 == 1) {
    const int64_t period = call.weight_k1 ? call.period_k1 : call.k1;
    for (int64_t a = 0; a < call.k0; ++a)
      for (int64_t k = 0; k < call.k1; k += period)
        put(call.weight_at(a, 0, k, 0), call.weight_k1, a * call.k1 + k, period < call.k1 - k ? period : call.k1 - k);
  } else {
    for (int64_t a = 0; a < call.k0; ++a)
      for (int64_t k = 0; k < call.k1; ++k)
        put(call.weight_at(a, 0, k, 0), call.weight_r1, (a * call.k1 + k) * call.r1, call.r1);
  }
  for (int64_t e = 0; e < call.weight_size; ++e) {
    if (t.d_weight) t.d_weight[e] = float(weight[e]);
    if (t.d_bias) t.d_bias[e] = float(bias[e]);
  }
  return true;
}

template <class T>
bool lanes_backward(const Call& call, const Backward& t, const Team& team, const LaneLoops<T>& loops) {
  constexpr int64_t kBytes = 2 * sizeof(T);  // x and d_y
  const Tiling cached = cached_tiling(call, kBytes);
  const bool together = !loops.down && goes_together(cached, team, kBytes);
  const Tiling tiling = together ? wide_tiling(call) : cached;
  const ParameterParts parts(loops.down ? tiling.tiles() * call.r0 : call.k0 * call.lanes());
  if (!parts.ok()) return false;
  if (together) {
    if (!backward_together(tiling, t, parts, team, loops)) return false;
  } else {
    each(team, tiling.tiles(), [&](int64_t item) { tile_backward(tiling.tile(item), t, parts, item, loops); });
  }
  return !(t.d_weight || t.d_bias) || add_parts(tiling, t, parts, loops.down);
}

template <class T, bool kDown, bool kMasked, int kAct>
LaneLoops<T> lane_loops() {
  return {kDown, lane_sums<T, kMasked>, lane_apply<T, kDown, kMasked, kAct>,
          lane_gradient_sums<T, kDown, kMasked, kAct>, lane_gradient<T, kDown, kMasked, kAct>};
}

}  // namespace
