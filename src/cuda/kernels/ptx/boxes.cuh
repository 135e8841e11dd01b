// Copies of boxes of a tensor by the copy engine (TMA).
#pragma once
#include "ptx/barrier.cuh"
#include "ptx/memory.cuh"
#include "tensor_map.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

/// The map is among the kernel's parameters; it will be needed soon.
__forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/// A box that begins at that element becomes rows of a panel (see warpgroup.cuh), all heads of a position together. All
/// its bytes count at `barrier`, which an arrive_expecting announced.
__forceinline__ void load_box(void* panel, const TensorMap& map, int column, int head, int position, int batch,
                              Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(panel)),
      "l"(&map), "r"(column), "r"(head), "r"(position), "r"(batch), "r"(shared_address(&barrier))
      : "memory");
}

}  // namespace flash_dmattn::cuda
