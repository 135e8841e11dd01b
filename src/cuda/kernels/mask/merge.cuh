// Merging sorted lists, many threads at once. The keys of the newer list are newer than all of the older list, so that
// scores alone rank them.
#pragma once
#include "mask/dynamic_mask_params.cuh"
#include "ptx/block.cuh"
#include "ptx/warp.cuh"

namespace flash_dmattn::cuda {

template <class T>
void swap(T& a, T& b) {
  const T c = a;
  a = b;
  b = c;
}

/// How many of the first `rank` entries of the merged list are of the newer one.
template <class Score>
int newer_before(const Score* older, int older_size, const Score* newer, int newer_size, int rank) {
  int low = most(0, rank - older_size), high = least(rank, newer_size);
  while (low < high) {
    const int middle = (low + high) / 2;
    if (newer[middle] >= older[rank - 1 - middle])
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

/// Entries [rank, rank + kEach) of the merged list, as far as they are before `end`, to the same places of `out`.
template <int kEach, class Score, class Position>
void merge_part(List<Score, Position> older, int older_size, List<Score, Position> newer, int newer_size,
                List<Score, Position> out, int rank, int end) {
  int j = newer_before(older.score, older_size, newer.score, newer_size, rank), i = rank - j;
  Score x = i < older_size ? older.score[i] : Score{}, y = j < newer_size ? newer.score[j] : Score{};
  for (int e = 0; e < kEach; ++e) {
    if (rank + e >= end) return;
    if (j < newer_size && (i >= older_size || y >= x)) {
      out.score[rank + e] = y;
      out.position[rank + e] = newer.position[j];
      y = ++j < newer_size ? newer.score[j] : Score{};
    } else {
      out.score[rank + e] = x;
      out.position[rank + e] = older.position[i];
      x = ++i < older_size ? older.score[i] : Score{};
    }
  }
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

/// Sorted runs of `run` entries into runs of twice as many; every thread makes kEach entries.
template <int kEach, class Score>
void merge_runs(List<Score, u16> in, List<Score, u16> out, int run) {
  const int at = thread_index() * kEach, rank = at & (2 * run - 1), first = at - rank;
  merge_part<kEach>(in.from(first), run, in.from(first + run), run, out.from(first), rank, 2 * run);
  sync_writers<kEach>(4 * run);
}

template <class Score>
void copy_list(List<Score> in, List<Score> out, int count) {
  for (int i = thread_index(); i < count; i += block_threads()) {
    out.score[i] = in.score[i];
    out.position[i] = in.position[i];
  }
}

/// What survives at the start of a node: nothing where there are no lists.
template <class Score>
void load_start(const Lists<Score>& starts, i64 index, List<Score> out, int count) {
  if (starts.exist()) return copy_list(starts.at(index), out, count);
  for (int i = thread_index(); i < count; i += block_threads()) {
    out.score[i] = kNoKey;
    out.position[i] = -1;
  }
}

}  // namespace flash_dmattn::cuda
