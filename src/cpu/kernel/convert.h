// Rows of numbers between the caller's dtype and the kernel's.
#pragma once
#include "cpu/kernel/vector.h"
#include "flash_dmattn/tensor.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace flash_dmattn::cpu::FLASH_DMATTN_ISA {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <class To, class From>
FLASH_DMATTN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

FLASH_DMATTN_INLINE float widen(float x) { return x; }
FLASH_DMATTN_INLINE double widen(double x) { return x; }
FLASH_DMATTN_INLINE float widen(BFloat16 x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }
FLASH_DMATTN_INLINE float widen(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // The exponent field, read as a float32's, is 112 too small; the product makes up for it and normalises subnormals.
  return bit_cast<float>(bit_cast<std::uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f) | sign);
#endif
}

FLASH_DMATTN_INLINE void narrow(float x, float* out) { *out = x; }
FLASH_DMATTN_INLINE void narrow(double x, float* out) { *out = static_cast<float>(x); }
FLASH_DMATTN_INLINE void narrow(double x, double* out) { *out = x; }
FLASH_DMATTN_INLINE void narrow(float x, BFloat16* out) {  // to nearest, ties to even
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  out->bits = static_cast<std::uint16_t>(x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
FLASH_DMATTN_INLINE void narrow(float x, Float16* out) {  // to nearest, ties to even
#if defined(__F16C__)
  out->bits = _cvtss_sh(x, 0);
#else
  const std::uint32_t bits = bit_cast<std::uint32_t>(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) {
    out->bits = static_cast<std::uint16_t>(sign | 0x7e00u);
  } else if (rest >= 0x477ff000u) {  // rounds to more than the largest float16
    out->bits = static_cast<std::uint16_t>(sign | 0x7c00u);
  } else if (rest < 0x38800000u) {  // subnormal: adding 1/2 leaves the bits, rounded, at the bottom of the fraction
    out->bits =
        static_cast<std::uint16_t>(sign | (bit_cast<std::uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u));
  } else {
    out->bits = static_cast<std::uint16_t>(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13);
  }
#endif
}

/// Calls f with a value of the type that stores numbers of this dtype.
template <class F>
FLASH_DMATTN_INLINE void with_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::float16:
      return f(Float16{});
    case DType::bfloat16:
      return f(BFloat16{});
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
    default:
      return;
  }
}

/// out[i] = in[i], i < n; the numbers of `in` lie one after the other.
template <class T>
void load_row(DType dtype, const void* in, std::int64_t n, T* out) {
  with_storage(dtype, [&](auto storage) __attribute__((always_inline)) {
    const auto* row = static_cast<const decltype(storage)*>(in);
    for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(widen(row[i]));
  });
}

/// out[i] = in[i] * factor, i < n
template <class T>
void store_row(DType dtype, const T* in, T factor, std::int64_t n, void* out) {
  with_storage(dtype, [&](auto storage) __attribute__((always_inline)) {
    auto* row = static_cast<decltype(storage)*>(out);
    if constexpr (sizeof(storage) >= 4 || sizeof(T) == 4)
      for (std::int64_t i = 0; i < n; ++i) narrow(in[i] * factor, row + i);
  });
}

/// The number at an address.
template <class T>
T load_number(DType dtype, const void* in) {
  T out{};
  load_row(dtype, in, 1, &out);
  return out;
}

}  // namespace flash_dmattn::cpu::FLASH_DMATTN_ISA
