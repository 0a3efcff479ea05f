// Columns that lie side by side: RK, KRK, KRKR, and RKR with short runs; see tiles.h for how they are divided.
#pragma once

#include "activations.h"
#include "batches.h"
#include "call.h"
#include "column.h"
#include "team.h"
#include "tiles.h"
#include "vectors.h"

namespace {

// Sums that belong to rows: with one weight and bias for each row, their gradients.
struct RowSums {
  double *d_weight, *d_bias;  // (r0,) each
};

template <class Size>
inline void add_some_to(double* to, F v, Size size) {
  size == kLanes ? add_to(to, v) : add_part_to(to, v, size);
}

// The output, if its memory is not in a cache already and is to be asked for while sums are made.
template <class T>
inline T* output_to_fetch(const Call& call, void* output) {
  return call.size() * int64_t(sizeof(T)) > (1 << 20) ? static_cast<T*>(output) : nullptr;
}

// Numbers near the columns' means, in all lanes of each: the mean of the first rows, or with a mask an element.
template <class T>
void find_anchors(const Tile& tile, const T* x, const uint8_t* mask, const Lanes& lanes) {
  const Call& call = tile.call;
  const int64_t rows = call.r0 < kGuessed ? call.r0 : kGuessed;
  if (!mask)
    in_chunks(tile.width, [&](int64_t lane, auto vectors, auto size) {
      for (int v = 0; v < vectors; ++v) {
        F sum = {};
        for (int64_t j = 0; j < rows; ++j) sum += load_some(x + tile.at(j) + lane + v * kLanes, size);
        store_some(lanes.anchor + lane + v * kLanes, sum / float(rows), size);
      }
    });
  if (!mask && call.r1 == 1) return;
  for (int64_t k = 0; k < tile.columns(); ++k) {
    float* of_column = lanes.anchor + k * call.r1;
    float anchor = 0;
    if (mask)
      anchor = float(RunsOf<T>(call, tile.a, tile.lane / call.r1 + k).shift(x, mask));
    else
      for (int64_t s = 0; s < call.r1; ++s) anchor += of_column[s] / float(call.r1);
    for (int64_t s = 0; s < call.r1; ++s) of_column[s] = anchor;
  }
}

// The sums of rows `first` to `last`; meanwhile ask for the memory that will be written, if `y` is given. Chunk by
// chunk down all rows: the processor sees one stride.
template <class T, bool kMasked>
void lane_sums(const Tile& tile, const T* x, T* y, const uint8_t* mask, int64_t first, int64_t last,
               const Lanes& lanes) {
  std::memset(lanes.first, 0, tile.width * sizeof(double));
  std::memset(lanes.second, 0, tile.width * sizeof(double));
  const bool by_row = !kMasked && mask;
  const int64_t stride = tile.call.lanes();
  in_chunks<2 * kWide>(tile.width, [&](int64_t lane, auto vectors, auto size) {
    F anchor[vectors];
    for (int v = 0; v < vectors; ++v) anchor[v] = load_some(lanes.anchor + lane + v * kLanes, size);
    const T* from = x + tile.at(first) + lane;
    for (int64_t row = first; row < last; row += kPanel) {
      F sum[vectors], square[vectors];
      for (int v = 0; v < vectors; ++v) sum[v] = square[v] = F{};
      const int64_t end = last - row < kPanel ? last : row + kPanel;
      for (int64_t j = row; j < end; ++j, from += stride) {
        if (by_row && tile.is_out(mask, j)) continue;
        for (int v = 0; v < vectors; ++v) {
          if (y) fetch_to_write(y + (from - x) + v * kLanes);
          F d = load_some(from + v * kLanes, size) - anchor[v];
          if constexpr (kMasked) d = keep(d, tile.mask_of(mask, j) + lane + v * kLanes, size);
          sum[v] += d;
          square[v] = fma(d, d, square[v]);
        }
      }
      for (int v = 0; v < vectors; ++v) {
        add_some_to(lanes.first + lane + v * kLanes, sum[v], size);
        add_some_to(lanes.second + lane + v * kLanes, square[v], size);
      }
    }
  });
  if (!mask) return;
  std::memset(lanes.count, 0, tile.width * sizeof(int64_t));
  for (int64_t row = first; row < last; ++row) {
    const uint8_t* valid = tile.mask_of(mask, row);
    for (int64_t lane = 0; lane < tile.width; ++lane) lanes.count[lane] += valid[kMasked ? lane : 0] != 0;
  }
}

// The statistics of a column from the sums of its lanes, or from the column itself where those are not to be trusted.
template <class T>
void measure_column(const Tile& tile, const Forward& t, const T* x, const Lanes& lanes, int64_t k) {
  const Call& call = tile.call;
  const int64_t from = k * call.r1;
  Sums sums;
  for (int64_t s = 0; s < call.r1; ++s) {
    sums.sum += lanes.first[from + s];
    sums.square += lanes.second[from + s];
    sums.count += t.mask ? lanes.count[from + s] : call.r0;
  }
  if (trusted(sums, call.normalizer == kStandardize)) {
    measured(call, sums, lanes.anchor[from], t.statistics, tile.column(k));
    return;
  }
  const RunsOf<T> column(call, tile.a, tile.lane / call.r1 + k);
  const double shift = call.normalizer == kStandardize ? column.shift(x, t.mask) : 0;
  measured(call, column.exact_sums(x, t.mask, shift), shift, t.statistics, tile.column(k));
}

// What stands in a parameter for kHalf neighbouring columns of one lane each.
inline H of_columns(const Call& call, const float* parameter, int64_t a, int64_t k, float otherwise) {
  if (!parameter || call.weight_r0) return H{} + otherwise;
  if (call.weight_k1 == 1 && k % call.period_k1 + kHalf <= call.period_k1)
    return load<H>(parameter + call.weight_at(a, 0, k, 0));
  H found;
  for (int lane = 0; lane < kHalf; ++lane) found[lane] = parameter[call.weight_at(a, 0, k + lane, 0)];
  return found;
}

// Statistics of kHalf columns of one lane each, as `measure_column` finds them; false if their sums are not to be
// trusted.
inline bool measure_columns(const Tile& tile, const Forward& t, const Lanes& lanes, int64_t k) {
  const Call& call = tile.call;
  const Statistics& out = t.statistics;
  const int64_t column = tile.column(k);
  const D sum = load(lanes.first + k), square = load(lanes.second + k);
  D count = D{} + double(call.r0);
  for (int lane = 0; t.mask && lane < kHalf; ++lane) count[lane] = double(lanes.count[k + lane]);
  if (!all(trusted(sum, square, count, call.normalizer == kStandardize))) return false;
  const Found<D> found(call, sum, square, count, widen(load<H>(lanes.anchor + k)));
  if (out.mean) store(out.mean + column, found.mean);
  if (out.inverse) store(out.inverse + column, found.inverse);
  if (out.m2) store(out.m2 + column, found.m2);
  if (out.count) store(out.count + column, count);
  return true;
}

// The lines of kHalf columns of one lane each, from their statistics; whether all fit.
inline bool prepare_columns(const Tile& tile, const Forward& t, const Lanes& lanes, int64_t k) {
  const Call& call = tile.call;
  const int64_t column = tile.column(k), of_a = tile.lane + k;
  const D mean = t.statistics.mean ? load(t.statistics.mean + column) : D{};
  const D inverse = load(t.statistics.inverse + column);
  const D weight = widen(of_columns(call, t.weight, tile.a, of_a, 1));
  const D bias = widen(of_columns(call, t.bias, tile.a, of_a, 0));
  const H high = narrow(mean);
  const D low = widen(narrow(mean - widen(high)));
  store(lanes.high + k, high);
  store(lanes.slope + k, narrow(inverse * weight));
  store(lanes.shift + k, narrow(bias - low * inverse * weight));
  return all(is_within_float(inverse) & (call.weight_r0 ? is_within_float(inverse) : has_slope(inverse, weight)));
}

// Whether float holds a column's line, and with each of its weights.
inline bool fits(const Tile& tile, const Forward& t, const Line& line, int64_t k) {
  const Call& call = tile.call;
  bool good = line.fits;
  for (int64_t s = 0; t.weight && !call.weight_r0 && s < call.r1; ++s)
    good &= has_slope(line.exact_inverse, double(t.weight[call.weight_at(tile.a, 0, tile.lane / call.r1 + k, s)]));
  return good;
}

// The line of a column, in its lanes; whether it fits.
inline bool prepare_column(const Tile& tile, const Forward& t, const Lanes& lanes, int64_t k) {
  const Call& call = tile.call;
  const Line line = remembered(t.statistics, tile.column(k));
  for (int64_t s = 0; s < call.r1; ++s) {
    const int64_t lane = k * call.r1 + s, index = call.weight_at(tile.a, 0, tile.lane / call.r1 + k, s);
    const bool here = !call.weight_r0;
    const float weight = here && t.weight ? t.weight[index] : 1, bias = here && t.bias ? t.bias[index] : 0;
    lanes.high[lane] = line.high;
    lanes.slope[lane] = line.slope(weight);
    lanes.shift[lane] = line.shift(weight, bias);
  }
  return fits(tile, t, line, k);
}

// What the lanes are normalized with: the batch's statistics, from the sums in the lanes, or given ones.
template <class T>
bool prepare_lanes(const Tile& tile, const Forward& t, const T* x, const Lanes& lanes) {
  const bool measures = tile.call.measured, alone = tile.call.r1 == 1;
  bool all_fit = true;
  for (int64_t k = 0; k < tile.columns();) {
    if (alone && k + kHalf <= tile.columns() && (!measures || measure_columns(tile, t, lanes, k))) {
      all_fit &= prepare_columns(tile, t, lanes, k);
      k += kHalf;
      continue;
    }
    if (measures) measure_column(tile, t, x, lanes, k);
    all_fit &= prepare_column(tile, t, lanes, k);
    ++k;
  }
  return all_fit;
}

// Normalize rows `first` to `last` of a tile. With `kDown` each row has one weight and bias of its own.
template <class T, bool kDown, bool kMasked, int kAct>
void lane_apply(const Tile& given, const Forward& t, const T* x, int64_t first, int64_t last, const Lanes& lanes) {
  const Call call = given.call;  // copies of its own, which no store can change
  const Tile tile{call, given.a, given.lane, given.width, given.cached};
  const float *weights = t.weight, *biases = t.bias;
  const uint8_t* mask = t.mask;
  T* y = static_cast<T*>(t.y);
  const int activation = call.activation;
  const bool by_row = !kMasked && mask;
  const Order order(first, last, tile);
  for (int64_t row = order.begin; row != order.end; row += order.stride)
    in_chunks<kDown ? kWide : 2 * kWide>(tile.width, [&](int64_t lane, auto vectors, auto size) {
      F high[vectors], slope[vectors], shift[vectors];
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = lane + v * kLanes;
        high[v] = load_some(lanes.high + at, size), slope[v] = load_some(lanes.slope + at, size);
        shift[v] = load_some(lanes.shift + at, size);
      }
      for (int64_t j = row; j != row + order.stride; j += order.step) {
        const bool out = by_row && tile.is_out(mask, j);
        const auto [weight, bias] = kDown ? tile.weights(weights, biases, j) : RowWeights{1, 0};
        const int64_t at = tile.at(j) + lane;
        for (int v = 0; v < vectors; ++v) {
          F z = fma(load_some(x + at + v * kLanes, size) - high[v], slope[v], shift[v]);
          if constexpr (kDown) z = fma(z, F{} + weight, F{} + bias);
          z = activate<kAct>(z, activation);
          if constexpr (kMasked) z = keep(z, tile.mask_of(mask, j) + lane + v * kLanes, size);
          store_some(y + at + v * kLanes, out ? F{} : z, size);
        }
      }
    });
}

// The loops over rows, for one recovery, mask and activation; the rest is compiled once for each dtype.
template <class T>
struct LaneLoops {
  bool down;  // whether rows have a weight and bias of their own, and lanes none
  void (*sums)(const Tile&, const T*, T*, const uint8_t*, int64_t, int64_t, const Lanes&);
  void (*apply)(const Tile&, const Forward&, const T*, int64_t, int64_t, const Lanes&);
  void (*gradient_sums)(const Tile&, const Backward&, T*, int64_t, int64_t, const Lanes&, const RowSums&);
  void (*gradient)(const Tile&, const Backward&, int64_t, int64_t, const Lanes&);
};

// Columns that float cannot hold, once more, in double.
template <class T>
void mend_forward(const Tile& tile, const Forward& t, const T* x) {
  for (int64_t k = 0; k < tile.columns(); ++k) {
    const Line line = remembered(t.statistics, tile.column(k));
    if (!fits(tile, t, line, k)) column_forward<T>(tile.call, t, x, tile.a, tile.lane / tile.call.r1 + k, line);
  }
}

template <class T>
void add_rows(const Tile& tile, const Forward& t, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = tile.at(row);
    add_residual(static_cast<const T*>(t.x) + at, static_cast<const T*>(t.residual) + at, static_cast<T*>(t.sum) + at,
                 tile.width);
  }
}

// One thread has the tile.
template <class T>
void tile_forward(const Tile& tile, const Forward& t, const LaneLoops<T>& loops) {
  const Call& call = tile.call;
  TileLanes own, piece;
  const Lanes lanes = own.lanes();
  const T* x = static_cast<const T*>(t.residual ? t.sum : t.x);
  if (t.residual) add_rows<T>(tile, t, 0, call.r0);
  if (call.measured) {
    Lanes part = piece.lanes();
    if (call.normalizer == kStandardize)
      find_anchors(tile, x, t.mask, lanes);
    else
      std::memset(lanes.anchor, 0, tile.width * sizeof(float));
    part.anchor = lanes.anchor;
    clear_sums(lanes, tile.width);
    for (int64_t p = 0; p < pieces_of(call); ++p) {
      loops.sums(tile, x, output_to_fetch<T>(call, t.y), t.mask, p * kRowsOfPiece, end_of(call, p), part);
      add_piece(part, lanes, tile.width, t.mask);
    }
  }
  const bool all_fit = prepare_lanes(tile, t, x, lanes);
  loops.apply(tile, t, x, 0, call.r0, lanes);
  if (!all_fit) mend_forward(tile, t, x);
}

// All threads measure pieces, then all apply.
template <class T>
bool forward_together(const Tiling& tiling, const Forward& t, const Team& team, const LaneLoops<T>& loops) {
  const Call& call = tiling.call;
  const int64_t pieces = pieces_of(call), tiles = tiling.tiles();
  const SharedLanes shared(call.k0 * call.lanes(), call.measured ? pieces : 0);
  if (!shared.ok()) return false;
  const T* x = static_cast<const T*>(t.residual ? t.sum : t.x);
  if (t.residual)
    each(team, tiles * pieces, [&](int64_t item) {
      const int64_t p = item / tiles;
      add_rows<T>(tiling.tile(item % tiles), t, p * kRowsOfPiece, end_of(call, p));
    });
  if (call.measured) {
    each(team, tiles, [&](int64_t item) {
      const Tile tile = tiling.tile(item);
      const Lanes lanes = shared.part(0).from(tile.place());
      clear_sums(lanes, tile.width);
      if (call.normalizer == kStandardize)
        find_anchors(tile, x, t.mask, lanes);
      else
        std::memset(lanes.anchor, 0, tile.width * sizeof(float));
    });
    each(team, tiles * pieces, [&](int64_t item) {
      const Tile tile = tiling.tile(item % tiles);
      const int64_t p = item / tiles;
      loops.sums(tile, x, nullptr, t.mask, p * kRowsOfPiece, end_of(call, p), shared.part(p + 1).from(tile.place()));
    });
  }
  Scratch<uint8_t> fits(tiles);
  if (!fits.data) return false;
  each(team, tiles, [&](int64_t item) {
    const Tile tile = tiling.tile(item);
    const Lanes lanes = shared.part(0).from(tile.place());
    for (int64_t p = 0; call.measured && p < pieces; ++p)
      add_piece(shared.part(p + 1).from(tile.place()), lanes, tile.width, t.mask);
    fits.data[item] = prepare_lanes(tile, t, x, lanes);
  });
  each(
      team, tiles * pieces,
      [&](int64_t item) {
        const Tile tile = tiling.tile(item % tiles);
        const int64_t p = item / tiles;
        loops.apply(tile, t, x, p * kRowsOfPiece, end_of(call, p), shared.part(0).from(tile.place()));
      },
      true);
  for (int64_t item = 0; item < tiles; ++item)
    if (!fits.data[item]) mend_forward(tiling.tile(item), t, x);
  return true;
}

template <class T>
bool lanes_forward(const Call& call, const Forward& t, const Team& team, const LaneLoops<T>& loops) {
  const Tiling cached = cached_tiling(call, sizeof(T)), wide = wide_tiling(call);
  if (pieces_of(call) > 1 && (!call.measured || goes_together(cached, team, sizeof(T))))
    return forward_together(wide, t, team, loops);
  const Tiling& tiling = call.measured ? cached : wide;
  each(team, tiling.tiles(), [&](int64_t item) { tile_forward(tiling.tile(item), t, loops); });
  return true;
}

}  // namespace
