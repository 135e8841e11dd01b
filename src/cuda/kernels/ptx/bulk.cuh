// Copies of contiguous bytes by the copy engine. Addresses and numbers of bytes are multiples of 16.
#pragma once
#include "ptx/barrier.cuh"
#include "ptx/memory.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

/// What this thread wrote to shared memory is seen by bulk copies and by wgmma, once it has told their issuer.
__forceinline__ void fence_for_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/// This thread's bulk copies from now on come after what it has seen happen in global memory.
__forceinline__ void fence_global_for_bulk() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

/// Adds `bytes` of float32 to global memory.
__forceinline__ void bulk_add(float* global, const float* shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
__forceinline__ void bulk_store(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
}
/// Ends a group of this thread's bulk_add and bulk_store.
__forceinline__ void commit_bulk() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// Waits until at most kPending of this thread's groups still read shared memory.
template <int kPending>
__forceinline__ void wait_bulk_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
/// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__forceinline__ void wait_bulk() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Counts its bytes at `barrier`, which an arrive_expecting announced.
__forceinline__ void bulk_load(void* shared, const void* global, int bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

}  // namespace flash_dmattn::cuda
