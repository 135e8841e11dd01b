// Gives every unit a row of its own, where several share one head of the mask.
#pragma once
#include "types.cuh"

namespace flash_dmattn::cuda {

template <class T>
struct RepeatParams {
  const T* from;
  i64 batch, head, element;
  int heads_per_head;
  T* to;  // (batch, heads, count)
  int heads, count;
};

struct RepeatConfig {
  static constexpr int kThreads = 256, kElements = 4 * kThreads;  // of a row, for each block
};

}  // namespace flash_dmattn::cuda
