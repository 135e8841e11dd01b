// Which scores of a tile count: the tests of the keys that not every row sees.
#pragma once
#include "ptx/number.cuh"
#include "ptx/warp.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

/// Sets the scores of pairs that do not see each other to -inf. `sees(m, half, column)`: whether the row `half` of row
/// tile m, one of the two that this thread holds there, sees the key of that column.
template <int kRowTiles, int kColumnTiles, class Key>
void mask_scores(float (&score)[kRowTiles][kColumnTiles][4], int lane, const Key& key_of) {
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto sees = key_of(8 * n + lane % 4 * 2 + i);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (!sees(m, half)) score[m][n][2 * half + i] = -kInfinity;
    }
}

}  // namespace flash_dmattn::cuda
