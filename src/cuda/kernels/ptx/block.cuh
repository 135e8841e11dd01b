// Where a thread is, and barriers.
#pragma once
#include "types.cuh"

namespace flash_dmattn::cuda {

__forceinline__ int thread_index() {
  const int index = static_cast<int>(threadIdx.x);
  __builtin_assume(index >= 0 && index < 1024);  // divisions by constants are then shifts and masks
  return index;
}
/// The same, read anew by every call: what follows from it needs no register in between.
__forceinline__ int thread_index_anew() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  __builtin_assume(index >= 0 && index < 1024);
  return index;
}
/// Read anew by every call: what follows from it needs no register in between.
__forceinline__ int block_index() {
  int x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return x;
}
__forceinline__ int block_index_y() { return static_cast<int>(blockIdx.y); }
__forceinline__ int block_index_z() { return static_cast<int>(blockIdx.z); }
__forceinline__ int grid_blocks() { return static_cast<int>(gridDim.x); }
__forceinline__ int grid_blocks_y() { return static_cast<int>(gridDim.y); }

__forceinline__ void sync_block() { __syncthreads(); }
/// Barrier `id` (1..15) of `threads` threads.
__forceinline__ void sync_threads(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace flash_dmattn::cuda
