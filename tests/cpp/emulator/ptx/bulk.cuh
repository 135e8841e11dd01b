// Copies of contiguous bytes by the copy engine.
#pragma once
#include "../bulk_copies.h"
#include "../threads.h"
#include "ptx/barrier.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

inline void fence_for_bulk() {}
inline void fence_global_for_bulk() {}

inline void bulk_add(float* global, const float* shared, int bytes) {
  emulator::start_bulk_copy("bulk_add", global, shared, bytes, true);
}
inline void bulk_store(void* global, const void* shared, int bytes) {
  emulator::start_bulk_copy("bulk_store", global, shared, bytes, false);
}
inline void commit_bulk() { emulator::commit_bulk_copies(); }
template <int kPending>
void wait_bulk_read() {
  emulator::wait_bulk_copies(kPending, false);
}
template <int kPending>
void wait_bulk() {
  emulator::wait_bulk_copies(kPending, true);
}

inline void bulk_load(void* shared, const void* global, int bytes, Barrier& barrier) {
  emulator::require_aligned("bulk_load", shared, 16);
  emulator::require_aligned("bulk_load", global, 16);
  emulator::require_shared("bulk_load", shared, bytes);
  if (bytes <= 0 || bytes % 16 != 0) emulator::fail("bulk_load: of %d bytes", bytes);
  emulator::load_to_barrier(shared, global, bytes, &barrier);
}

}  // namespace flash_dmattn::cuda
