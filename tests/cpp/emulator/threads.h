// What the emulated instructions (ptx/) are made of: threads that meet.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "barriers.h"
#include "products.h"
#include "types.cuh"

namespace flash_dmattn::cuda::emulator {

/// Unwritten memory: NaN whatever the dtype, and as bits or a boolean neither all ones nor all zeros.
inline void poison(void* memory, std::size_t bytes) {
  auto* const p = static_cast<unsigned char*>(memory);
  for (std::size_t i = 0; i < bytes && i < 16; ++i) p[i] = i % 2 == 0 ? 0xff : 0x7f;
  for (std::size_t n = 16; n < bytes; n *= 2) std::memcpy(p + n, p, n < bytes - n ? n : bytes - n);
}
constexpr int kPoison = 0x7fff7fff;

struct Block {
  int index[3], grid[3];
  int threads;
  char* shared;
  int shared_bytes;
  std::vector<int> copies_to;                    ///< by 4 bytes of shared memory: the last copy that went there
  int copies = 0;                                ///< to shared memory, so far
  std::map<const void*, BarrierQueue> barriers;  ///< those of shared memory
  std::vector<Warpgroup> warpgroups;

  bool is_shared(const void* p, int bytes) const {
    return p >= shared && static_cast<const char*>(p) + bytes <= shared + shared_bytes;
  }
};

/// 16 bytes on their way to shared memory; or, of 0 bytes, an arrival at the barrier there, behind the copies so far.
struct Copy {
  void* shared;
  const void* global;
  int bytes;
  bool valid;
  int group;
  int number;  ///< in its block
};

/// Of a copy: destroys what it will overwrite, and gives it its number.
int begin_copy(void* shared, int bytes);
/// Whether no other copy was on its way to the same place: if one was, what is there is undefined.
bool may_land(const void* shared, int bytes, int number);

/// Bytes on their way from shared memory to global memory.
struct BulkCopy {
  void* global;
  const void* shared;
  int bytes;
  bool adds;
  int group;
  std::vector<char> read;  ///< the bytes, once shared memory has been read
};

struct Thread {
  int index;  ///< in its block
  Block* block;
  std::deque<Copy> copies;
  int groups = 0;  ///< committed
  std::deque<BulkCopy> bulk_copies;
  int bulk_groups = 0;
  i64 products = 0;  ///< issued
  int product_groups = 0;
  bool products_are_fenced = false, barriers_are_fenced = true;
  bool lands = false;  ///< woken to see to it that what it waits for lands

  int lane() const { return index % 32; }
};

/// The one that runs: threads take turns, and only change where they meet or wait.
extern Thread* self;

/// Ends the launch, which throws an Error; does not return. The text is printf's.
[[gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

/// Waits until all threads of the warp have come here. The last one does `work` for all of them: it gets what each
/// gave.
void meet_warp(const char* operation, void* given, void (*work)(void* const* given));

/// The same with the 128 threads of a warpgroup.
void meet_warpgroup(const char* operation, void* given, void (*work)(void* const* given));

/// Comes to barrier `id`, and waits until `threads` threads of the block have.
void meet_block(int id, int threads);

/// At random: called by a thread that has told others something and does not wait for them. What it does next may come
/// long after.
void let_others_go_first();

/// Until another thread wakes it.
void sleep();
void wake(Thread& thread);

/// Lets others run: called by a thread that waits for another block.
void wait_for_others();

/// The same with types: `work` is a lambda without captures that takes Lane* (&)[32], indexed by thread.
template <class Lane, class Work>
void with_warp(const char* operation, Lane& lane, Work) {
  meet_warp(operation, &lane, [](void* const* given) {
    Lane* lanes[32];
    for (int i = 0; i < 32; ++i) lanes[i] = static_cast<Lane*>(given[i]);
    Work{}(lanes);
  });
}

inline void require_aligned(const char* operation, const void* p, int bytes) {
  if (reinterpret_cast<std::uintptr_t>(p) % bytes != 0) fail("%s: the address is no multiple of %d", operation, bytes);
}
inline void require_shared(const char* operation, const void* p, int bytes) {
  if (!self->block->is_shared(p, bytes)) fail("%s: outside the block's shared memory", operation);
}

}  // namespace flash_dmattn::cuda::emulator
