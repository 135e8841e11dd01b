// The probabilities exp(logit - lse) of the pairs that see each other, and the zeros of all others.
#pragma once
#include "sm80/probabilities_params.cuh"
#include "sm80/scores.cuh"

namespace flash_dmattn::cuda {

template <ProbabilitiesOptions kOptions>
struct Probabilities {
  static constexpr ScoresConfig kConfig = probabilities_config(kOptions);
  static constexpr int kThreads = kConfig.threads(), kBlocksPerMultiprocessor = 1;
  using Params = ProbabilitiesParams;
  using Scores = cuda::Scores<kConfig>;
  using Shared = ScoresShared<kConfig>;
  static_assert(sizeof(Shared) == probabilities_shared_bytes(kConfig));

  /// A block has some of the tiles of a list.
  static void run(const Params& params, char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Scores scores(params.scores, shared);
    const int begin = least(block_index_y() * kProbabilitiesTiles, scores.tiles),
              end = least(begin + kProbabilitiesTiles, scores.tiles);
    if (begin == end) return;
    scores.copy_queries();
    commit_copies();
    wait_copies<0>();
    sync_block();
    scores.sign_queries();
    for (int tile = begin; tile < end; ++tile) {
      scores.fetch(tile);
      scores.copy_keys(shared.key[0], shared.origins.key, params.scores.key.position, tile);
      scores.copy_test(tile);
      commit_copies();
      wait_copies<0>();
      sync_block();
      typename Scores::Accumulators s;
      scores.compute(s, 0, tile);
      if (tile >= scores.tested) scores.mask(s, tile);
      write(params, scores, s, tile);
    }
  }

  static void write(const Params& params, const Scores& scores, const typename Scores::Accumulators& s, int tile) {
    using T = typename Scores::T;
    const int left = scores.list.count - tile * kConfig.keys;
    const Place& place = scores.place;
#pragma unroll
    for (int m = 0; m < Scores::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = scores.row_of(m, half);
        if (!place.has(row)) continue;
        const int q = place.query_of(row), h = place.head_of(row);
        const float lse = *params.lse.at(place.b, h, q);
        // A row that sees no key has probabilities of 0.
        const float offset = lse == -kInfinity ? kInfinity : lse * kLog2e;
        T* const probs = static_cast<T*>(params.probs.data) + place.b * params.probs.batch + h * params.probs.head +
                         q * params.probs.query;
#pragma unroll
        for (int n = 0; n < Scores::kColumnTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int column = 8 * n + scores.lane % 4 * 2 + i;
            if (column >= left) continue;
            // At most 1, however coarsely huge logits are rounded.
            const float logit = multiply_add(s[m][n][2 * half + i], params.scores.logits.factor, -offset);
            probs[scores.shared.position[tile % 4][column] * params.probs.key] =
                from_float<T>(fast_exp2(minimum(logit, 0.0f)));
          }
      }
  }
};

struct ZeroMatrix {
  static constexpr int kThreads = kZeroThreads, kBlocksPerMultiprocessor = 1;
  using Params = ZeroMatrixParams;

  /// A block has a row.
  static void run(const Params& params, char*) {
    const i64 row = block_index();
    const Matrix& to = params.to;
    u16* const data = static_cast<u16*>(to.data) + row / params.queries / params.heads * to.batch +
                      row / params.queries % params.heads * to.head + row % params.queries * to.query;
    for (i64 k = thread_index(); k < params.keys; k += kThreads) data[k * to.key] = 0;
  }
};

}  // namespace flash_dmattn::cuda
