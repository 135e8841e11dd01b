// Copies rows of 16-bit numbers between layouts, cut or padded with zeros.
#pragma once
#include "problem.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

struct CopyRowsParams {
  Rows from, to;  // any alignment
  int from_dim, to_dim;
  int positions, heads;
  i64 rows;  // batch * positions * heads
};

struct CopyRowsConfig {
  static constexpr int kThreads = 256, kRowsPerBlock = kThreads / 32;
};

}  // namespace flash_dmattn::cuda
