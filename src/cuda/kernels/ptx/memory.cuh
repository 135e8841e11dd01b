// Copies between global memory, shared memory and registers, and atomic operations.
#pragma once
#include "types.cuh"

namespace flash_dmattn::cuda {

__forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

/// 16 bytes from global to shared memory, in the background; zeros where not `valid`. Both addresses are multiples
/// of 16.
__forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
/// 4 bytes, addresses that are multiples of 4.
__forceinline__ void copy_async_4(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}
/// Ends a group of this thread's copies.
__forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Four 8x8 matrices of 16-bit numbers from shared memory. Thread t gives the address of row t % 8 of matrix t / 8 (16
/// bytes, aligned), and gets of each matrix the two numbers at row t / 4, columns 2 (t % 4) and the next.
__forceinline__ void load_matrices(u32 (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}
/// The same with each matrix transposed.
__forceinline__ void load_matrices_transposed(u32 (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

/// Adds, and gives what was there.
__forceinline__ int fetch_add(int* p, int x) { return atomicAdd(p, x); }
/// Adds in global memory, without waiting.
__forceinline__ void add_to(float* p, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory");
}
/// Adds two neighbours; the address is a multiple of 8.
__forceinline__ void add_to(float* p, float x, float y) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(x), "f"(y) : "memory");
#else
  add_to(p, x);
  add_to(p + 1, y);
#endif
}
/// Adds four neighbours; the address is a multiple of 16.
__forceinline__ void add_to(float* p, float x, float y, float z, float w) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
#else
  add_to(p, x);
  add_to(p + 1, y);
  add_to(p + 2, z);
  add_to(p + 3, w);
#endif
}
/// Sets bits in global memory, without waiting.
__forceinline__ void or_into(u32* p, u32 bits) {
  asm volatile("red.global.or.b32 [%0], %1;" ::"l"(p), "r"(bits) : "memory");
}

/// A counter in global memory that other blocks wait for: what was written before add_released is seen by a thread that
/// has read the sum with load_acquired.
__forceinline__ int load_acquired(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__forceinline__ void add_released(int* p, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

}  // namespace flash_dmattn::cuda
