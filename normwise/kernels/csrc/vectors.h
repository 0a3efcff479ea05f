// Vectors of float and double, as wide as the instruction set has them, and loads and stores of the three dtypes.
//
// F holds kLanes floats; H half as many, which as doubles fill a D. Arithmetic is the compiler's vector extension.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dtypes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define NW_INLINE __attribute__((always_inline)) inline

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kHalf = kLanes / 2;

template <class E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(N * sizeof(E))));
};
using F = VectorOf<float, kLanes>::type;
using I = VectorOf<int32_t, kLanes>::type;
using H = VectorOf<float, kHalf>::type;
using D = VectorOf<double, kHalf>::type;
using L = VectorOf<int64_t, kHalf>::type;

template <class V, class T>
inline V load_one_by_one(const T* x) {
  V v;
  for (int lane = 0; lane < int(sizeof(V) / sizeof(float)); ++lane) v[lane] = to_float(x[lane]);
  return v;
}

// As many elements as the vector has, as floats.
template <class V>
inline V load(const float* x) {
  V v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}
template <class V>
inline V load(const BFloat16* x) {
  constexpr int n = sizeof(V) / sizeof(float);
  typename VectorOf<uint16_t, n>::type narrow;
  std::memcpy(&narrow, x, sizeof(narrow));
  return (V)(__builtin_convertvector(narrow, typename VectorOf<uint32_t, n>::type) << 16);
}
template <class V>
inline V load(const Float16* x) {
  return load_one_by_one<V>(x);
}
#if defined(__AVX512F__)
template <>
inline F load<F>(const BFloat16* x) {
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16);
}
template <>
inline F load<F>(const Float16* x) {
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
}
template <>
inline H load<H>(const Float16* x) {
  return (H)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
}
#elif defined(__AVX2__)
template <>
inline F load<F>(const BFloat16* x) {
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16);
}
template <>
inline F load<F>(const Float16* x) {
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
}
template <>
inline H load<H>(const Float16* x) {
  return (H)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)x));
}
#endif

inline void store(float* y, F v) { std::memcpy(y, &v, sizeof(v)); }
// To the nearest, ties to even.
inline VectorOf<uint16_t, kLanes>::type to_bfloat16(F v) {
#if defined(__AVX512BF16__)  // whose instruction makes zeros of denormals
  constexpr int kDenormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, kDenormal) == 0, 1))
    return bit_cast<VectorOf<uint16_t, kLanes>::type>(_mm512_cvtneps_pbh((__m512)v));
#endif
  using U = VectorOf<uint32_t, kLanes>::type;
  const U bits = (U)v;
  const U rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const U safe = (v == v) ? rounded : (U{} + 0x7fc0);
  return __builtin_convertvector(safe, VectorOf<uint16_t, kLanes>::type);
}
inline void store(BFloat16* y, F v) {
  const auto narrow = to_bfloat16(v);
  std::memcpy(y, &narrow, sizeof(narrow));
}
inline void store(Float16* y, F v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)y, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)y, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int lane = 0; lane < kLanes; ++lane) y[lane] = from_float<Float16>(v[lane]);
#endif
}

// Stores past the caches, to a multiple of the vector's size; before others may read, `end_of_stream` is due.
#if defined(__AVX2__)
inline void stream(float* y, F v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(y, (__m512)v);
#else
  _mm256_stream_ps(y, (__m256)v);
#endif
}
template <class T>
inline void stream(T* y, F v) {
  typename VectorOf<uint16_t, kLanes>::type narrow;
  store(reinterpret_cast<T*>(&narrow), v);
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)y, (__m256i)narrow);
#else
  _mm_stream_si128((__m128i*)y, (__m128i)narrow);
#endif
}
inline void end_of_stream() { _mm_sfence(); }
#else
template <class T>
inline void stream(T* y, F v) {
  store(y, v);
}
inline void end_of_stream() {}
#endif
// How many of n elements come before the first vector that crosses no cache line; 0 where parts of a vector cost more.
template <class T>
inline int64_t unaligned(const T* y, int64_t n) {
  constexpr uintptr_t kBytes = kLanes * sizeof(T);
  const int64_t before = int64_t((kBytes - reinterpret_cast<uintptr_t>(y) % kBytes) % kBytes / sizeof(T));
  return kLanes == 16 && n >= 4 * kLanes ? before : 0;
}
// Whether runs of n elements are worth it: short or broken lines cost more than they save.
template <class T>
inline bool fits_stream(const T* y, int64_t n) {
  return n * sizeof(T) >= 1024 && n % kLanes == 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0;
}

// Ask for what will be written, or read, soon.
template <class T>
inline void fetch_to_write(T* y) {
  __builtin_prefetch(y, 1);
}
template <class T>
inline void fetch(const T* x) {
  __builtin_prefetch(x);
}

// The first n elements of a vector; the others are `fill`.
template <class V, class T>
inline V load_part(const T* x, int n, float fill) {
  V v = V{} + fill;
  for (int lane = 0; lane < int(sizeof(V) / sizeof(float)) && lane < n; ++lane) v[lane] = to_float(x[lane]);
  return v;
}
template <class T>
inline void store_part(T* y, F v, int n) {
  T whole[kLanes];
  store(whole, v);
  std::memcpy(y, whole, n * sizeof(T));
}
#if defined(__AVX512F__)
template <>
inline F load_part<F, float>(const float* x, int n, float fill) {
  return (F)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), __mmask16((1u << n) - 1), x);
}
template <>
inline H load_part<H, float>(const float* x, int n, float fill) {
  return (H)_mm256_mask_loadu_ps(_mm256_set1_ps(fill), __mmask8((1u << n) - 1), x);
}
template <>
inline void store_part<float>(float* y, F v, int n) {
  _mm512_mask_storeu_ps(y, __mmask16((1u << n) - 1), (__m512)v);
}
inline F filled(F v, int n, float fill) {
  return (F)_mm512_mask_blend_ps(__mmask16((1u << n) - 1), _mm512_set1_ps(fill), (__m512)v);
}
template <>
inline F load_part<F, BFloat16>(const BFloat16* x, int n, float fill) {
  const __m256i narrow = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), x);
  return filled((F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16), n, fill);
}
template <>
inline F load_part<F, Float16>(const Float16* x, int n, float fill) {
  return filled((F)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), x)), n, fill);
}
template <>
inline void store_part<BFloat16>(BFloat16* y, F v, int n) {
  _mm256_mask_storeu_epi16(y, __mmask16((1u << n) - 1), bit_cast<__m256i>(to_bfloat16(v)));
}
template <>
inline void store_part<Float16>(Float16* y, F v, int n) {
  _mm256_mask_storeu_epi16(y, __mmask16((1u << n) - 1),
                           _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif

// One instruction each, which compilers do not find for __builtin_convertvector.
#if defined(__AVX512F__)
inline D widen(H x) { return (D)_mm512_cvtps_pd((__m256)x); }
inline H narrow(D x) { return (H)_mm512_cvtpd_ps((__m512d)x); }
#elif defined(__AVX2__)
inline D widen(H x) { return (D)_mm256_cvtps_pd((__m128)x); }
inline H narrow(D x) { return (H)_mm256_cvtpd_ps((__m256d)x); }
#else
inline D widen(H x) { return __builtin_convertvector(x, D); }
inline H narrow(D x) { return __builtin_convertvector(x, H); }
#endif

inline double square_root(double x) { return std::sqrt(x); }
inline D square_root(D x) {
#if defined(__AVX512F__)
  return (D)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (D)_mm256_sqrt_pd((__m256d)x);
#else
  for (int lane = 0; lane < kHalf; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
#endif
}

inline D load(const double* x) {
  D v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}
inline void store(double* x, D v) { std::memcpy(x, &v, sizeof(v)); }
inline void store(float* x, H v) { std::memcpy(x, &v, sizeof(v)); }
// A bit for each lane in which a comparison holds.
inline unsigned lanes_of(L mask) {
#if defined(__AVX512F__)
  return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  return _mm256_movemask_pd((__m256d)mask);
#else
  return (mask[0] & 1) | (mask[1] & 2);
#endif
}
inline bool all(L mask) { return lanes_of(mask) == (1u << kHalf) - 1; }

// Both halves of a vector.
#if defined(__AVX512F__)
inline H low(F x) { return (H)_mm512_castps512_ps256((__m512)x); }
inline H high(F x) { return (H)_mm512_extractf32x8_ps((__m512)x, 1); }
#elif defined(__AVX2__)
inline H low(F x) { return (H)_mm256_castps256_ps128((__m256)x); }
inline H high(F x) { return (H)_mm256_extractf128_ps((__m256)x, 1); }
#else
inline H low(F x) { return __builtin_shufflevector(x, x, 0, 1); }
inline H high(F x) { return __builtin_shufflevector(x, x, 2, 3); }
#endif

inline F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline D fma(D a, D b, D c) {
#if defined(__AVX512F__)
  return (D)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (D)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// The sum of the lanes, in one order: halves are added to each other.
inline double total(D v) {
#if defined(__AVX512F__)
  const auto four = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  const auto two = __builtin_shufflevector(four, four, 0, 1) + __builtin_shufflevector(four, four, 2, 3);
#elif defined(__AVX2__)
  const auto two = __builtin_shufflevector(v, v, 0, 1) + __builtin_shufflevector(v, v, 2, 3);
#else
  const auto two = v;
#endif
  return two[0] + two[1];
}
inline D halves(F x) { return widen(low(x)) + widen(high(x)); }

// The sums of the lanes of eight vectors.
inline void totals(const D* v, double* sums) {
#if defined(__AVX512F__)
  const auto folded = [&](int i, int j) {  // four sums of each
    return __builtin_shufflevector(v[i], v[j], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(v[i], v[j], 4, 5, 6, 7, 12, 13, 14, 15);
  };
  const auto twice = [](D a, D b) {  // two sums of each
    return __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13) +
           __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
  };
  const D even = twice(folded(0, 2), folded(4, 6)), odd = twice(folded(1, 3), folded(5, 7));
  const D found = __builtin_shufflevector(even, odd, 0, 8, 2, 10, 4, 12, 6, 14) +
                  __builtin_shufflevector(even, odd, 1, 9, 3, 11, 5, 13, 7, 15);
  std::memcpy(sums, &found, sizeof(found));
#else
  for (int i = 0; i < 8; ++i) sums[i] = total(v[i]);
#endif
}
inline double total(F x) { return total(halves(x)); }

// x[0..n) += the lanes of v.
inline void add_to(double* x, F v) {
  D first, second;
  std::memcpy(&first, x, sizeof(D));
  std::memcpy(&second, x + kHalf, sizeof(D));
  first += widen(low(v));
  second += widen(high(v));
  std::memcpy(x, &first, sizeof(D));
  std::memcpy(x + kHalf, &second, sizeof(D));
}
inline void add_part_to(double* x, F v, int n) {
  for (int lane = 0; lane < n; ++lane) x[lane] += v[lane];
}

// All of a vector, where `size` says so when it is compiled, or its first elements.
template <class T, class Size>
inline F load_some(const T* from, Size size, float fill = 0) {
  return size == kLanes ? load<F>(from) : load_part<F>(from, size, fill);
}
template <class T, class Size>
inline void store_some(T* to, F v, Size size) {
  size == kLanes ? store(to, v) : store_part(to, v, size);
}

// sum = x + residual, of n elements.
template <class T>
void add_residual(const T* x, const T* residual, T* sum, int64_t n) {
  int64_t e = 0;
  for (; e + kLanes <= n; e += kLanes) store(sum + e, load<F>(x + e) + load<F>(residual + e));
  const int rest = int(n - e);
  if (rest) store_part(sum + e, load_part<F>(x + e, rest, 0) + load_part<F>(residual + e, rest, 0), rest);
}

// x, or zeros whatever x is.
inline F only(F x, bool counts) { return (F)((I)x & (counts ? ~I{} : I{})); }

// x where the mask's bytes are set and 0 elsewhere, whatever stands there; `n` bytes are read.
inline F keep(F x, const uint8_t* mask, int n = kLanes) {
  typename VectorOf<uint8_t, kLanes>::type bytes = {};
  std::memcpy(&bytes, mask, n < kLanes ? n : kLanes);
  const I wide = __builtin_convertvector(bytes, I);
  return (F)((I)x & (wide != 0));
}
inline D keep(D x, const uint8_t* mask, int n = kHalf) {
  typename VectorOf<uint8_t, kHalf>::type bytes = {};
  std::memcpy(&bytes, mask, n < kHalf ? n : kHalf);
  const L wide = __builtin_convertvector(bytes, L);
  return (D)((L)x & (wide != 0));
}

}  // namespace
