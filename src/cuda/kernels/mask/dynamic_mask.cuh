// The dynamic mask: for every key how long it is among the w best, for every chunk which keys are at its start.
//
// The keys are the leaves of a tree. Up the tree, each node gets a sorted list of its best keys; down the tree, what
// survives at its start: the w best of all keys before it. Inside a node of n keys only the n worst of the survivors
// can be beaten, so lists shrink with the nodes, until a thread walks over four keys: the worse of the worst survivor
// and the key ends there.
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
    const int own = kEach * thread_index();
    for (int e = 0; e < kEach; ++e) score[e] = now.score[own + e];
    sort_own(score, own, next.from(own));
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
  static constexpr int kThreads = kScanThreads, kBlocksPerMultiprocessor = 2, kEach = 4;

  static void run(const Params& params, char* shared) {
    const int node = block_index(), row = node / params.nodes_in_row;
    const int first = node % params.nodes_in_row * params.fan, last = least(first + params.fan, params.children_in_row);
    const int capacity = params.capacity, size = params.children.size, t = thread_index();
    const i64 row_children = static_cast<i64>(row) * params.children_in_row;

    List<Score> now, next, copies;
    if constexpr (kInShared) {
      Score* score = reinterpret_cast<Score*>(shared);
      const i64 slots = list_slots(capacity);
      now = {score, reinterpret_cast<int*>(score + 2 * (slots + list_slots(size)))};
      next = now.from(slots);
      copies = next.from(slots);
    } else {
      now = params.scratch.at(2 * static_cast<i64>(node));
      next = params.scratch.at(2 * static_cast<i64>(node) + 1);
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
  static_assert(kEach == kShortestRun);

  static void run(const Params& params, char* shared) {
    const int block = block_index(), row = block / params.chunks, chunk = block % params.chunks;
    const int group = chunk / kChunksPerGroup, before = chunk % kChunksPerGroup, first = chunk * kChunk;
    const int keep = params.keep, capacity = least(keep, kGroup), slots = find_ends_slots(keep), t = thread_index();

    // Shared memory: two lists of what survives, then the chunk's keys in sorted runs of 4, 8, 16, …. Where the runs
    // will be are at first the lists of the chunks before it in its group.
    Score* score = reinterpret_cast<Score*>(shared);
    List<Score> now = {score, reinterpret_cast<int*>(score + 2 * slots + kRuns * kChunk)};
    List<Score> next = now.from(slots);
    const List<Score> runs = next.from(slots), earlier = runs;

    const i64 row_group = static_cast<i64>(row) * params.groups + group;
    load_start<kThreads, true>(params.group_starts, row_group, now, capacity);
    const int size = params.chunk_lists.size;
    copy_in_background<kThreads>(params.chunk_lists.at(row_group * kChunksPerGroup), earlier, before * size);
    commit_copies();
    const int own = kEach * t;  // the first of this thread's keys in the chunk
    Score own_score[kEach];
    params.keys.template ranks<kType>(row, first + own, 1, own_score);
    int* const ends = params.end.row(row);
    wait_copies<0>();
    sync_block();
    for (int c = 0; c < before; ++c) {
      for (int rank = kEach * t; rank < capacity; rank += kChunk)
        merge_part<kEach>(now, capacity, earlier.from(c * size), size, next, rank, capacity);
      sync_block();
      swap(now, next);
    }
    if (params.survivors.data && chunk % params.survivors_every == 0)
      params.survivors.store(row, chunk / params.survivors_every, now.position, capacity, t, kThreads);

    sort_own(own_score, first + own, runs.from(own));
    int level = 0;
    for (int run = kEach; run < kChunk / 2; run *= 2, ++level)
      merge_runs<kEach>(runs.from(level * kChunk), runs.from((level + 1) * kChunk), run);

    // What survives at the start of each node, as nodes are halved; each thread gives entries to either half. A node's
    // list is where its keys are in the chunk.
    List<Score> survive = now.from(capacity - least(keep, kChunk));
    for (int half = kChunk / 2; half >= kEach; half /= 2, --level) {
      const int i = own / 2 & (half - 1), node = own - 2 * i;
      const int kept = least(keep, 2 * half), kept_by_half = least(keep, half), better = kept - kept_by_half;
      if (i < kept_by_half) {
        const List<Score> older = survive.from(node), newer = runs.from(level * kChunk + node), out = next.from(node);
        for (int e = i; e < i + kEach / 2; ++e)
          if (e < kept_by_half) {
            out.score[e] = older.score[better + e];
            out.position[e] = older.position[better + e];
          }
        merge_part<kEach / 2>(older, kept, newer, half, out.from(half - better), better + i, kept);
      }
      sync_writers<kEach>(2 * half);
      survive = next;
      swap(now, next);
    }
    walk(own_score, first + own, survive.from(own), least(keep, kEach), ends, params.end.key);
  }

  /// One key after the other against the worst of what survives, which is up to kEach keys.
  static void walk(const Score (&own_score)[kEach], int first, List<Score> survive, int kept, int* ends, i64 end_key) {
    Score score[kEach];
    int position[kEach];
    for (int i = 0; i < kEach; ++i) {
      const int entry = i - (kEach - kept);
      score[i] = entry < 0 ? ~Score{} : survive.score[entry];  // better than any
      position[i] = entry < 0 ? -1 : survive.position[entry];
    }
    for (int e = 0; e < kEach; ++e) {
      const Score own = own_score[e];
      const bool is_better = own >= score[kEach - 1];
      if ((is_better ? score[kEach - 1] : own) != kNoKey)
        ends[(is_better ? position[kEach - 1] : first + e) * end_key] = first + e;
      for (int i = kEach - 1; i >= 0; --i) {
        const bool moves = i > 0 && own >= score[i > 0 ? i - 1 : 0], is_here = !moves && own >= score[i];
        position[i] = moves ? position[i - 1] : is_here ? first + e : position[i];
        score[i] = moves ? score[i - 1] : is_here ? own : score[i];
      }
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
