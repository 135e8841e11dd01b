// What the 32 threads of a warp tell each other. All of them take part in every call.
#pragma once
#include "types.cuh"

namespace flash_dmattn::cuda {

constexpr int kWarp = 32;

__forceinline__ void sync_warp() { __syncwarp(); }

/// The value of thread `lane`; of thread own ^ mask; of thread own - delta (own value for the first ones).
template <class T>
__forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(~0u, value, lane);
}
template <class T>
__forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
template <class T>
__forceinline__ T shuffle_up(T value, int delta) {
  return __shfl_up_sync(~0u, value, delta);
}

/// The sum over all threads.
__forceinline__ int warp_sum(int value) { return __reduce_add_sync(~0u, value); }

/// A bit for each thread whose `predicate` holds.
__forceinline__ u32 ballot(bool predicate) { return __ballot_sync(~0u, predicate); }

/// Whether the `predicate` of any thread holds.
__forceinline__ bool any(bool predicate) { return __any_sync(~0u, predicate) != 0; }

__forceinline__ int count_ones(u32 x) { return __popc(x); }
__forceinline__ int leading_zeros(u32 x) { return __clz(static_cast<int>(x)); }
/// Index of the lowest one; -1 of 0.
__forceinline__ int lowest_one(u32 x) { return __ffs(static_cast<int>(x)) - 1; }

}  // namespace flash_dmattn::cuda
