// Copies between global memory, shared memory and registers, and atomic operations.
#pragma once
#include <cstring>

#include "../threads.h"
#include "types.cuh"

namespace flash_dmattn::cuda {

inline u32 shared_address(const void* p) {
  emulator::require_shared("shared_address", p, 0);
  return static_cast<u32>(static_cast<const char*>(p) - emulator::self->block->shared);
}

namespace emulator {

inline void copy_async(const char* operation, void* shared, const void* global, int bytes, bool valid) {
  require_aligned(operation, shared, bytes);
  require_shared(operation, shared, bytes);
  if (valid) require_aligned(operation, global, bytes);
  const int number = begin_copy(shared, bytes);
  self->copies.push_back({shared, global, bytes, valid, self->groups, number});
}

}  // namespace emulator

inline void copy_async_16(void* shared, const void* global, bool valid) {
  emulator::copy_async("copy_async_16", shared, global, 16, valid);
}
inline void copy_async_4(void* shared, const void* global, bool valid) {
  emulator::copy_async("copy_async_4", shared, global, 4, valid);
}
inline void commit_copies() { ++emulator::self->groups; }
template <int kPending>
void wait_copies() {
  emulator::Thread& thread = *emulator::self;
  while (!thread.copies.empty() && thread.copies.front().group < thread.groups - kPending)
    emulator::land_first_copy(thread);
}

namespace emulator {

template <bool kTransposed>
void load_matrices(const char* operation, u32 (&m)[4], const void* row) {
  require_aligned(operation, row, 16);
  require_shared(operation, row, 16);
  struct Lane {
    u32 (&m)[4];
    const u16* row;
  } lane{m, static_cast<const u16*>(row)};
  with_warp(operation, lane, [](Lane* const* lanes) {
    for (int t = 0; t < 32; ++t)
      for (int i = 0; i < 4; ++i) {
        const auto element = [&](int row, int column) -> u32 {
          return kTransposed ? lanes[8 * i + column]->row[row] : lanes[8 * i + row]->row[column];
        };
        const int column = 2 * (t % 4);
        lanes[t]->m[i] = element(t / 4, column) | element(t / 4, column + 1) << 16;
      }
  });
}

}  // namespace emulator

inline void load_matrices(u32 (&m)[4], const void* row) { emulator::load_matrices<false>("load_matrices", m, row); }
inline void load_matrices_transposed(u32 (&m)[4], const void* row) {
  emulator::load_matrices<true>("load_matrices_transposed", m, row);
}

inline int fetch_add(int* p, int x) {
  const int before = *p;
  *p += x;
  return before;
}
inline void add_to(float* p, float x) { *p += x; }
inline void add_to(float* p, float x, float y) {
  emulator::require_aligned("add_to", p, 8);
  p[0] += x;
  p[1] += y;
}
inline void add_to(float* p, float x, float y, float z, float w) {
  emulator::require_aligned("add_to", p, 16);
  p[0] += x;
  p[1] += y;
  p[2] += z;
  p[3] += w;
}
inline void or_into(u32* p, u32 bits) { *p |= bits; }

inline int load_acquired(const int* p) {
  emulator::wait_for_others();
  return *p;
}
inline void add_released(int* p, int x) { *p += x; }

}  // namespace flash_dmattn::cuda
