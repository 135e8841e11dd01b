// Eight numbers of 16 bits, which a thread reads or writes at once.
#pragma once
#include "ptx/warp.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

struct alignas(16) Chunk {
  u32 words[4];
};
constexpr int kChunk = 8;  // numbers

/// Four chunks that the threads of a quad have: word i of each is thread i's at first, the whole of chunk i then.
inline void transpose_in_quads(u32 (&words)[4], int lane) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      u32 &low = words[i], &high = words[i + step];
      const bool is_high = (lane & step) != 0;
      const u32 other = shuffle_xor(is_high ? low : high, step);
      (is_high ? low : high) = other;
    }
}

}  // namespace flash_dmattn::cuda
