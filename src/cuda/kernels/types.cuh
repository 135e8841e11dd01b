// Plain types that kernels and the host's launch code share.
#pragma once

namespace flash_dmattn::cuda {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct float16 {
  u16 bits;
};
struct bfloat16 {
  u16 bits;
};

/// The dtypes that kernels compute in.
enum class Number : int { float16, bfloat16 };

template <Number kNumber>
struct TypeOf {
  using type = bfloat16;
};
template <>
struct TypeOf<Number::float16> {
  using type = float16;
};

constexpr int kSmallest = -2147483647 - 1, kLargest = 2147483647;

template <class T>
constexpr T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T most(T a, T b) {
  return a < b ? b : a;
}
constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return divide_up(a, b) * b; }

/// Divides numbers that are not negative, in a multiplication: Granlund and Montgomery, Division by Invariant Integers
/// using Multiplication (1994), figure 4.1.
struct Divisor {
  int value;
  u32 multiplier;
  int shift;

  static constexpr Divisor of(int value) {
    int shift = 0;
    while (u64{1} << shift < static_cast<u64>(value)) ++shift;
    const u64 excess = (u64{1} << shift) - static_cast<u64>(value);
    return {value, static_cast<u32>((excess << 32) / static_cast<u64>(value) + 1), shift};
  }
  constexpr int quotient(int n) const {
    const u32 product = static_cast<u32>(static_cast<u64>(n) * multiplier >> 32);
    return static_cast<int>((product + static_cast<u32>(n)) >> shift);
  }
};

/// Bytes of shared memory that one block may have on an architecture (compute capability: 80, 90, 120, …).
constexpr int shared_capacity(int arch) {
  return arch == 80 || arch == 87 ? 163 * 1024 : arch >= 90 && arch < 120 ? 227 * 1024 : 99 * 1024;
}

}  // namespace flash_dmattn::cuda
