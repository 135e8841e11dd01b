// The plan: for every run of query positions (a tile of the forward pass, a chunk of the backward pass), the keys to
// load and how they are tested. Kernels read plans; they know nothing of where a mask came from.
#pragma once
#include "problem.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

/// Query positions, cut into runs of `length` of which one is shorter.
struct Runs {
  int length, count;
  int missing;  ///< from the first one
  int queries;

  /// The last one is shorter: run r begins at r * length.
  static constexpr Runs short_last(int queries, int length) { return {length, count_of(queries, length), 0, queries}; }
  /// The first one is shorter, whose queries see the fewest keys of a causal call: all that see many fill their tiles.
  static constexpr Runs short_first(int queries, int length) {
    const int count = count_of(queries, length);
    return {length, count, static_cast<int>(static_cast<i64>(count) * length - queries), queries};
  }
  static constexpr int count_of(int queries, int length) {
    return static_cast<int>((static_cast<i64>(queries) + length - 1) / length);
  }
  /// Run r has the queries [first(r), stop(r)).
  constexpr int first(int r) const { return most(r * length - missing, 0); }
  constexpr int stop(int r) const {
    return static_cast<int>(least<i64>(static_cast<i64>(r * length - missing) + length, queries));
  }
  constexpr int size(int r) const { return stop(r) - first(r); }
};

struct KeyList {
  i64 offset;  ///< of its first key in Plan::positions
  int count;   ///< keys
  int full;    ///< the first of them that need no test: every position of the run sees them
};

/// The positions that see a key: [start, end).
struct Interval {
  int start, end;
};

constexpr int kMostBits = 1024;  ///< positions of a run whose keys are tested by bits

struct Plan {
  Runs runs;  ///< each has a list
  int is_causal;
  const KeyList* lists;  ///< (B | 1, units | 1, runs); null: spans, the keys 0, 1, 2, … up to what causality allows
  i64 lists_batch, lists_unit;  ///< strides, 0 where broadcast
  const int* positions;         ///< with lists: the keys' positions; null: the keys 0, 1, 2, …
  const u32* bits;  ///< Test::bits: for each listed key `words` words, bit i of which says that position i of the
  int words;        ///< run sees it; divide_up(runs.length, 32)
  const int* end;   ///< (B | 1, units | 1, K): the dynamic mask's; null: for ever
  i64 end_batch, end_unit, end_key;
  const unsigned char* visible_rows;  ///< (B | 1, units | 1, Q) boolean: false hides a query from every key; null: none
  i64 rows_batch, rows_unit, rows_query;

  /// The list of a run, whose keys' positions are `key`. The queries stand at [first, last] in absolute positions.
  KeyList list(const Shape& shape, int b, int unit, int index) const {
    if (lists) return lists[b * lists_batch + unit * lists_unit + index];
    const int first = runs.first(index) + shape.first_position(), last = runs.stop(index) + shape.first_position() - 1;
    const int seen_by_last = is_causal ? most(last + 1, 0) : shape.key_len;
    const int seen_by_all = end ? 0 : is_causal ? most(first + 1, 0) : shape.key_len;
    return {0, seen_by_last, seen_by_all};
  }
  /// The position of entry i of a list.
  int key(const KeyList& list, int i) const { return positions ? positions[list.offset + i] : i; }
  /// Test::interval: the positions that see a key.
  Interval interval(int b, int unit, int key) const { return {start_of(key), end_of(b, unit, key)}; }
  int start_of(int key) const { return is_causal ? key : kSmallest; }
  int end_of(int b, int unit, int key) const {
    return end ? end[b * end_batch + unit * end_unit + key * end_key] : kLargest;
  }
  /// Whether the dynamic mask lets any query see a key of a KV head. Of one that it does not, the gradients are zero.
  bool is_seen(const Shape& shape, int b, int kv_head, int key) const {
    if (!end) return true;
    const int units = shape.units() / shape.kv_heads, first = most(start_of(key), shape.first_position());
    bool seen = false;
    for (int unit = kv_head * units; unit < (kv_head + 1) * units; ++unit) seen |= end_of(b, unit, key) > first;
    return seen;
  }
  /// Whether the mask hides a query from every key.
  bool is_hidden(int b, int unit, int query) const {
    return visible_rows && !visible_rows[b * rows_batch + unit * rows_unit + query * rows_query];
  }
};

}  // namespace flash_dmattn::cuda
