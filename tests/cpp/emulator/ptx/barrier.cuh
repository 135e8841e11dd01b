// Barriers in shared memory that count arrivals.
#pragma once
#include "../threads.h"
#include "types.cuh"

namespace flash_dmattn::cuda {

struct alignas(8) Barrier {
  u64 state;
};

inline void init(Barrier& barrier, int arrivals) { emulator::init_barrier(&barrier, arrivals); }
inline void fence_barriers() { emulator::self->barriers_are_fenced = true; }

inline void arrive(Barrier& barrier) { emulator::arrive_at_barrier("arrive", &barrier, 0); }
inline void arrive_if(Barrier& barrier, bool arrives) {
  if (arrives) arrive(barrier);
}
inline void arrive_after_copies(Barrier& barrier) { emulator::arrive_at_barrier_after_copies(&barrier); }
inline void arrive_expecting(Barrier& barrier, int bytes) {
  emulator::arrive_at_barrier("arrive_expecting", &barrier, bytes);
}

inline void wait(Barrier& barrier, int parity) { emulator::wait_at_barrier(&barrier, parity); }
inline bool is_complete(Barrier& barrier, int parity) { return emulator::is_complete(&barrier, parity); }
inline void wait_unless(bool complete, Barrier& barrier, int parity) {
  if (!complete) wait(barrier, parity);
}

}  // namespace flash_dmattn::cuda
