// The w best visible keys of every row of scores. One block a row finds the w-th best score bit by bit, from the
// highest, by counting the keys that are at least as good; of those that are equal to it the newest are taken.
#pragma once
#include "mask/select_params.cuh"
#include "ptx/block.cuh"
#include "ptx/warp.cuh"

namespace flash_dmattn::cuda {

template <ScoreType kType>
struct SelectKeys {
  using Bits = typename Ranking<kType>::Bits;
  using Score = typename Ranking<kType>::Score;
  using Params = SelectKeysParams<kType>;
  static constexpr int kThreads = kSelectThreads, kBlocksPerMultiprocessor = 6, kInWord = 8 / sizeof(Bits);

  static void run(const Params& params, char* shared) {
    auto& sums = *reinterpret_cast<SelectSums*>(shared);
    for (i64 row = block_index(); row < params.rows; row += grid_blocks()) {
      const i64 b = row / params.queries / params.heads, h = row / params.queries % params.heads;
      select_row(params, b, h, static_cast<int>(row % params.queries), sums,
                 reinterpret_cast<Bits*>(shared + round_up(sizeof(SelectSums), 8)));
      sync_block();
    }
  }

  static void select_row(const Params& params, i64 b, i64 h, int q, SelectSums& sums, Bits* shared) {
    const int t = thread_index(), keys = params.keys;
    const int seen =
        params.is_causal ? static_cast<int>(most(0ll, static_cast<i64>(q) + keys - params.queries + 1)) : keys;
    const auto* score = params.score.row(b, h, q);
    const auto* visible = params.visible.data ? params.visible.row(b, h, q) : nullptr;
    const auto load = [&](i64 k) -> Score {
      if (k >= seen || (visible && !visible[k * params.visible.key])) return kNoKey;
      return rank_of<kType>(score[k * params.score.key]);
    };
    const int words = (seen + kInWord - 1) / kInWord;
    if (params.in_shared) {
      for (int k = t; k < words * kInWord; k += kThreads) shared[k] = static_cast<Bits>(load(k));
      sync_block();
    }
    const auto rank = [&](i64 k) -> Score { return params.in_shared ? shared[k] : load(k); };

    int turn = 0;
    const auto sum = [&](int own) {
      const int of_warp = warp_sum(own);
      int (&sums_of_warps)[kSelectWarps] = sums.of_warp[turn];
      turn = 1 - turn;
      if (t % kWarp == 0) sums_of_warps[t / kWarp] = of_warp;
      sync_block();
      int all = 0;
      for (int warp = 0; warp < kSelectWarps; ++warp) all += sums_of_warps[warp];
      return all;
    };
    const auto count_from = [&](Score least_score) {
      int count = 0;
      if (params.in_shared)
        for (int i = t; i < words; i += kThreads) {
          const u64 word = reinterpret_cast<const u64*>(shared)[i];
          for (int e = 0; e < kInWord; ++e) count += static_cast<Bits>(word >> (64 / kInWord * e)) >= least_score;
        }
      else
        for (i64 k = t; k < seen; k += kThreads) count += load(k) >= least_score;
      return sum(count);
    };

    Score worst = 0;
    int at_least = seen;
    for (int bit = 8 * sizeof(Bits) - 1; bit >= 0 && at_least > params.keep; --bit) {
      const Score candidate = worst | Score{1} << bit;
      const int count = count_from(candidate);
      if (count < params.keep) continue;
      worst = candidate;
      at_least = count;
    }
    int oldest = 0;  // of the equal ones that are taken
    if (worst == kNoKey)
      worst = 1;  // fewer than w
    else if (at_least > params.keep)
      oldest = find_oldest(worst, params.keep - count_from(worst + 1), seen, rank, sums);

    auto* selected = params.selected.row(b, h, q);
    for (i64 k = t; k < keys; k += kThreads) {
      const Score own = k < seen ? rank(k) : kNoKey;
      selected[k * params.selected.key] = own > worst || (own == worst && k >= oldest);
    }
  }

  /// The position of the count-th newest key with a score.
  template <class Rank>
  static int find_oldest(Score score, int count, int seen, Rank rank, SelectSums& sums) {
    const int lane = thread_index() % kWarp, own = thread_index() / kWarp;
    const i64 steps = (seen / kWarp + kSelectWarps) / kSelectWarps, first = own * steps * kWarp;  // of this warp
    int found = 0;
    for (i64 i = 0; i < steps; ++i) found += rank_is(rank, first + i * kWarp + lane, seen, score);
    found = warp_sum(found);
    sync_block();
    if (lane == 0) sums.of_warp[0][own] = found;
    sync_block();
    for (int warp = own + 1; warp < kSelectWarps; ++warp) count -= sums.of_warp[0][warp];
    if (count > 0 && count <= found)
      for (i64 i = steps - 1; count > 0; --i) {
        u32 equal = ballot(rank_is(rank, first + i * kWarp + lane, seen, score));
        if (count <= count_ones(equal)) {
          for (; count > 1; --count) equal &= ~(0x80000000u >> leading_zeros(equal));
          if (lane == 0) sums.oldest = static_cast<int>(first + i * kWarp) + 31 - leading_zeros(equal);
        }
        count -= count_ones(equal);
      }
    sync_block();
    return sums.oldest;
  }

  template <class Rank>
  static bool rank_is(Rank rank, i64 k, int seen, Score score) {
    return k < seen && rank(k) == score;
  }
};

}  // namespace flash_dmattn::cuda
