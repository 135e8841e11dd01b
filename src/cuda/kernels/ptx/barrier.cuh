// Barriers in shared memory that count arrivals (mbarrier). A phase is complete when all that it expects have arrived,
// and all the bytes that arrivals announced; then the next one begins, of the other parity.
#pragma once
#include "ptx/memory.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

struct alignas(8) Barrier {
  u64 state;
};

/// By one thread; `arrivals` in each phase.
__forceinline__ void init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
/// By the same thread after its inits, before a sync_block: then all see them.
__forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__forceinline__ void arrive(Barrier& barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(&barrier))
               : "memory");
}
/// The same without a branch: what is the same for a warp stays so.
__forceinline__ void arrive_if(Barrier& barrier, bool arrives) {
  asm volatile(
      "{ .reg .pred arrives; .reg .b64 state; setp.ne.b32 arrives, %1, 0; "
      "@arrives mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(&barrier)),
      "r"(static_cast<int>(arrives))
      : "memory");
}
/// An arrival in the background, as soon as this thread's copy_async_* so far have landed.
__forceinline__ void arrive_after_copies(Barrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
/// An arrival; the phase takes `bytes` more of bulk_load besides.
__forceinline__ void arrive_expecting(Barrier& barrier, int bytes) {
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}

/// Until the phase of that parity (the first one's is 0) is complete: one of 1 is, of a fresh barrier.
__forceinline__ void wait(Barrier& barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again_%=: mbarrier.try_wait.parity.shared.b64 complete, [%0], %1;\n"
      "@!complete bra again_%=;\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

/// Whether it is, without waiting: asked early, an answer is there when it is needed.
__forceinline__ bool is_complete(Barrier& barrier, int parity) {
  int complete;
  asm volatile(
      "{ .reg .pred complete; mbarrier.test_wait.parity.shared.b64 complete, [%1], %2; selp.b32 %0, 1, 0, complete; }"
      : "=r"(complete)
      : "r"(shared_address(&barrier)), "r"(parity)
      : "memory");
  return complete != 0;
}
/// wait, if is_complete was false.
__forceinline__ void wait_unless(bool complete, Barrier& barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "setp.ne.b32 complete, %2, 0;\n"
      "@complete bra done_%=;\n"
      "again_%=: mbarrier.try_wait.parity.shared.b64 complete, [%0], %1;\n"
      "@!complete bra again_%=;\n"
      "done_%=:\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity), "r"(static_cast<int>(complete))
      : "memory");
}

}  // namespace flash_dmattn::cuda
