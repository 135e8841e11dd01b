// Numbers of 16 bits, and the functions of the special function unit.
#pragma once
#include <bit>
#include <cmath>
#include <limits>

#include "types.cuh"

namespace flash_dmattn::cuda {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline u32 bits_of(float x) { return std::bit_cast<u32>(x); }
inline float float_of(u32 bits) { return std::bit_cast<float>(bits); }

inline float to_float(bfloat16 x) { return float_of(static_cast<u32>(x.bits) << 16); }
inline float to_float(float16 x) {
  const u32 sign = static_cast<u32>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // The exponent field, read as a float32's, is 112 too small; the product makes up for it and normalises subnormals.
  return float_of(bits_of(float_of(rest << 13) * 0x1p112f) | sign);
}
inline float to_float(float x) { return x; }

/// Rounded to nearest even.
template <class T>
T from_float(float x);
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  const u32 bits = bits_of(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 from_float<float16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  const u32 sign = bits_of(x) >> 16 & 0x8000u, magnitude = bits_of(x) & 0x7fffffffu;
  if (magnitude >= 0x477ff000u) return {static_cast<u16>(sign | 0x7c00u)};  // 65520 and more
  // Below 2^-14 the last place is 2^-24, which is that of a float32 in [0.5, 1).
  if (magnitude < 0x38800000u) return {static_cast<u16>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u))};
  const u32 rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
  return {static_cast<u16>(sign | (rounded - 0x38000000u) >> 13)};
}

template <class T>
u32 pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<u32>(from_float<T>(high).bits) << 16;
}

namespace emulator {

/// Subnormal numbers are 0.
inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

}  // namespace emulator

inline float fast_exp2(float x) { return emulator::flush(std::exp2(emulator::flush(x))); }
inline float fast_log2(float x) { return std::log2(emulator::flush(x)); }
inline float fast_reciprocal(float x) { return emulator::flush(1 / emulator::flush(x)); }
inline float multiply_add(float x, float y, float z) { return std::fma(x, y, z); }
inline float maximum(float x, float y) { return std::fmax(x, y); }
inline float minimum(float x, float y) { return std::fmin(x, y); }

}  // namespace flash_dmattn::cuda
