#pragma once
#include "layout/copy_rows_params.cuh"
#include "ptx/block.cuh"
#include "ptx/warp.cuh"

namespace flash_dmattn::cuda {

/// A warp copies a row.
struct CopyRows {
  static constexpr int kThreads = CopyRowsConfig::kThreads, kBlocksPerMultiprocessor = 4;
  using Params = CopyRowsParams;

  static void run(const Params& params, char*) {
    const i64 row = static_cast<i64>(block_index()) * CopyRowsConfig::kRowsPerBlock + thread_index() / kWarp;
    if (row >= params.rows) return;
    const int h = static_cast<int>(row % params.heads);
    const int n = static_cast<int>(row / params.heads % params.positions);
    const int b = static_cast<int>(row / params.heads / params.positions);
    const u16* from = params.from.at<u16>(b, n, h);
    u16* to = params.to.at<u16>(b, n, h);
    for (int d = thread_index() % kWarp; d < params.to_dim; d += kWarp) to[d] = d < params.from_dim ? from[d] : u16{0};
  }
};

}  // namespace flash_dmattn::cuda
