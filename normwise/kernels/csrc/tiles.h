// Columns that lie side by side, as rectangles of rows and lanes: what a thread works on, and in which order.
//
// A lane is one place (k, s) of a row; a column is r1 neighbouring lanes, down all rows. Rows are measured in pieces,
// so that a lane's sums are in one order whether one thread has the column or many have a piece each. Where there are
// tiles of lanes enough, and they fit the cache, one thread has a tile, and its second look hits the cache. Otherwise
// all threads measure, then all apply.
#pragma once

#include <cstring>
#include <type_traits>

#include "call.h"
#include "column.h"
#include "team.h"
#include "vectors.h"

namespace {

constexpr int64_t kTile = 512;               // lanes of a tile that one thread has, at most
constexpr int64_t kRow = 1024;               // lanes of a tile whose pieces all threads share, at most
constexpr int64_t kRowsOfPiece = 512;        // rows that are summed before they are added to the lane's sums
constexpr int64_t kPanel = 32;               // rows that are summed as floats, in registers
constexpr int64_t kCache = 1 << 19;          // bytes that a tile may have, so that the second look at it hits the cache
constexpr int kWide = kLanes == 16 ? 4 : 2;  // vectors of lanes that are worked on side by side
constexpr int64_t kStrip = 2 * kWide * kLanes;  // lanes that are worked on side by side at most

// Arrays with a place for each lane. `slope` and `shift`: y = (x - high) * slope + shift. Where weights run down the
// rows, the value before recovery is (x - high) * slope + shift.
struct Lanes {
  float *anchor, *high, *slope, *shift, *along, *level, *inverse, *weight;
  float* scale;            // a power of two near the inverse
  double *first, *second;  // sums: of x - anchor and its square; backward: of d and d * (x - high) * scale
  int64_t* count;

  Lanes from(int64_t lane) const {
    return {anchor + lane,  high + lane,   slope + lane, shift + lane, along + lane,  level + lane,
            inverse + lane, weight + lane, scale + lane, first + lane, second + lane, count + lane};
  }
};

// Lanes of one tile, on the stack.
struct alignas(kLine) TileLanes {
  float floats[9][kTile];
  double doubles[2][kTile];
  int64_t counts[kTile];

  Lanes lanes() {
    return {floats[0], floats[1], floats[2], floats[3],  floats[4],  floats[5],
            floats[6], floats[7], floats[8], doubles[0], doubles[1], counts};
  }
};

// Arrays for all lanes of all a, and sums for all pieces.
struct SharedLanes {
  Scratch<float> floats;
  Scratch<double> doubles;
  Scratch<int64_t> counts;
  int64_t lanes;  // of all a

  SharedLanes(int64_t lanes_, int64_t pieces)
      : floats(9 * padded(lanes_)),
        doubles(2 * padded(lanes_) * (pieces + 1)),
        counts(padded(lanes_) * (pieces + 1)),
        lanes(padded(lanes_)) {}
  bool ok() const { return floats.data && doubles.data && counts.data; }
  // Sums of piece p - 1; p = 0: of all pieces.
  Lanes part(int64_t p) const {
    float* f = floats.data;
    double* d = doubles.data + 2 * lanes * p;
    const auto row = [&](int i) { return f + i * lanes; };
    return {row(0), row(1), row(2), row(3), row(4),    row(5),
            row(6), row(7), row(8), d,      d + lanes, counts.data + lanes * p};
  }
};

// Add a piece's sums to those of the pieces before it.
inline void add_piece(const Lanes& piece, const Lanes& sums, int64_t width, bool counts) {
  for (int64_t lane = 0; lane < width; ++lane) {
    sums.first[lane] += piece.first[lane];
    sums.second[lane] += piece.second[lane];
    if (counts) sums.count[lane] += piece.count[lane];
  }
}

inline void clear_sums(const Lanes& lanes, int64_t width) {
  std::memset(lanes.first, 0, width * sizeof(double));
  std::memset(lanes.second, 0, width * sizeof(double));
  std::memset(lanes.count, 0, width * sizeof(int64_t));
}

struct RowWeights {
  float weight, bias;
};

// Where a rectangle of rows and lanes lies: of one a, rows from `row` on, lanes from `lane` on.
struct Tile {
  const Call& call;
  int64_t a, lane, width;
  bool cached;  // whether its rows have just been read, and are in the cache

  int64_t at(int64_t row) const { return (a * call.r0 + row) * call.lanes() + lane; }
  int64_t place() const { return a * call.lanes() + lane; }  // among the lanes of all a
  int64_t columns() const { return width / call.r1; }
  int64_t column(int64_t k) const { return a * call.k1 + lane / call.r1 + k; }
  // The mask's bytes of a row: one a lane, or one for all.
  const uint8_t* mask_of(const uint8_t* mask, int64_t row) const {
    return mask + call.mask_at(a, row, lane / call.r1, 0);
  }
  bool is_out(const uint8_t* valid, int64_t row) const { return valid && !has_mask(valid) && !*mask_of(valid, row); }
  bool has_mask(const uint8_t* mask) const { return mask && (call.mask_k1 || call.mask_r1); }
  // The weight and bias of a row, where it has its own; otherwise those that change nothing.
  RowWeights weights(const float* weight, const float* bias, int64_t row) const {
    if (!call.weight_r0) return {1, 0};
    const int64_t index = call.weight_at(a, row, 0, 0);
    return {weight ? weight[index] : 1, bias ? bias[index] : 0};
  }
};

// Tiles of lanes, for each a: of whole columns.
struct Tiling {
  const Call& call;
  int64_t width, each_a;
  bool cached;

  Tiling(const Call& c, int64_t most_lanes, bool is_cached) : call(c), cached(is_cached) {
    const int64_t columns = most_lanes / call.r1;
    width = (columns > 0 ? columns : 1) * call.r1;
    each_a = divided_up(call.lanes(), width);
  }
  int64_t tiles() const { return call.k0 * each_a; }
  Tile tile(int64_t item) const {
    const int64_t lane = item % each_a * width, left = call.lanes() - lane;
    return {call, item / each_a, lane, left < width ? left : width, cached};
  }
};

// As few lanes as let a tile fit the cache, but at least a quarter of the most.
inline int64_t cached_lanes(const Call& call, int64_t bytes_of_element) {
  const int64_t lanes = kCache / (call.r0 * bytes_of_element) / kStrip * kStrip;
  return lanes < kTile / 4 ? kTile / 4 : lanes < kTile ? lanes : kTile;
}

inline int64_t pieces_of(const Call& call) { return divided_up(call.r0, kRowsOfPiece); }
inline int64_t end_of(const Call& call, int64_t piece) {
  return call.r0 < (piece + 1) * kRowsOfPiece ? call.r0 : (piece + 1) * kRowsOfPiece;
}

// Tiles for one thread each, whose second look at one hits the cache.
inline Tiling cached_tiling(const Call& call, int64_t bytes_of_element) {
  return Tiling(call, cached_lanes(call, bytes_of_element), true);
}
// Tiles whose pieces all threads share, or which are looked at once.
inline Tiling wide_tiling(const Call& call) { return Tiling(call, pieces_of(call) > 1 ? kRow : kTile, false); }

// Whether the threads share the pieces of tiles: there are too few tiles, or they do not fit the cache anyway.
inline bool goes_together(const Tiling& tiling, const Team& team, int64_t bytes_of_element) {
  const bool enough = tiling.tiles() >= 4 * team.threads;
  const bool fits = tiling.call.r0 * tiling.width * bytes_of_element <= 2 * kCache;
  return pieces_of(tiling.call) > 1 && !(enough && fits);
}

// Call body(lane, vectors, size) for chunks of lanes: of kMost vectors, of kWide, of one, and of what is left.
template <int kMost = kWide, class Body>
inline void in_chunks(int64_t width, Body body) {
  int64_t lane = 0;
  for (; kMost > kWide && lane + kMost * kLanes <= width; lane += kMost * kLanes)
    body(lane, std::integral_constant<int, kMost>(), std::integral_constant<int, kLanes>());
  for (; lane + kWide * kLanes <= width; lane += kWide * kLanes)
    body(lane, std::integral_constant<int, kWide>(), std::integral_constant<int, kLanes>());
  for (; lane + kLanes <= width; lane += kLanes)
    body(lane, std::integral_constant<int, 1>(), std::integral_constant<int, kLanes>());
  if (lane < width) body(lane, std::integral_constant<int, 1>(), int(width - lane));
}

// The order in which rows are written. Rows in the cache: from the last one on, and strip by strip, whose lanes stay in
// registers. Others: whole rows, so that memory is read and written in one stream.
struct Order {
  int64_t begin, end, step, stride;  // stride: to the next rows, after one walk over the lanes

  Order(int64_t first, int64_t last, const Tile& tile)
      : begin(tile.cached ? last - 1 : first), end(tile.cached ? first - 1 : last), step(tile.cached ? -1 : 1) {
    stride = tile.cached || tile.width <= kStrip ? end - begin : 1;
  }
};

}  // namespace
