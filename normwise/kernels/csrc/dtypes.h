// The dtypes of a tensor's elements, one at a time.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

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

}  // namespace
