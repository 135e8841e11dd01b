// Merging sorted lists, many threads at once. The keys of the newer list are newer than all of the older list, so that
// scores alone rank them.
#pragma once
#include "mask/dynamic_mask_params.cuh"
#include "ptx/block.cuh"
#include "ptx/memory.cuh"
#include "ptx/warp.cuh"

namespace flash_dmattn::cuda {

template <class T>
void swap(T& a, T& b) {
  const T c = a;
  a = b;
  b = c;
}

/// How many of the first `rank` entries of the merged list are of the newer one. Steps do not depend on what they find:
/// only scores are waited for.
template <class Score>
int newer_before(const Score* older, int older_size, const Score* newer, int newer_size, int rank) {
  int found = most(0, rank - older_size);
  const int largest = least(rank, newer_size);
  if (found < largest)
    for (int step = 1 << (31 - leading_zeros(largest - found)); step > 0; step >>= 1) {
      const int i = least(found + step, largest);
      if (newer[i - 1] >= older[rank - i]) found = i;
    }
  return found;
}

/// kCount neighbours at once, which is kind to shared memory's banks. `to` is a multiple of their size.
template <int kCount, class T>
void store_together(const T (&from)[kCount], T* to) {
  struct alignas(kCount * sizeof(T)) Together {
    T each[kCount];
  } together;
  for (int e = 0; e < kCount; ++e) together.each[e] = from[e];
  *reinterpret_cast<Together*>(to) = together;
}

/// Entries [rank, rank + kEach) of the merged list to the same places of `out`, which are aligned to kEach entries, and
/// are there even where the list has an `end` before them.
template <int kEach, class Score, class Position>
void merge_part(List<Score, Position> older, int older_size, List<Score, Position> newer, int newer_size,
                List<Score, Position> out, int rank, int end) {
  int j = newer_before(older.score, older_size, newer.score, newer_size, rank), i = rank - j;
  Score score[kEach];
  const Position* position[kEach];
  for (int e = 0; e < kEach; ++e) {
    const Score x = i < older_size ? older.score[i] : Score{}, y = j < newer_size ? newer.score[j] : Score{};
    const bool is_newer = j < newer_size && y >= x;
    score[e] = is_newer ? y : x;
    position[e] = is_newer ? newer.position + j : older.position + i;
    j += is_newer;
    i += !is_newer;
  }
  Position found[kEach];
  for (int e = 0; e < kEach; ++e) found[e] = rank + e < end ? *position[e] : Position{};
  store_together(score, out.score + rank);
  store_together(found, out.position + rank);
}

/// After each thread has written kEach consecutive entries: those who will read any of the same `entries` (a power of
/// two, aligned) see all of them.
template <int kEach>
void sync_writers(int entries) {
  if (entries <= kWarp * kEach)
    sync_warp();
  else
    sync_block();
}

/// This thread's keys, of positions from `first` on, as a sorted run: from the newest on, by exchanges of neighbours,
/// which leave equal ones in order.
template <int kEach, class Score, class Position>
void sort_own(const Score (&own)[kEach], int first, List<Score, Position> out) {
  Score score[kEach];
  Position position[kEach];
  for (int e = 0; e < kEach; ++e) {
    score[e] = own[kEach - 1 - e];
    position[e] = static_cast<Position>(first + kEach - 1 - e);
  }
  for (int round = 0; round < kEach; ++round)
    for (int e = round % 2; e + 1 < kEach; e += 2)
      if (score[e + 1] > score[e]) {
        swap(score[e], score[e + 1]);
        swap(position[e], position[e + 1]);
      }
  store_together(score, out.score);
  store_together(position, out.position);
  sync_writers<kEach>(2 * kEach);
}

/// Sorted runs of `run` entries into runs of twice as many; every thread makes kEach entries.
template <int kEach, class Score, class Position>
void merge_runs(List<Score, Position> in, List<Score, Position> out, int run) {
  const int at = thread_index() * kEach, rank = at & (2 * run - 1), first = at - rank;
  merge_part<kEach>(in.from(first), run, in.from(first + run), run, out.from(first), rank, rank + kEach);
  sync_writers<kEach>(4 * run);
}

template <int kThreads, class Score>
void copy_list(List<Score> in, List<Score> out, int count) {
#pragma unroll 2
  for (int i = thread_index(); i < count; i += kThreads) {
    out.score[i] = in.score[i];
    out.position[i] = in.position[i];
  }
}

/// To shared memory, where it is after wait_copies.
template <int kThreads, class Score>
void copy_in_background(List<Score> in, List<Score> shared, int count) {
  constexpr int kWords = sizeof(Score) / 4;
#pragma unroll 2
  for (int i = thread_index(); i < count; i += kThreads) {
    for (int word = 0; word < kWords; ++word)
      copy_async_4(reinterpret_cast<u32*>(shared.score + i) + word, reinterpret_cast<const u32*>(in.score + i) + word,
                   true);
    copy_async_4(shared.position + i, in.position + i, true);
  }
}

/// What survives at the start of a node: nothing where there are no lists.
template <int kThreads, bool kInShared, class Score>
void load_start(const Lists<Score>& starts, i64 index, List<Score> out, int count) {
  if (!starts.exist()) {
    for (int i = thread_index(); i < count; i += kThreads) {
      out.score[i] = kNoKey;
      out.position[i] = -1;
    }
  } else if constexpr (kInShared) {
    copy_in_background<kThreads>(starts.at(index), out, count);
  } else {
    copy_list<kThreads>(starts.at(index), out, count);
  }
}

}  // namespace flash_dmattn::cuda
