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

/// Bytes of shared memory that one block may have on an architecture (compute capability: 80, 90, 120, …).
constexpr int shared_capacity(int arch) {
  return arch == 80 || arch == 87 ? 163 * 1024 : arch >= 90 && arch < 120 ? 227 * 1024 : 99 * 1024;
}

}  // namespace flash_dmattn::cuda
