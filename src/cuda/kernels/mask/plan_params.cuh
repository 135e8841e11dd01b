// What the kernels that make key lists are told. A *list head* is what shares its lists: a head of the mask. Lists are
// made once for each, and written down for each of its `copies` units.
#pragma once
#include "plan.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

/// A value for each key (or pair): `heads_per_head` list heads read one head of it.
template <class T>
struct Masking {
  T* data;  // null: none
  i64 batch, head, query, key;
  int heads_per_head;

  T* row(int b, int head_index) const { return data ? data + b * batch + head_index / heads_per_head * head : nullptr; }
  /// Whether a list head is the first of those that read its row.
  constexpr bool is_first_of_row(int b, int head_index) const {
    return (batch != 0 || b == 0) && head_index % heads_per_head == 0;
  }
};

/// Which queries and keys there are, how they are cut into runs, and where the lists go.
struct ListsParams {
  Masking<const unsigned char> columns;  // one value for each key, the same for all queries
  Masking<const int> end;
  int heads;  // list heads
  int copies;
  int key_len;
  Runs runs;
  int is_causal;
  KeyList* lists;  // (batch, heads, copies, runs.count)
  int* positions;

  constexpr int first_position() const { return key_len - runs.queries; }
  /// The absolute positions of run r are [first(r), stop(r)); first may be negative.
  constexpr int first(int r) const { return first_position() + runs.first(r); }
  constexpr int stop(int r) const { return first_position() + runs.stop(r); }
  /// The keys before this one are all that run r may see.
  constexpr int limit(int r) const { return is_causal ? most(stop(r), 0) : key_len; }

  KeyList& at(int b, int head, int copy, int r) const {
    return lists[((static_cast<i64>(b) * heads + head) * copies + copy) * runs.count + r];
  }
};

/// Lists from survivors: what the runs of a block have in common is read once.
struct SurvivorListsConfig {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kEntries = 6, kStage = kThreads * kEntries;  // candidates in shared memory at a time
  static constexpr int kLongestRun = 4096;
  /// Runs per block, a warp for each: as many as have half as many keys of their own as survivors in common.
  static constexpr int runs_per_block(int run, int slots, int chunk) {
    return most(1, least(kWarps, most(slots, chunk) / 2 / run));
  }
  /// A run of t positions tests at most the t keys that die in it and the t that come in it.
  static constexpr int tested_capacity(int run) { return 2 * run; }
  static constexpr int shared_bytes(int run, int runs_per_block) {
    return kStage * (8 + 4) + kWarps * 4 + runs_per_block * tested_capacity(run) * 4;
  }
};

struct SurvivorListsParams {
  ListsParams lists;
  Masking<const int> survivors;  // `query` is the stride from one chunk to the next, `key` from one slot to the next
  int slots, chunk;
  int runs_per_block, blocks;  // blocks: for each list head
  int capacity;                // of a list
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

/// Lists of a mask with a value for each pair. It is read once: PackMask makes bits of it, and moves the keys of each
/// segment that are not empty together; BitLists puts segments together, the keys that every position sees first.
/// PackSavedMask does as PackMask, from the bits that a PackMask saved.
struct BitListsConfig {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kStrip = 512;  // keys that a warp reads at a time, for 32 positions
  static constexpr int kMostWords = kMostBits / 32;
  static constexpr int kMostTileKeys = 128;  // of an attention kernel
  static constexpr int shared_bytes(int words, int segment) { return segment * (words * 4 + 1) + kWarps * 8; }
  static constexpr int kMostSharedBytes = 48 << 10;
  /// Keys of a segment, which a block packs: as few strips, a word of which is an item, as leave the fewest warps idle.
  static constexpr int segment(int words) {
    const auto busy = [&](int strips) {  // in percent
      const int items = strips * words;
      return 100 * items / round_up(items, kWarps);
    };
    int best = 1;
    for (int strips = 2; strips <= kWarps && shared_bytes(words, kStrip * strips) <= kMostSharedBytes; ++strips)
      if (busy(strips) > busy(best)) best = strips;
    return kStrip * best;
  }
};

/// Where lists of unequal length begin: list 0 has room for `first` entries, each next one for `step` more. The lists
/// of the first `empty` runs have none.
struct Staircase {
  i64 first, step;
  int empty;

  constexpr i64 start(int r) const {
    const i64 n = most(r - empty, 0);
    return n * first + step * (n * (n - 1) / 2);
  }
};

struct BitListsParams {
  ListsParams lists;
  Masking<const unsigned char> mask;
  Masking<u32> saved;  // the mask's bits, (…, divide_up(Q, 32), K): `query` is the stride from one word to the next
  int is_aligned;      // of what is read, every 16 bytes of keys lie together at a multiple of 16 bytes
  int words;           // for each key of a run
  int segment;         // keys
  u32* bits;
  Staircase room;  // in a list head's part of `lists.positions`, of room.start(runs) entries
  int segments;
  i64 first_list;  // lists (a list head's run each) are made some at a time

  /// Whether no word of `saved` has bits of two runs.
  constexpr bool runs_have_whole_words() const { return lists.runs.length % 32 == 0 && lists.runs.missing % 32 == 0; }

  // What PackMask leaves for BitLists, for each list and segment: how many keys every position sees and how many some
  // see, those keys in this order, and the bits of the latter.
  int* counts;
  int* segment_positions;
  u32* segment_bits;
};

}  // namespace flash_dmattn::cuda
