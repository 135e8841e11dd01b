#pragma once
#include "mask/plan_params.cuh"
#include "ptx/block.cuh"
#include "ptx/warp.cuh"

namespace flash_dmattn::cuda {

/// The lists of a causal dynamic mask. A run of positions [first, stop) sees keys that are there at its start, and its
/// own; the former are among what survives at the start of a chunk, and the keys from there on.
///
/// A block makes the lists of consecutive runs, a warp each. Together they gather the candidates. Most survivors
/// outlive all of the block's runs, and are in each of its lists. Of the other candidates each warp takes what its run
/// sees: first the keys that outlive the run, then the rest.
struct SurvivorLists {
  using Config = SurvivorListsConfig;
  using Params = SurvivorListsParams;
  static constexpr int kThreads = Config::kThreads, kBlocksPerMultiprocessor = 4;

  struct Candidate {
    int key, end;
  };
  /// Followed by what goes to the end of the list, for each run of the block.
  struct Shared {
    Candidate candidates[Config::kStage];
    int common[Config::kStage];
    int counts[Config::kWarps];  // of common keys, in the upper half, and of candidates
  };

  static void run(const Params& params, char* shared_memory) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
    const ListsParams& lists = params.lists;
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const u32 lower = (1u << lane) - 1;
    const int block = block_index(), row = block / params.blocks, head = row % lists.heads, b = row / lists.heads;
    const int first_run = block % params.blocks * params.runs_per_block;
    const int last_run = least(first_run + params.runs_per_block, lists.runs.count) - 1;

    // The candidates: survivors of the chunk in which the first run starts, then the keys of that chunk and later.
    const int first = lists.first(first_run), stop = most(lists.stop(last_run), 0);
    const int chunk = most(first, 0) / params.chunk, chunk_start = chunk * params.chunk;
    const int slots = chunk == 0 ? 0 : params.slots, total = slots + stop - chunk_start;
    const int* survivors = params.survivors.row(b, head) + chunk * params.survivors.query;
    const int* ends = lists.end.row(b, head);
    const unsigned char* columns = lists.columns.row(b, head);

    const int r = first_run + warp;
    const bool has_run = warp < params.runs_per_block && r < lists.runs.count;
    const int run_first = has_run ? lists.first(r) : 0, run_stop = has_run ? lists.stop(r) : 0;
    const i64 offset = (static_cast<i64>(row) * lists.runs.count + r) * params.capacity;
    int* const full_keys = lists.positions + offset;
    int* const tested_keys = reinterpret_cast<int*>(&shared + 1) + warp * Config::tested_capacity(lists.runs.length);
    int full = 0, tested = 0;

    for (int stage = 0; stage < total; stage += Config::kStage) {
      // What some position of the block sees moves together in shared memory, in order.
      Candidate candidates[Config::kEntries];
      u32 common[Config::kEntries], other[Config::kEntries];
      int count = 0;
      for (int i = 0; i < Config::kEntries; ++i) {
        const int entry = stage + (warp * Config::kEntries + i) * kWarp + lane;
        int key = -1;
        if (entry < slots) {
          key = survivors[entry * params.survivors.key];
          if (key >= chunk_start) key = -1;
        } else if (entry < total) {
          key = chunk_start + entry - slots;
        }
        candidates[i].key = key;
      }
      for (Candidate& candidate : candidates) {
        candidate.end = candidate.key < 0 ? kSmallest : ends[candidate.key * lists.end.key];
        if (columns && candidate.key >= 0 && !columns[candidate.key * lists.columns.key]) candidate.end = kSmallest;
      }
      for (int i = 0; i < Config::kEntries; ++i) {
        const auto [key, end] = candidates[i];
        const bool is_common = key <= first && end >= stop;
        common[i] = ballot(is_common);
        other[i] = ballot(!is_common && end > most(key, first));
        count += count_ones(common[i]) << 16 | count_ones(other[i]);
      }
      if (lane == 0) shared.counts[warp] = count;
      sync_block();
      int before = 0, all = 0;
      for (int w = 0; w < Config::kWarps; ++w) {
        before += w < warp ? shared.counts[w] : 0;
        all += shared.counts[w];
      }
      int common_at = before >> 16, other_at = before & 0xffff;
      for (int i = 0; i < Config::kEntries; ++i) {
        if (common[i] >> lane & 1) shared.common[common_at + count_ones(common[i] & lower)] = candidates[i].key;
        if (other[i] >> lane & 1) shared.candidates[other_at + count_ones(other[i] & lower)] = candidates[i];
        common_at += count_ones(common[i]);
        other_at += count_ones(other[i]);
      }
      // Up to whole warps, candidates that nobody sees.
      const int commons = all >> 16, others = all & 0xffff, padded = round_up(others, kWarp);
      if (others + thread_index() < padded) shared.candidates[others + thread_index()] = {0, kSmallest};
      sync_block();
      if (has_run) {
#pragma unroll 4
        for (int i = lane; i < least(commons, params.capacity - full); i += kWarp)
          full_keys[full + i] = shared.common[i];
        full += commons;
        for (int i = 0; i < padded; i += kWarp) {
          const Candidate candidate = shared.candidates[i + lane];
          if (shared.candidates[i].key >= run_stop) break;  // a key that is newer than the run, as are all after it
          const bool is_full = candidate.key <= run_first && candidate.end >= run_stop;
          const u32 full_here = ballot(is_full);
          const int full_at = full + count_ones(full_here & lower);
          if (is_full && full_at < params.capacity) full_keys[full_at] = candidate.key;
          full += count_ones(full_here);
          const bool is_tested = !is_full && candidate.key < run_stop && candidate.end > most(candidate.key, run_first);
          const u32 tested_here = ballot(is_tested);
          if (tested_here != 0) {  // in few warps
            const int tested_at = tested + count_ones(tested_here & lower);
            if (is_tested && tested_at < Config::tested_capacity(lists.runs.length))
              tested_keys[tested_at] = candidate.key;
            tested += count_ones(tested_here);
          }
        }
      }
      sync_block();
    }
    if (!has_run) return;
    // Survivors that do not belong to `end` could be too many.
    full = least(full, params.capacity);
    tested = least(tested, least(params.capacity - full, Config::tested_capacity(lists.runs.length)));
    for (int i = lane; i < tested; i += kWarp) full_keys[full + i] = tested_keys[i];
    for (int copy = lane; copy < lists.copies; copy += kWarp)
      lists.at(b, head, copy, r) = {offset, full + tested, full};
  }
};

}  // namespace flash_dmattn::cuda
