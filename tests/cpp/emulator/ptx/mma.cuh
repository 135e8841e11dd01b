// The matrix product of one warp: C (16 x 8, float32) += A (16 x 16) B (16 x 8), laid out as the real one's.
#pragma once
#include "../threads.h"
#include "ptx/number.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

template <class T>
void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  struct Lane {
    float* c;
    const u32* a;
    u32 b[2];
  } lane{c, a, {b0, b1}};
  emulator::with_warp("mma", lane, [](Lane* const* lanes) {
    float a[16][16], b[16][8];
    const auto low = [](u32 pair) { return to_float(T{static_cast<u16>(pair)}); };
    const auto high = [](u32 pair) { return to_float(T{static_cast<u16>(pair >> 16)}); };
    for (int t = 0; t < 32; ++t) {
      const int g = t / 4, i = 2 * (t % 4);
      for (int part = 0; part < 4; ++part) {
        const int row = g + part % 2 * 8, column = i + part / 2 * 8;
        a[row][column] = low(lanes[t]->a[part]);
        a[row][column + 1] = high(lanes[t]->a[part]);
      }
      for (int part = 0; part < 2; ++part) {
        b[i + 8 * part][g] = low(lanes[t]->b[part]);
        b[i + 8 * part + 1][g] = high(lanes[t]->b[part]);
      }
    }
    for (int row = 0; row < 16; ++row) {
      float sums[8] = {};  // products of two 16-bit numbers are exact
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
      for (int column = 0; column < 8; ++column)
        lanes[row % 8 * 4 + column / 2]->c[row / 8 * 2 + column % 2] += sums[column];
    }
  });
}

}  // namespace flash_dmattn::cuda
