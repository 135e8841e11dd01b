#pragma once
#include "layout/repeat_params.cuh"
#include "ptx/block.cuh"

namespace flash_dmattn::cuda {

template <class T>
struct Repeat {
  static constexpr int kThreads = RepeatConfig::kThreads, kBlocksPerMultiprocessor = 4;
  using Params = RepeatParams<T>;

  static void run(const Params& params, char*) {
    const int blocks = divide_up(params.count, RepeatConfig::kElements);
    const i64 row = block_index() / blocks, b = row / params.heads, head = row % params.heads / params.heads_per_head;
    const T* from = params.from + b * params.batch + head * params.head;
    T* to = params.to + row * params.count;
    const i64 start = static_cast<i64>(block_index() % blocks) * RepeatConfig::kElements;
    const i64 stop = least<i64>(start + RepeatConfig::kElements, params.count);
    for (i64 i = start + thread_index(); i < stop; i += kThreads) to[i] = from[i * params.element];
  }
};

}  // namespace flash_dmattn::cuda
