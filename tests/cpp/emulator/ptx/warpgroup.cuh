// The matrix product of four warps: C (64 x kColumns, float32) += A (64 x 16) B (16 x kColumns), laid out as the real
// one's.
#pragma once
#include <type_traits>

#include "../threads.h"
#include "ptx/memory.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

constexpr int kWarpgroup = 128;

template <int kRegisters>
void grow_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void shrink_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

struct Operand {
  u64 descriptor;
  Operand operator+(int bytes) const {
    if (bytes % 16 != 0) emulator::fail("Operand: %d bytes further on", bytes);
    return {descriptor + static_cast<u64>(bytes >> 4)};
  }
};

enum class Major { k, mn };

inline Operand operand(const void* shared, int leading_bytes, int stride_bytes) {
  emulator::require_aligned("operand", shared, 16);
  const auto is_field = [](int bytes) { return bytes >= 0 && bytes < 1 << 18 && bytes % 16 == 0; };
  if (!is_field(leading_bytes) || !is_field(stride_bytes))
    emulator::fail("operand: %d and %d bytes", leading_bytes, stride_bytes);
  return {u64{1} << 62 | static_cast<u64>(stride_bytes >> 4) << 32 | static_cast<u64>(leading_bytes >> 4) << 16 |
          shared_address(shared) >> 4};
}

inline Operand plain_operand(const void* shared, int leading_bytes) {
  emulator::require_aligned("plain_operand", shared, 16);
  if (leading_bytes < 0 || leading_bytes >= 1 << 18 || leading_bytes % 16 != 0)
    emulator::fail("plain_operand: %d bytes", leading_bytes);
  return {u64{8} << 32 | static_cast<u64>(leading_bytes >> 4) << 16 | shared_address(shared) >> 4};
}

inline void fence_products() { emulator::self->products_are_fenced = true; }
inline void commit_products() { emulator::commit_products(); }
template <int kPending>
void wait_products() {
  static_assert(kPending >= 0 && kPending <= 7);
  emulator::wait_products(kPending);
}

template <int kCount>
void fence_registers(float (&)[kCount]) {}

namespace emulator {

template <class T, int kColumns>
constexpr Number number_of() {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  static_assert(kColumns == 32 || kColumns == 64 || kColumns == 80 || kColumns == 96 || kColumns == 112 ||
                kColumns == 128 || kColumns == 192 || kColumns == 256);
  return std::is_same_v<T, bfloat16> ? Number::bfloat16 : Number::float16;
}

}  // namespace emulator

template <class T, int kColumns, Major kA, Major kB>
void multiply(float (&c)[kColumns / 2], Operand a, Operand b, bool add) {
  emulator::multiply({emulator::number_of<T, kColumns>(), kColumns, false, kA == Major::mn, kB == Major::mn,
                      a.descriptor, b.descriptor, add},
                     c, nullptr);
}
template <class T, int kColumns, Major kB>
void multiply(float (&c)[kColumns / 2], const u32 (&a)[4], Operand b, bool add) {
  emulator::multiply({emulator::number_of<T, kColumns>(), kColumns, true, false, kB == Major::mn, 0, b.descriptor, add},
                     c, a);
}

}  // namespace flash_dmattn::cuda
