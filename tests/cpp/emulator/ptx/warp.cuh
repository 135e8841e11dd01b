// What the 32 threads of a warp tell each other.
#pragma once
#include <bit>

#include "../threads.h"
#include "types.cuh"

namespace flash_dmattn::cuda {

constexpr int kWarp = 32;

inline void sync_warp() {
  emulator::meet_warp("sync_warp", nullptr, [](void* const*) {});
}

namespace emulator {

/// The value of thread `from`.
template <class T>
T exchange(const char* operation, T value, int from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  struct Lane {
    T value, result;
    int from;
  } lane{value, value, from};
  with_warp(operation, lane, [](Lane* const* lanes) {
    for (int i = 0; i < 32; ++i) lanes[i]->result = lanes[lanes[i]->from & 31]->value;
  });
  return lane.result;
}

}  // namespace emulator

template <class T>
T shuffle(T value, int lane) {
  return emulator::exchange("shuffle", value, lane);
}
template <class T>
T shuffle_xor(T value, int mask) {
  return emulator::exchange("shuffle_xor", value, emulator::self->lane() ^ mask);
}
template <class T>
T shuffle_up(T value, int delta) {
  const int lane = emulator::self->lane();
  return emulator::exchange("shuffle_up", value, lane < delta ? lane : lane - delta);
}

inline int warp_sum(int value) {
  struct Lane {
    int value, result;
  } lane{value, 0};
  emulator::with_warp("warp_sum", lane, [](Lane* const* lanes) {
    int sum = 0;
    for (int i = 0; i < 32; ++i) sum += lanes[i]->value;
    for (int i = 0; i < 32; ++i) lanes[i]->result = sum;
  });
  return lane.result;
}

inline u32 ballot(bool predicate) {
  struct Lane {
    bool predicate;
    u32 result;
  } lane{predicate, 0};
  emulator::with_warp("ballot", lane, [](Lane* const* lanes) {
    u32 result = 0;
    for (int i = 0; i < 32; ++i) result |= static_cast<u32>(lanes[i]->predicate) << i;
    for (int i = 0; i < 32; ++i) lanes[i]->result = result;
  });
  return lane.result;
}

inline bool any(bool predicate) { return ballot(predicate) != 0; }

inline int count_ones(u32 x) { return std::popcount(x); }
inline int leading_zeros(u32 x) { return std::countl_zero(x); }
inline int lowest_one(u32 x) { return x ? std::countr_zero(x) : -1; }

}  // namespace flash_dmattn::cuda
