#pragma once
#include "mask/plan_params.cuh"
#include "ptx/block.cuh"
#include "ptx/warp.cuh"

namespace flash_dmattn::cuda {

/// The lists of a mask that is the same for all queries, but for causality and where intervals end: the keys that are
/// visible at all, in ascending order where the call is causal, so that every run has the beginning of one list. Else
/// every run has all of it, the keys that need no test first.
///
/// A block moves a slice of the keys together. Where there are several, a first launch counts.
struct ColumnLists {
  using Config = ColumnListsConfig;
  using Params = ColumnListsParams;
  static constexpr int kThreads = Config::kThreads, kBlocksPerMultiprocessor = 1;

  /// Of keys whose intervals never end, and of others that are visible.
  struct Counts {
    int full, tested;
    void join() {
      tested += full;
      full = 0;
    }
  };
  struct Shared {
    Counts counts[Config::kWarps];
  };

  const Params& params;
  Shared& shared;
  const int row, slice;
  const int* ends;
  const unsigned char* columns;

  static void run(const Params& params, char* shared_memory) {
    const ListsParams& lists = params.lists;
    const int row = block_index() / params.slices, b = row / lists.heads, head = row % lists.heads;
    ColumnLists block{params,
                      *reinterpret_cast<Shared*>(shared_memory),
                      row,
                      block_index() % params.slices,
                      lists.end.row(b, head),
                      lists.columns.row(b, head)};
    if (params.is_counting)
      block.save_counts();
    else
      block.make_lists(b, head);
  }

  int slice_start() const { return slice * params.slice; }
  int slice_stop() const { return least<i64>(static_cast<i64>(slice_start()) + params.slice, params.lists.key_len); }

  /// A bit for each thread whose key's interval never ends, or ends.
  struct Classes {
    u32 full[Config::kGroups], tested[Config::kGroups];

    /// In order of position, whether they need a test or not.
    void join() {
      for (int i = 0; i < Config::kGroups; ++i) {
        tested[i] |= full[i];
        full[i] = 0;
      }
    }
    Counts count() const {
      Counts sum{0, 0};
      for (int i = 0; i < Config::kGroups; ++i) {
        sum.full += count_ones(full[i]);
        sum.tested += count_ones(tested[i]);
      }
      return sum;
    }
  };

  /// This warp's first key of a stage.
  static int warp_start(int stage) { return stage + thread_index() / kWarp * Config::kGroups * kWarp; }

  Classes classify(int stage) const {
    const ListsParams& lists = params.lists;
    const int start = warp_start(stage) + thread_index() % kWarp, stop = slice_stop();
    bool visible[Config::kGroups];
    int end[Config::kGroups];
    for (int i = 0; i < Config::kGroups; ++i) {
      const int key = start + i * kWarp;
      visible[i] = key < stop && (!columns || columns[key * lists.columns.key]);
      end[i] = ends && key < stop ? ends[key * lists.end.key] : kLargest;
    }
    Classes classes;
    for (int i = 0; i < Config::kGroups; ++i) {
      const int key = start + i * kWarp;
      const int first = lists.is_causal ? most(key, lists.first_position()) : lists.first_position();
      const bool is_full = end[i] >= lists.key_len;
      classes.full[i] = ballot(visible[i] && is_full);
      classes.tested[i] = ballot(visible[i] && !is_full && end[i] > first);
    }
    return classes;
  }

  struct Sums {
    Counts before, all;
  };
  /// What the threads before this warp (thread) have, and all have.
  Sums sum_warps(Counts mine) const {
    const int warp = thread_index() / kWarp;
    if (thread_index() % kWarp == 0) shared.counts[warp] = mine;
    sync_block();
    Sums sums{{0, 0}, {0, 0}};
    for (int w = 0; w < Config::kWarps; ++w) {
      const Counts other = shared.counts[w];
      sums.before.full += w < warp ? other.full : 0;
      sums.before.tested += w < warp ? other.tested : 0;
      sums.all.full += other.full;
      sums.all.tested += other.tested;
    }
    sync_block();
    return sums;
  }

  Counts count_slice() const {
    Counts mine{0, 0};
    for (int stage = slice_start(); stage < slice_stop(); stage += Config::kStage) {
      const Counts here = classify(stage).count();
      mine.full += here.full;
      mine.tested += here.tested;
    }
    return sum_warps(mine).all;
  }

  Counts* saved_counts() const {
    return reinterpret_cast<Counts*>(params.counts) + static_cast<i64>(row) * params.slices;
  }
  void save_counts() const {
    const Counts counts = count_slice();
    if (thread_index() == 0) saved_counts()[slice] = counts;
  }

  /// Of all slices, and of those before this one.
  Sums sum_slices() const {
    if (params.slices == 1) return {{0, 0}, count_slice()};
    Counts all{0, 0}, before{0, 0};
    for (int i = thread_index(); i < params.slices; i += kThreads) {
      const Counts other = saved_counts()[i];
      all.full += other.full;
      all.tested += other.tested;
      before.full += i < slice ? other.full : 0;
      before.tested += i < slice ? other.tested : 0;
    }
    return {sum_warps(sum_lanes(before)).all, sum_warps(sum_lanes(all)).all};
  }
  static Counts sum_lanes(Counts counts) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      counts.full += shuffle_xor(counts.full, mask);
      counts.tested += shuffle_xor(counts.tested, mask);
    }
    return counts;
  }

  void make_lists(int b, int head) const {
    const ListsParams& lists = params.lists;
    const i64 offset = row * params.capacity;
    int* const positions = lists.positions + offset;
    Sums slices = sum_slices();
    const bool some_end = slices.all.tested > 0;
    if (lists.is_causal) {
      slices.before.join();
      slices.all.join();
    }
    const int start = slices.before.tested;
    int full_at = slices.before.full, tested_at = slices.all.full + start;
    for (int stage = slice_start(); stage < slice_stop(); stage += Config::kStage) {
      Classes classes = classify(stage);
      if (lists.is_causal) classes.join();
      const Sums warps = sum_warps(classes.count());
      int warp_full = full_at + warps.before.full, warp_tested = tested_at + warps.before.tested;
      for (int i = 0; i < Config::kGroups; ++i) {
        const int lane = thread_index() % kWarp, key = warp_start(stage) + i * kWarp + lane;
        const u32 lower = (1u << lane) - 1;
        if (classes.full[i] >> lane & 1) positions[warp_full + count_ones(classes.full[i] & lower)] = key;
        if (classes.tested[i] >> lane & 1) positions[warp_tested + count_ones(classes.tested[i] & lower)] = key;
        warp_full += count_ones(classes.full[i]);
        warp_tested += count_ones(classes.tested[i]);
      }
      full_at += warps.all.full;
      tested_at += warps.all.tested;
    }
    sync_block();
    // Each number of a run's list is known to the slice that it ends in.
    for (int r = thread_index(); r < lists.runs.count; r += kThreads) {
      const int seen_by_last = lists.is_causal ? lists.limit(r) : 0;
      const int seen_by_all = lists.is_causal ? most(lists.first(r) + 1, 0) : 0;
      for (int copy = 0; copy < lists.copies; ++copy) {
        KeyList& list = lists.at(b, head, copy, r);
        if (ends_here(seen_by_last)) {
          list.offset = offset;
          list.count = lists.is_causal ? lower_bound(positions, start, tested_at, seen_by_last)
                                       : slices.all.full + slices.all.tested;
        }
        if (ends_here(seen_by_all))
          list.full = !lists.is_causal ? slices.all.full
                      : some_end       ? 0
                                       : lower_bound(positions, start, tested_at, seen_by_all);
      }
    }
  }

  bool ends_here(int limit) const { return limit <= slice_stop() && (limit > slice_start() || slice == 0); }

  /// The first entry from `low` on, and below `high`, whose key is at least `key`; else `high`.
  static int lower_bound(const int* keys, int low, int high, int key) {
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (keys[middle] < key)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

}  // namespace flash_dmattn::cuda
