// The matrix product of one warp: C (16 x 8, float32) += A (16 x 16) B (16 x 8).
//
// Thread t holds, with g = t / 4 and i = 2 (t % 4):
//   A: a[0] = row g, columns i, i + 1; a[1] = row g + 8; a[2] = row g, columns i + 8, i + 9; a[3] = row g + 8, those
//   B: b[0] = rows i, i + 1 of column g; b[1] = rows i + 8, i + 9
//   C: c[0], c[1] = row g, columns i, i + 1; c[2], c[3] = row g + 8
#pragma once
#include "types.cuh"

namespace flash_dmattn::cuda {

template <class T>
void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);

template <>
__forceinline__ void mma<bfloat16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__forceinline__ void mma<float16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace flash_dmattn::cuda
