// One column of the matrix: from its sums to the line that normalizes it, and the path for columns beyond float.
//
// Sums are first of floats, shifted by a mean of some of the column's elements, in short chains that are added as
// doubles. They are trusted where the shift is near the mean, measured in deviations, and the squares are far from
// float's limits. Otherwise the column is summed again as doubles, shifted by one of its elements: then a constant
// column is exactly 0, nothing overflows, and because the shift is one of the n samples, the square of its distance
// from the mean is at most n times the variance, and the variance right to n times double's last digit, however large
// the mean.
//
// The mean is kept as a high and a low float: x - high is exact where it matters, and what low adds is in the offset.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "activations.h"
#include "call.h"
#include "vectors.h"

namespace {

using normwise::Backward;
using normwise::Call;
using normwise::Forward;
using normwise::kL2;
using normwise::kStandardize;
using normwise::Statistics;

struct Sums {
  double sum = 0, square = 0;  // of x - shift and of its square
  int64_t count = 0;

  void operator+=(const Sums& other) {
    sum += other.sum;
    square += other.square;
    count += other.count;
  }
};

constexpr int64_t kGuessed = 16;  // elements whose mean the sums of floats are shifted by

// Whether sums of floats have lost nothing. The mean of 16 independent elements is as far away for one column in 1000.
// V is double for one column, D for kHalf columns.
template <class V>
inline auto trusted(V sum, V square, V n, bool centers) {
  const V distance = centers ? sum * sum : V{};  // times n squared
  const V variance = square * n - distance, scale = n * n;
  return (variance > 1e-28 * scale) & (variance < 1e28 * scale) & (distance <= 0.7 * variance);
}
inline bool trusted(const Sums& sums, bool centers) {
  return trusted(sums.sum, sums.square, double(sums.count), centers);
}

// Whether float holds what is computed with an inverse: its square is needed, times others.
template <class V>
inline auto is_within_float(V inverse) {
  return (inverse > 1e-15) & (inverse < 1e15);
}

// Whether float holds the product of an inverse and a weight.
template <class V>
inline auto has_slope(V inverse, V weight) {
  const V slope = inverse * weight;
  return ((slope > 1e-30) & (slope < 1e30)) | ((slope < -1e-30) & (slope > -1e30)) | (weight == 0);
}

// What normalizes a column: value = (x - high) * inverse + offset, and recovered by a weight w and a bias b
// (x - high) * slope(w) + shift(w, b).
struct Line {
  double mean, exact_inverse;
  float high, low, inverse, offset;
  bool fits;  // whether float holds it: if not, the column is computed in double

  Line() = default;
  Line(double mean_, double inverse_) : mean(mean_), exact_inverse(inverse_) {
    high = float(mean);
    low = float(mean - high);
    inverse = float(inverse_);
    offset = float(-double(low) * inverse_);
    fits = is_within_float(inverse_);
  }

  float slope(float w) const { return float(exact_inverse * w); }
  float shift(float w, float b) const { return float(b - double(low) * exact_inverse * w); }
};

// The gradient of x: (d_value + ((x - high) * along + level)) * inverse, with the column's means of d_value and of
// d_value * value. What is in parentheses is exactly 0 for a column of one sample. Through statistics that were not
// measured nothing comes back: then x - high, which may be infinite, does not count.
struct Descent {
  float along, level;
  bool measured;

  Descent() = default;
  Descent(const Call& call, const Line& line, double mean_d, double mean_dv) : measured(call.measured) {
    const double exact = measured ? -line.exact_inverse * mean_dv : 0;
    along = float(exact);
    level = measured ? float(-mean_d - exact * line.low) : 0;
  }
};

inline double divisor(const Call& call, double count) { return call.normalizer == kL2 ? 1 : count > 0 ? count : 1; }

// What the sums of a column, or of kHalf columns, make of it.
template <class V>
struct Found {
  V mean, inverse, m2;

  Found(const Call& call, V sum, V square, V count, V shift) {
    const bool centers = call.normalizer == kStandardize;
    const V one = V{} + 1, n = count > 0 ? count : one;
    const V from_shift = centers ? sum / n : V{};
    m2 = centers ? square - sum * from_shift : square;
    m2 = m2 < 0 ? V{} : m2;                                  // nan stays nan
    const V share = call.normalizer == kL2 ? one : one / n;  // does not wait for the sums
    V under_root = m2 * share + call.eps;
    under_root = under_root == 0 ? V{} + double(FLT_MIN) : under_root;
    // of a column that is not finite nothing is known, the mean included
    mean = m2 != m2 ? m2 : centers ? shift + from_shift : V{};
    inverse = one / square_root(under_root);
  }
};

// Finish a column: write its statistics, return its line.
inline Line measured(const Call& call, const Sums& sums, double shift, const Statistics& out, int64_t column) {
  const Found<double> found(call, sums.sum, sums.square, double(sums.count), shift);
  if (out.mean) out.mean[column] = found.mean;
  if (out.inverse) out.inverse[column] = found.inverse;
  if (out.m2) out.m2[column] = found.m2;
  if (out.count) out.count[column] = double(sums.count);
  return Line(found.mean, found.inverse);
}

inline Line remembered(const Statistics& given, int64_t column) {
  return Line(given.mean ? given.mean[column] : 0, given.inverse[column]);
}

inline double count_of(const Call& call, const Statistics& given, int64_t column) {
  return given.count ? given.count[column] : double(call.r0 * call.r1);
}

// One column of the forward in double.
template <class T>
void column_forward(const Call& call, const Forward& t, const T* x, int64_t a, int64_t k, const Line& line) {
  T* y = static_cast<T*>(t.y);
  for (int64_t r = 0; r < call.r0; ++r)
    for (int64_t s = 0; s < call.r1; ++s) {
      const int64_t at = ((a * call.r0 + r) * call.k1 + k) * call.r1 + s, w = call.weight_at(a, r, k, s);
      const bool valid = !t.mask || t.mask[call.mask_at(a, r, k, s)];
      double z = (double(to_float(x[at])) - line.mean) * line.exact_inverse;
      z = (t.weight ? z * t.weight[w] : z) + (t.bias ? t.bias[w] : 0);
      y[at] = from_float<T>(valid ? float(activated(z, call.activation)) : 0);
    }
}

// One column of the backward's d_x in double.
template <class T>
void column_backward(const Call& call, const Backward& t, int64_t a, int64_t k, const Line& line, double count) {
  const T *x = static_cast<const T*>(t.x), *d_y = static_cast<const T*>(t.d_y), *d_sum = static_cast<const T*>(t.d_sum);
  T* d_x = static_cast<T*>(t.d_x);
  double sum = 0, along = 0;
  for (int pass = 0; pass < 2; ++pass)
    for (int64_t r = 0; r < call.r0; ++r)
      for (int64_t s = 0; s < call.r1; ++s) {
        const int64_t at = ((a * call.r0 + r) * call.k1 + k) * call.r1 + s, w = call.weight_at(a, r, k, s);
        const bool valid = !t.mask || t.mask[call.mask_at(a, r, k, s)];
        const double v = (double(to_float(x[at])) - line.mean) * line.exact_inverse,
                     weight = t.weight ? t.weight[w] : 1;
        const double slope = activated_slope(v * weight + (t.bias ? t.bias[w] : 0), call.activation);
        const double d = valid ? double(to_float(d_y[at])) * slope * weight : 0;
        if (pass == 0) {
          sum += d;
          along += valid ? d * v : 0;
          continue;
        }
        const double centred =
            call.measured ? (call.normalizer == kStandardize ? sum / count : 0) + v * (along / count) : 0;
        const double gradient = valid ? (d - centred) * line.exact_inverse : 0;
        d_x[at] = from_float<T>(float(gradient + (d_sum ? to_float(d_sum[at]) : 0)));
      }
}

}  // namespace
