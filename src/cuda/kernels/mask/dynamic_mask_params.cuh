// What the kernels of the dynamic mask are told. Host and device.
#pragma once
#include "mask/score.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

/// A group of keys is sorted by one block; a chunk of it is what one block finds the ends in.
constexpr int kGroup = 2048, kChunk = 512, kChunksPerGroup = kGroup / kChunk;

/// (B, heads, K) scores; false in `padding` (B | 1, K) is a key that never exists. A row is a (batch, head).
struct Keys {
  const void* score;
  i64 batch, head, key;
  const unsigned char* padding;  // null: none
  i64 padding_batch, padding_key;
  int heads, count;

  constexpr bool exists(int row, int k) const {
    return k < count && (!padding || padding[row / heads * padding_batch + k * padding_key]);
  }
  /// The ranks of the keys first, first + step, …; all numbers are asked for before the first is waited for.
  template <ScoreType kType, int kEach>
  constexpr void ranks(int row, int first, int step, typename Ranking<kType>::Score (&rank)[kEach]) const {
    using Bits = typename Ranking<kType>::Bits;
    const Bits* const scores = static_cast<const Bits*>(score) + row / heads * batch + row % heads * head;
    Bits numbers[kEach];
    for (int e = 0; e < kEach; ++e) {
      const int k = first + e * step;
      numbers[e] = k < count ? scores[k * key] : Bits{};
    }
    for (int e = 0; e < kEach; ++e) rank[e] = exists(row, first + e * step) ? rank_of<kType>(numbers[e]) : kNoKey;
  }
};

/// (B, heads, K) int32.
struct Ends {
  int* data;
  i64 batch, head, key;
  int heads;
  int is_causal;
  int first_position;  // not causal: of a query

  /// Of a key that no query sees.
  constexpr int never(int k) const { return is_causal ? k : first_position; }

  constexpr int* row(int r) const { return data + r / heads * batch + r % heads * head; }
};

/// (B, heads, chunks, slots) int32.
struct Survivors {
  int* data;  // null: not asked for
  i64 batch, head, chunk, slot;
  int heads;

  constexpr int* row(int r, int c) const { return data + r / heads * batch + r % heads * head + c * chunk; }
  /// By `threads` threads, of which this is one.
  constexpr void store(int r, int c, const int* positions, int count, int thread, int threads) const {
    int* const out = row(r, c);
    for (int i = thread; i < count; i += threads) out[i * slot] = positions[i];
  }
};

/// Keys, sorted: the best first, among equal scores the newest. Position -1 and score kNoKey: none.
template <class Score, class Position = int>
struct List {
  Score* score;
  Position* position;

  constexpr List from(i64 i) const { return {score + i, position + i}; }
};

/// Lists of the same size, one after the other.
template <class Score>
struct Lists {
  List<Score> first;
  int size;

  constexpr bool exist() const { return first.score != nullptr; }
  constexpr List<Score> at(i64 i) const { return first.from(i * size); }
};

/// SortKeys: the best keys of each chunk and of each group, the groups of a row one after the other. All ends are
/// written as if no key were ever beaten; not causal: as if all were.
template <class Score>
struct SortKeysParams {
  Keys keys;
  int groups;                             // of a row
  Lists<Score> chunk_lists, group_lists;  // chunk_lists: causal only, not the last of a group
  Ends end;
};

template <class Score>
struct SortBuffers {
  Score score[2][kGroup];
  u16 local[2][kGroup];

  constexpr List<Score, u16> list(int i) { return {score[i], local[i]}; }
};

/// ScanLists: a node's children, from the oldest to the newest, each with a list of its best keys. One block a node.
template <class Score>
struct ScanListsParams {
  Lists<Score> children;
  int children_in_row, nodes_in_row, fan;
  int capacity;               // of what survives: the w best, or the worst of them that the node's keys can beat
  Lists<Score> node_starts;   // what survives at the start of each node; none: nothing
  Lists<Score> child_starts;  // written: the worst children.size of what survives at the start of each child
  Lists<Score> best;          // written: what survives at the end of each node
  Survivors survivors;        // written: what survives, at every `survivors_every`th child
  int survivors_every;
  Lists<Score> scratch;  // two lists a node, where shared memory holds them not
};
constexpr int kScanThreads = 256, kSortThreads = 512, kFindThreads = kChunk / 4, kKeepThreads = 256;

/// Room for a list of that many entries: threads write four together.
constexpr i64 list_slots(i64 entries) { return (entries + 3) / 4 * 4; }

/// Two lists of what survives, two of a child.
constexpr i64 scan_shared_bytes(i64 capacity, i64 child_size, i64 score_bytes) {
  return 2 * (list_slots(capacity) + list_slots(child_size)) * (score_bytes + 4);
}

/// FindEnds: one block a chunk.
template <class Score>
struct FindEndsParams {
  Keys keys;
  int groups, chunks;  // of a row; in SortKeys' lists a row has groups * kChunksPerGroup chunks
  int keep;            // w
  Lists<Score> chunk_lists;
  Lists<Score> group_starts;  // the worst min(w, kGroup) of what survives at the start of each group; none: nothing
  Ends end;
  Survivors survivors;  // where w <= kGroup
  int survivors_every;  // chunks
};
constexpr int kShortestRun = 4, kRuns = 7;  // runs of 4, 8, 16, … kChunk / 2 keys
static_assert(kShortestRun << kRuns == kChunk);

/// Entries of one of two buffers.
constexpr int find_ends_slots(int keep) { return static_cast<int>(list_slots(most(least(keep, kGroup), kChunk))); }
constexpr int find_ends_shared_bytes(int keep, int score_bytes) {
  return (2 * find_ends_slots(keep) + kRuns * kChunk) * (score_bytes + 4);
}

/// KeepBest, not causal: the keys of a row's list are seen by all queries. One block a row.
template <class Score>
struct KeepBestParams {
  Lists<Score> best;
  Ends end;
  int keys;
};

/// KeepAll: no more keys than are kept. One block a row of survivors.
struct KeepAllParams {
  Keys keys;
  Ends end;
  Survivors survivors;
  int chunk, chunks;
};

}  // namespace flash_dmattn::cuda
