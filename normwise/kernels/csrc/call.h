// What Python hands over for one call, and what the kernels hand back.
//
// A tensor is seen as it lies in memory, by its word: kept, reduced, kept, reduced axes, outermost first. The element
// (a, r, k, s) lies at ((a * r0 + r) * k1 + k) * r1 + s. Each pair (a, k) is one column of the four steps' matrix; its
// samples are all (r, s).
#pragma once

#include <cstdint>

namespace normwise {

enum Dtype : int32_t { kFloat32, kBFloat16, kFloat16 };
enum Normalizer : int32_t { kStandardize, kRms, kL2 };
enum Activation : int32_t { kNone, kRelu, kSilu, kGelu };
enum Engine : int32_t { kRuns, kLanes };

// Written by geometry.py, field by field.
struct Call {
  int64_t k0, r0, k1, r1;
  // The weight and bias of (a, r, k, s) lie at
  // (a % period_k0) * weight_k0 + r * weight_r0 + (k % period_k1) * weight_k1 + s * weight_r1.
  int64_t period_k0, period_k1, weight_k0, weight_r0, weight_k1, weight_r1, weight_size;
  // The byte that says whether (a, r, k, s) counts lies at a * mask_k0 + r * mask_r0 + k * mask_k1 + s * mask_r1.
  int64_t mask_k0, mask_r0, mask_k1, mask_r1;
  double eps;
  int32_t dtype, normalizer, activation, engine;
  int32_t measured;  // whether statistics are the batch's own; otherwise `mean` and `inverse` are given
  int32_t dense;     // whether the runs of a column follow one another, however many columns there are

  int64_t columns() const { return k0 * k1; }
  int64_t lanes() const { return k1 * r1; }
  int64_t size() const { return k0 * r0 * k1 * r1; }
  int64_t weight_at(int64_t a, int64_t r, int64_t k, int64_t s) const {
    const int64_t first = weight_k0 ? a % period_k0 * weight_k0 : 0;  // a division costs more than the rest
    const int64_t second = weight_k1 ? k % period_k1 * weight_k1 : 0;
    return first + r * weight_r0 + second + s * weight_r1;
  }
  int64_t mask_at(int64_t a, int64_t r, int64_t k, int64_t s) const {
    return a * mask_k0 + r * mask_r0 + k * mask_k1 + s * mask_r1;
  }
};

// The numbers of each column, (k0, k1) each; those that are null are not wanted.
struct Statistics {
  double* mean;
  double* inverse;  // 1 / sqrt(variance + eps)
  double* m2;       // sum of squared deviations; of squares where no mean is subtracted
  double* count;    // with a mask only
};

struct Forward {
  const void* x;
  const void* residual;  // added to x first; null: nothing
  void* sum;             // x + residual
  void* y;
  const float* weight;
  const float* bias;
  const uint8_t* mask;
  Statistics statistics;
  bool streams;  // whether long runs of y are better written past the caches
};

struct Backward {
  const void* x;  // x + residual, where there was one
  const void* d_y;
  const void* d_sum;  // the gradient of x + residual itself; null: zero
  void* d_x;          // null: not wanted
  const float* weight;
  const float* bias;
  const uint8_t* mask;
  Statistics statistics;
  float* d_weight;  // null: not wanted
  float* d_bias;
  bool streams;  // whether long runs of d_x are better written past the caches
};

// Runs `body(context, item)` for every item below `items`, each by one of at most `threads` threads. Every thread
// begins with neighbouring items, the same ones whenever there are as many, with `from_last` at its last; then it helps
// others.
struct Team {
  int threads;
  void (*run)(const Team& team, int64_t items, bool from_last, void (*body)(void* context, int64_t item),
              void* context);
};

// What each instruction set offers. Both return false if there is no memory for scratch.
struct Kernels {
  const char* name;
  bool (*forward)(const Call& call, const Forward& tensors, const Team& team);
  bool (*backward)(const Call& call, const Backward& tensors, const Team& team);
};

}  // namespace normwise
