// Barriers in shared memory that count arrivals, and what is under way to them.
#pragma once
#include <deque>
#include <string>
#include <vector>

namespace flash_dmattn::cuda::emulator {

struct Thread;

/// Who waits at a barrier, and what will count there: it lands when nobody can go on without.
struct BarrierQueue {
  struct Waiting {
    Thread* thread;
    int parity;
  };
  /// The arrival of a thread behind its copies, or bytes from global memory.
  struct Expected {
    Thread* thread;
    void* shared;
    const void* global;
    int bytes;
    int number;  // of the copy
  };
  std::vector<Waiting> waiting;
  std::deque<Expected> expected;
};

void init_barrier(void* barrier, int arrivals);
/// One arrival; the phase takes `bytes` more.
void arrive_at_barrier(const char* operation, void* barrier, int bytes);
void arrive_at_barrier_after_copies(void* barrier);
void load_to_barrier(void* shared, const void* global, int bytes, void* barrier);
void wait_at_barrier(void* barrier, int parity);
bool is_complete(void* barrier, int parity);

/// What the current phase lacks.
std::string describe_barrier(const void* barrier);

/// The first of the thread's copies, or the arrival behind them.
void land_first_copy(Thread& thread);

}  // namespace flash_dmattn::cuda::emulator
