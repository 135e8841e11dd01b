// The 16-bit floating formats, one number at a time. Kernels have their own (src/cpu/kernel/convert.h), since they
// share no inline code with other translation units.
#pragma once
#include <bit>
#include <cstdint>

#include "flash_dmattn/tensor.h"

namespace flash_dmattn {

inline float from_bfloat16(std::uint16_t x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x) << 16); }

inline float from_float16(std::uint16_t x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x & 0x8000u) << 16, rest = x & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // The exponent field, read as a float32's, is 112 too small; the product makes up for it and normalises subnormals.
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | sign);
}

inline double read_number(const void* p, DType dtype) {
  switch (dtype) {
    case DType::float16:
      return from_float16(*static_cast<const std::uint16_t*>(p));
    case DType::bfloat16:
      return from_bfloat16(*static_cast<const std::uint16_t*>(p));
    case DType::float32:
      return *static_cast<const float*>(p);
    case DType::float64:
      return *static_cast<const double*>(p);
    case DType::int32:
      return *static_cast<const std::int32_t*>(p);
    case DType::boolean:
      return *static_cast<const std::uint8_t*>(p) != 0;
  }
  return 0;
}

}  // namespace flash_dmattn
