// Numbers of 16 bits, and the functions of the special function unit.
#pragma once
#include "types.cuh"

namespace flash_dmattn::cuda {

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);

/// Two floats as two numbers of 16 bits, rounded to nearest even; `low` in the lower half.
template <class T>
u32 pack(float low, float high);
template <>
__forceinline__ u32 pack<bfloat16>(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__forceinline__ u32 pack<float16>(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <class T>
__forceinline__ T from_float(float x) {
  return T{static_cast<u16>(pack<T>(x, 0.0f))};
}

__forceinline__ float to_float(bfloat16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }
__forceinline__ float to_float(float16 x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
}
__forceinline__ float to_float(float x) { return x; }

__forceinline__ u32 bits_of(float x) { return __float_as_uint(x); }
__forceinline__ float float_of(u32 bits) { return __uint_as_float(bits); }

/// 2^x and log2(x), approximate: 2 ulp; exp2(-inf) is 0 and log2(0) is -inf.
__forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// 1 / x, approximate: 1 ulp.
__forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// x * y + z, rounded once.
__forceinline__ float multiply_add(float x, float y, float z) { return __fmaf_rn(x, y, z); }
/// The other one, if one is NaN.
__forceinline__ float maximum(float x, float y) { return fmaxf(x, y); }
__forceinline__ float minimum(float x, float y) { return fminf(x, y); }

}  // namespace flash_dmattn::cuda
