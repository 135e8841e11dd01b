// What the kernels that make key lists are told. A *list head* is what shares its lists: a head of the mask. Lists are
// made once for each, and written down for each of its `copies` units.
#pragma once
#include "plan.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

/// A value for each key (or pair): `heads_per_head` list heads read one head of it.
template <class T>
struct Masking {
  const T* data;  // null: none
  i64 batch, head, query, key;
  int heads_per_head;

  const T* row(int b, int head_index) const {
    return data ? data + b * batch + head_index / heads_per_head * head : nullptr;
  }
};

/// Which queries and keys there are, how they are cut into runs, and where the lists go.
struct ListsParams {
  Masking<unsigned char> columns;  // one value for each key, the same for all queries
  Masking<int> end;
  int heads;  // list heads
  int copies;
  int query_len, key_len, run, runs;
  int is_causal;
  KeyList* lists;  // (batch, heads, copies, runs)
  int* positions;

  constexpr int first_position() const { return key_len - query_len; }
  /// The absolute positions of run r are [first(r), stop(r)); first may be negative.
  constexpr int first(int r) const { return first_position() + r * run; }
  constexpr int stop(int r) const { return least<i64>(static_cast<i64>(first(r)) + run, key_len); }
  /// The keys before this one are all that run r may see.
  constexpr int limit(int r) const { return is_causal ? most(stop(r), 0) : key_len; }

  KeyList& at(int b, int head, int copy, int r) const {
    return lists[((static_cast<i64>(b) * heads + head) * copies + copy) * runs + r];
  }
};

/// Lists from survivors: what the runs of a block have in common is read once.
struct SurvivorListsConfig {
  static constexpr int kThreads = 512, kWarps = kThreads / 32;
  static constexpr int kEntries = 4, kStage = kThreads * kEntries;  // candidates in shared memory at a time
  static constexpr int kLongestRun = 4096;
  /// Runs per block, a warp for each: as many as are about as long as a chunk.
  static constexpr int runs_per_block(int run, int chunk) { return most(1, least(kWarps, chunk / run)); }
  /// A run of t positions tests at most the t keys that die in it and the t that come in it.
  static constexpr int tested_capacity(int run) { return 2 * run; }
  static constexpr int shared_bytes(int run, int chunk) {
    return kStage * 8 + kWarps * 4 + runs_per_block(run, chunk) * tested_capacity(run) * 4;
  }
};

struct SurvivorListsParams {
  ListsParams lists;
  Masking<int> survivors;  // `query` is the stride from one chunk to the next, `key` from one slot to the next
  int slots, chunk;
  int blocks;    // for each list head
  int capacity;  // of a list
};

/// Lists of a mask that is the same for all queries: one list for each list head, of which every run has the beginning.
struct ColumnListsConfig {
  static constexpr int kThreads = 512, kWarps = kThreads / 32;
  static constexpr int kGroups = 8, kStage = kThreads * kGroups;  // keys at a time
  static constexpr int kSharedBytes = kWarps * 8;
  static constexpr int kFewStages = 8;  // that one block goes through
};

struct ColumnListsParams {
  ListsParams lists;
  int slices;       // blocks for each list head
  int slice;        // keys of a block, a multiple of kStage
  int* counts;      // with several slices, for each slice: keys that need no test, other keys
  int is_counting;  // the first of two launches
  i64 capacity;     // of a list
};

}  // namespace flash_dmattn::cuda
