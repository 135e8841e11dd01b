// Joins what the parts of a list gave: one block for each row (batch, query head, query).
#pragma once
#include "attention/softmax.cuh"
#include "ptx/block.cuh"
#include "ptx/number.cuh"
#include "ptx/warp.cuh"
#include "sm80/forward_params.cuh"
#include "sm80/tiles.cuh"

namespace flash_dmattn::cuda {

template <CombineOptions kOptions>
struct Combine {
  static constexpr int kThreads = kCombineThreads, kBlocksPerMultiprocessor = 4, kWarps = kThreads / kWarp;
  using Params = CombineParams;
  using T = typename TypeOf<kOptions.number>::type;

  struct Shared {
    float weight[kMostSplits];
  };
  static_assert(sizeof(Shared) == CombineParams::kSharedBytes);

  static void run(const Params& params, char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Shape& shape = params.shape;
    const i64 row = block_index(), rows = static_cast<i64>(shape.batch) * shape.heads * shape.query_len;
    const int thread = thread_index(), lane = thread % kWarp;

    // Every warp computes the same, for itself.
    PartialSum all{-kInfinity, 0};
    for (int i = lane; i < params.splits; i += kWarp) {
      const PartialSum part = params.split_sums[i * rows + row];
      if (part.sum > 0) all.reference = maximum(all.reference, part.reference);
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2)
      all.reference = maximum(all.reference, shuffle_xor(all.reference, mask));
    for (int i = lane; i < params.splits; i += kWarp) {
      const PartialSum part = params.split_sums[i * rows + row];
      const float weight = part.sum > 0 ? part.sum * fast_exp2(part.reference - all.reference) : 0;
      all.sum += weight;
      if (thread < kWarp) shared.weight[i] = weight;
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) all.sum += shuffle_xor(all.sum, mask);
    sync_block();

    const int q = static_cast<int>(row % shape.query_len), h = static_cast<int>(row / shape.query_len % shape.heads),
              b = static_cast<int>(row / shape.query_len / shape.heads);
    const float scale = all.sum > 0 ? fast_reciprocal(all.sum) : 0;
    T* const out = params.out.template at<T>(b, q, h);
    for (int d = thread; d < shape.head_dim; d += kThreads) {
      const float* from = params.split_out + row * shape.head_dim + d;
      const i64 stride = rows * shape.head_dim;
      float x = 0;
#pragma unroll 8
      for (int i = 0; i < params.splits; ++i) x += shared.weight[i] * from[i * stride];
      out[d] = from_float<T>(x * scale);
    }
    if (thread == 0) *params.lse.at(b, h, q) = natural_lse(all.reference, all.sum);
  }
};

}  // namespace flash_dmattn::cuda
