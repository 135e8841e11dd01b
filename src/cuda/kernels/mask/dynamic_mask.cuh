// The dynamic mask: for every key how long it is among the w best, for every chunk which keys are at its start.
//
// The keys are the leaves of a tree. Up the tree, each node gets a sorted list of its best keys; down the tree, what
// survives at its start: the w best of all keys before it. Inside a node of n keys only the n worst of the survivors
// can be beaten, so lists shrink with the nodes, until one survivor meets one key: the worse of the two ends there.
#pragma once
#include "mask/dynamic_mask_params.cuh"
#include "mask/merge.cuh"
#include "ptx/block.cuh"
#include "ptx/memory.cuh"
#include "ptx/warp.cuh"

namespace flash_dmattn::cuda {

template <ScoreType kType>
struct SortKeys {
  using Score = typename Ranking<kType>::Score;
  using Params = SortKeysParams<Score>;
  static constexpr int kThreads = kSortThreads, kBlocksPerMultiprocessor = 2, kEach = kGroup / kThreads;

  static void run(const Params& params, char* shared) {
    auto& buffers = *reinterpret_cast<SortBuffers<Score>*>(shared);
    List<Score, u16> now = buffers.list(0), next = buffers.list(1);
    const int block = block_index(), row = block / params.groups, first = block % params.groups * kGroup;
    int* const ends = params.end.row(row);
    Score score[kEach];
    params.keys.template ranks<kType>(row, first + thread_index(), kThreads, score);
    for (int e = 0; e < kEach; ++e) {
      const int i = e * kThreads + thread_index(), k = first + i;
      now.score[i] = score[e];
      if (k < params.keys.count)
        ends[k * params.end.key] = params.end.is_causal && score[e] != kNoKey ? params.keys.count : params.end.never(k);
    }
    sync_block();
    sort_own(now, next);
    swap(now, next);
    for (int run = kEach; run < kGroup; run *= 2) {
      if (run == kChunk && params.chunk_lists.exist())
        for (int c = 0; c < kChunksPerGroup - 1; ++c)  // those that another of the group comes after
          store(now.from(c * kChunk), first, params.chunk_lists, static_cast<i64>(block) * kChunksPerGroup + c);
      merge_runs<kEach>(now, next, run);
      swap(now, next);
    }
    store(now, first, params.group_lists, block);
  }

  /// This thread's keys, from the newest on, by exchanges of neighbours, which leave equal ones in order.
  static void sort_own(List<Score, u16> in, List<Score, u16> out) {
    const int first = thread_index() * kEach;
    Score score[kEach];
    int local[kEach];
    for (int e = 0; e < kEach; ++e) {
      local[e] = first + kEach - 1 - e;
      score[e] = in.score[local[e]];
    }
    for (int round = 0; round < kEach; ++round)
      for (int e = round % 2; e + 1 < kEach; e += 2)
        if (score[e + 1] > score[e]) {
          swap(score[e], score[e + 1]);
          swap(local[e], local[e + 1]);
        }
    for (int e = 0; e < kEach; ++e) {
      out.score[first + e] = score[e];
      out.position[first + e] = static_cast<u16>(local[e]);
    }
    sync_writers<kEach>(2 * kEach);
  }

  static void store(List<Score, u16> list, int first, const Lists<Score>& lists, i64 index) {
    const List<Score> out = lists.at(index);
    for (int i = thread_index(); i < lists.size; i += kThreads) {
      const Score score = list.score[i];
      out.score[i] = score;
      out.position[i] = score == kNoKey ? -1 : first + list.position[i];
    }
  }
};

template <class Score, bool kInShared>
struct ScanLists {
  using Params = ScanListsParams<Score>;
  static constexpr int kThreads = kScanThreads, kBlocksPerMultiprocessor = 1, kEach = 2;

  static void run(const Params& params, char* shared) {
    const int node = block_index(), row = node / params.nodes_in_row;
    const int first = node % params.nodes_in_row * params.fan, last = least(first + params.fan, params.children_in_row);
    const int capacity = params.capacity, size = params.children.size, t = thread_index();
    const i64 row_children = static_cast<i64>(row) * params.children_in_row;

    List<Score> now, next, copies;
    if constexpr (kInShared) {
      Score* score = reinterpret_cast<Score*>(shared);
      now = {score, reinterpret_cast<int*>(score + 2 * (capacity + size))};
      next = now.from(capacity);
      copies = next.from(capacity);
    } else {
      now = params.scratch.at(2 * static_cast<i64>(node));
      next = now.from(capacity);
    }
    const auto child_list = [&](int child) { return params.children.at(row_children + child); };
    const auto fetch = [&](int child) {
      if constexpr (kInShared) copy_in_background<kThreads>(child_list(child), copies.from(child % 2 * size), size);
    };

    fetch(first);
    load_start<kThreads, kInShared>(params.node_starts, node, now, capacity);
    for (int child = first; child < last; ++child) {
      commit_copies();
      wait_copies<0>();
      sync_block();
      if (child + 1 < last) fetch(child + 1);
      if (params.child_starts.exist())
        copy_list<kThreads>(now.from(capacity - size), params.child_starts.at(row_children + child), size);
      if (params.survivors.data && child % params.survivors_every == 0)
        params.survivors.store(row, child / params.survivors_every, now.position, capacity, t, kThreads);
      if (child + 1 == last && !params.best.exist()) return;
      const List<Score> newer = kInShared ? copies.from(child % 2 * size) : child_list(child);
      for (int rank = t * kEach; rank < capacity; rank += kThreads * kEach)
        merge_part<kEach>(now, capacity, newer, size, next, rank, capacity);
      swap(now, next);
    }
    sync_block();
    copy_list<kThreads>(now, params.best.at(node), capacity);
  }
};

template <ScoreType kType>
struct FindEnds {
  using Score = typename Ranking<kType>::Score;
  using Params = FindEndsParams<Score>;
  static constexpr int kThreads = kFindThreads, kBlocksPerMultiprocessor = 4, kEach = kChunk / kThreads;
  static_assert(kEach == 2);

  static void run(const Params& params, char* shared) {
    const int block = block_index(), row = block / params.chunks, chunk = block % params.chunks;
    const int group = chunk / kChunksPerGroup, before = chunk % kChunksPerGroup, first = chunk * kChunk;
    const int keep = params.keep, capacity = least(keep, kGroup), slots = find_ends_slots(keep), t = thread_index();

    // Shared memory: two lists of what survives, then the chunk's keys in sorted runs of 1, 2, 4, …. Where the runs
    // will be are at first the lists of the chunks before it in its group.
    Score* score = reinterpret_cast<Score*>(shared);
    List<Score> now = {score, reinterpret_cast<int*>(score + 2 * slots + kRuns * kChunk)};
    List<Score> next = now.from(slots), earlier = next.from(slots);
    const List<Score, u16> runs = {earlier.score, reinterpret_cast<u16*>(earlier.position)};

    const i64 row_group = static_cast<i64>(row) * params.groups + group;
    load_start<kThreads, true>(params.group_starts, row_group, now, capacity);
    const int size = params.chunk_lists.size;
    copy_in_background<kThreads>(params.chunk_lists.at(row_group * kChunksPerGroup), earlier, before * size);
    commit_copies();
    Score own[kEach];
    params.keys.template ranks<kType>(row, first + t, kThreads, own);
    int* const ends = params.end.row(row);
    wait_copies<0>();
    sync_block();
    for (int c = 0; c < before; ++c) {
      for (int rank = 4 * t; rank < capacity; rank += 4 * kThreads)
        merge_part<4>(now, capacity, earlier.from(c * size), size, next, rank, capacity);
      sync_block();
      swap(now, next);
    }
    if (params.survivors.data && chunk % params.survivors_every == 0)
      params.survivors.store(row, chunk / params.survivors_every, now.position, capacity, t, kThreads);

    for (int e = 0; e < kEach; ++e) {
      const int i = e * kThreads + t;
      runs.score[i] = own[e];
      runs.position[i] = static_cast<u16>(i);
    }
    sync_block();
    int level = 0;
    for (int run = 1; run < kChunk / 2; run *= 2, ++level)
      merge_runs<kEach>(runs.from(level * kChunk), runs.from((level + 1) * kChunk), run);

    // What survives at the start of each node, as nodes are halved; each thread gives one entry to either half. A
    // node's list is where its keys are in the chunk.
    List<Score> survive = now.from(capacity - least(keep, kChunk));
    for (int half = kChunk / 2; half > 0; half /= 2, --level) {
      const int i = t & (half - 1), node = 2 * (t - i);
      const int kept = least(keep, 2 * half), kept_by_half = least(keep, half), rank = kept - kept_by_half + i;
      if (i < kept_by_half) {
        const List<Score> older = survive.from(node), out = next.from(node + i);
        const List<Score, u16> newer = runs.from(level * kChunk + node);
        out.score[0] = older.score[rank];
        out.position[0] = older.position[rank];
        const int j = newer_before(older.score, kept, newer.score, half, rank);
        const bool is_newer = j < half && newer.score[j] >= older.score[rank - j];
        out.score[half] = is_newer ? newer.score[j] : older.score[rank - j];
        out.position[half] = is_newer ? first + newer.position[j] : older.position[rank - j];
      }
      sync_writers<kEach>(2 * half);
      survive = next;
      swap(now, next);
    }
    for (int i = kEach * t; i < kEach * (t + 1); ++i) {
      const bool is_better = runs.score[i] >= survive.score[i];
      if ((is_better ? survive.score[i] : runs.score[i]) != kNoKey)
        ends[(is_better ? survive.position[i] : first + i) * params.end.key] = first + i;
    }
  }
};

template <class Score>
struct KeepBest {
  using Params = KeepBestParams<Score>;
  static constexpr int kThreads = kKeepThreads, kBlocksPerMultiprocessor = 1;

  static void run(const Params& params, char*) {
    const int row = block_index();
    const List<Score> best = params.best.at(row);
    int* const ends = params.end.row(row);
    for (int i = thread_index(); i < params.best.size; i += kThreads)
      if (best.position[i] >= 0) ends[best.position[i] * params.end.key] = params.keys;
  }
};

/// No more keys than are kept: none ends.
struct KeepAll {
  using Params = KeepAllParams;
  static constexpr int kThreads = kKeepThreads, kBlocksPerMultiprocessor = 1;

  static void run(const Params& params, char* shared) {
    int* counts = reinterpret_cast<int*>(shared);  // of each warp
    const Keys& keys = params.keys;
    const int block = block_index(), row = block / params.chunks, chunk = block % params.chunks, t = thread_index();
    const int first = static_cast<int>(static_cast<i64>(chunk) * params.chunk);
    int* const ends = params.end.row(row);
    for (int i = t; i < least(params.chunk, keys.count - first); i += kThreads)
      ends[(first + i) * params.end.key] = keys.exists(row, first + i) ? keys.count : params.end.never(first + i);
    if (!params.survivors.data) return;
    int* const survivors = params.survivors.row(row, chunk);
    // The keys before the chunk that exist, from the left, then -1.
    int found = 0;
    for (int k0 = 0; k0 < first; k0 += kThreads) {
      const bool exists = k0 + t < first && keys.exists(row, k0 + t);
      const u32 in_warp = ballot(exists);
      if (t % kWarp == 0) counts[t / kWarp] = count_ones(in_warp);
      sync_block();
      int at = found + count_ones(in_warp & ((1u << t % kWarp) - 1));
      for (int warp = 0; warp < kThreads / kWarp; ++warp) {
        at += warp < t / kWarp ? counts[warp] : 0;
        found += counts[warp];
      }
      if (exists) survivors[at * params.survivors.slot] = k0 + t;
      sync_block();
    }
    for (int i = found + t; i < keys.count; i += kThreads) survivors[i * params.survivors.slot] = -1;
  }
};

}  // namespace flash_dmattn::cuda
