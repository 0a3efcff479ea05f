// Vectors of float and double, as wide as the instruction set has them, and loads and stores of the three dtypes.
//
// F holds kLanes floats; H half as many, which as doubles fill a D. Arithmetic is the compiler's vector extension.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ff) << 13);  // infinite, or nan
  // as a float, rest << 13 is 2^-112 times the value, denormal or not
  const float magnitude = bit_cast<float>(rest << 13) * 0x1p112f;
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign);
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t(0x7fc0)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to the nearest, ties to even
}
template <>
inline Float16 from_float<Float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (x != x) return {uint16_t(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds beyond 65504
  if (rest < 0x38800000) {  // denormal in float16: the sum's last bits are the result, rounded
    const float shifted = bit_cast<float>(rest) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13))};
}

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
inline F load<F>(const Float16* x) {
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
}
template <>
inline H load<H>(const Float16* x) {
  return (H)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
}
#elif defined(__AVX2__)
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
inline void store(BFloat16* y, F v) {
  using U = VectorOf<uint32_t, kLanes>::type;
  const U bits = (U)v;
  const U rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const U safe = (v == v) ? rounded : (U{} + 0x7fc0);
  const auto narrow = __builtin_convertvector(safe, VectorOf<uint16_t, kLanes>::type);
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

// The first n elements of a vector; the others are `fill`.
template <class V, class T>
inline V load_part(const T* x, int n, float fill) {
  V v = V{} + fill;
  for (int lane = 0; lane < n; ++lane) v[lane] = to_float(x[lane]);
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
  BFloat16 whole[kLanes];
  store(whole, v);
  _mm256_mask_storeu_epi16(y, __mmask16((1u << n) - 1), _mm256_loadu_si256((const __m256i*)whole));
}
template <>
inline void store_part<Float16>(Float16* y, F v, int n) {
  _mm256_mask_storeu_epi16(y, __mmask16((1u << n) - 1),
                           _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif

inline D widen(H x) { return __builtin_convertvector(x, D); }

// Both halves of a vector.
#if defined(__AVX512F__)
inline H low(F x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }
inline H high(F x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }
#elif defined(__AVX2__)
inline H low(F x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3); }
inline H high(F x) { return __builtin_shufflevector(x, x, 4, 5, 6, 7); }
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
