// The forward pass for GPUs from compute capability 8.0 on: FlashAttention-2's way over the key lists of a plan.
#pragma once
#include "attention/softmax.cuh"
#include "sm80/forward_params.cuh"
#include "sm80/scores.cuh"

namespace flash_dmattn::cuda {

template <ForwardOptions kOptions>
struct Forward {
  static constexpr ScoresConfig kConfig = forward_config(kOptions).scores;
  static constexpr int kThreads = kConfig.threads(), kBlocksPerMultiprocessor = forward_config(kOptions).blocks;
  static constexpr int kKeys = kConfig.keys, kStages = kConfig.stages, kRowTiles = kConfig.row_tiles();
  static constexpr int kDim = kConfig.padded_dim(), kOutTiles = kDim / 8, kPitch = tile_pitch(kConfig.head_dim);
  using Params = ForwardParams;
  using Scores = cuda::Scores<kConfig>;
  using T = typename Scores::T;

  struct Shared : ScoresShared<kConfig> {
    Tile<kKeys, kConfig.head_dim> value[kStages];
  };
  static_assert(sizeof(Shared) == forward_config(kOptions).shared_bytes);

  static void run(const Params& params, char* memory) { Forward(params, *reinterpret_cast<Shared*>(memory)).run(); }

  const Params& params;
  Shared& shared;
  Scores scores;
  int begin, end;  // of the tiles of keys
  float out[kRowTiles][kOutTiles][4];
  Softmax<kRowTiles> softmax;

  Forward(const Params& given, Shared& memory)
      : params(given),
        shared(memory),
        scores(given.scores, memory),
        begin(0),
        end(scores.tiles),
        softmax(given.scores.logits.factor) {
    if (scores.thread == 0)
      shared.origins.value =
          given.value.template at<u16>(scores.place.b, 0, given.scores.shape.kv_head(scores.place.unit));
    if constexpr (kOptions.split) {
      begin = least(block_index_y() * params.split_tiles, end);
      end = least(begin + params.split_tiles, end);
      if (scores.thread == 0) shared.origins.last = end - 1;
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][n][i] = 0;
  }

  void run() {
    if (begin < end) {
      scores.copy_queries();
      scores.fetch(begin);
      copy_keys(begin);
      if constexpr (kStages == 2) copy_values(begin);
      commit_copies();
      if (params.scores.logits.sign < 0) {
        wait_copies<0>();
        sync_block();
        scores.sign_queries();
      }
      int tile = begin;
      // With a full bias the test is a small part of the work, and one loop compiles in half the time.
      if constexpr (kConfig.bias != BiasKind::full)
        for (const int untested = least(scores.tested, end); tile < untested; ++tile) step<false>(tile);
      for (; tile <= shared.origins.last; ++tile) step<true>(tile);
    }
    write();
  }

  void copy_keys(int tile) {
    scores.copy_keys(shared.key[tile % kStages], shared.origins.key, params.scores.key.position, tile);
    scores.copy_test(tile);
  }
  void copy_values(int tile) {
    scores.copy_keys(shared.value[tile % kStages], shared.origins.value, params.value.position, tile);
  }

  template <bool kTested>
  void step(int tile) {
    wait_copies<0>();
    sync_block();  // keys (with two stages also values) are there; the other stage, or the values, are free
    if constexpr (kStages == 2) {
      if (tile != shared.origins.last) {
        copy_keys(tile + 1);
        copy_values(tile + 1);
      }
    } else {
      copy_values(tile);
    }
    if (scores.thread < kKeys) scores.copy_positions(tile + 2);
    commit_copies();

    typename Scores::Accumulators s;
    scores.compute(s, tile % kStages, tile);
    if (kTested && tile >= shared.origins.tested) scores.mask(s, tile);
    if (tile != shared.origins.last) scores.fetch_bias(tile + 1);
    softmax.follow(s, out);
    if (tile != shared.origins.last) scores.put_bias(tile + 1);

    if constexpr (kStages == 1) {
      wait_copies<0>();
      sync_block();  // values are there, the keys' place is free
      if (tile != shared.origins.last) copy_keys(tile + 1);
      commit_copies();
    }
    add_products(s, tile % kStages);
  }

  /// The exponentials of the scores, times the values.
  void add_products(const typename Scores::Accumulators& s, int stage) {
    const u16* const rows = transposed_operand(shared.value[stage], scores.operand_thread() % kWarp);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      u32 p[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) softmax.template exponentials<T>(p[m], s[m][2 * k], s[m][2 * k + 1], m);
#pragma unroll
      for (int n = 0; n < kOutTiles; n += 2) {
        u32 v[4];
        load_matrices_transposed(v, rows + 16 * k * kPitch + 8 * n);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma<T>(out[m][n], p[m], v[0], v[1]);
          mma<T>(out[m][n + 1], p[m], v[2], v[3]);
        }
      }
    }
  }

  void write() {
    const Shape& shape = params.scores.shape;
    const Place place(params.scores, block_index());
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = scores.row_of(m, half);
        float sum = quad_sum(softmax.sum[m][half]), scale = fast_reciprocal(sum);
        const float reference = softmax.finite_reference(m, half) * softmax.factor;
        const bool is_row = place.has(row);
        const int q = place.query_of(row), h = place.head_of(row);
        if (sum == 0 || (is_row && params.scores.plan.is_hidden(place.b, place.unit, q))) scale = sum = 0;
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) out[m][n][2 * half] *= scale, out[m][n][2 * half + 1] *= scale;
        const i64 index = (static_cast<i64>(place.b) * shape.heads + h) * shape.query_len + q;
        if (is_row && scores.lane % 4 == 0) {
          if constexpr (kOptions.split)
            params.split_sums[split_offset() + index] = {reference, sum};
          else
            *params.lse.at(place.b, h, q) = natural_lse(reference, sum);
        }
        if constexpr (kOptions.split) {
          if (is_row) write_floats(m, half, params.split_out + (split_offset() + index) * shape.head_dim);
        } else {
#pragma unroll
          for (int n = 0; n < kOutTiles; ++n)
            *reinterpret_cast<u32*>(shared.query.at(row, 8 * n + scores.lane % 4 * 2)) =
                pack<T>(out[m][n][2 * half], out[m][n][2 * half + 1]);
        }
      }
    if constexpr (!kOptions.split) write_rows(place);
  }

  /// Numbers of the parts before this one's, for each row.
  i64 split_offset() const {
    const Shape& shape = params.scores.shape;
    return static_cast<i64>(block_index_y()) * shape.batch * shape.heads * shape.query_len;
  }

  void write_floats(int m, int half, float* to) {
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n)
      if (kDim == kOptions.head_dim || 8 * n < kOptions.head_dim) {
        struct alignas(8) Two {
          float x, y;
        };
        *reinterpret_cast<Two*>(to + 8 * n + scores.lane % 4 * 2) = {out[m][n][2 * half], out[m][n][2 * half + 1]};
      }
  }

  /// A warp's rows, which stand where its queries were, 16 bytes a thread.
  void write_rows(const Place& place) {
    sync_warp();
    constexpr int kChunks = kOptions.head_dim / kChunk, kLanes = lanes_per_row(kChunks), kRowsAtOnce = kWarp / kLanes;
    for (int r = scores.lane / kLanes; r < 16 * kRowTiles; r += kRowsAtOnce) {
      const int row = scores.warp_row + r;
      if (!place.has(row)) continue;
      u16* const to = params.out.template at<u16>(place.b, place.query_of(row), place.head_of(row));
      for (int chunk = scores.lane % kLanes; chunk < kChunks; chunk += kLanes)
        *reinterpret_cast<Chunk*>(to + chunk * kChunk) =
            *reinterpret_cast<const Chunk*>(shared.query.at(row, chunk * kChunk));
    }
  }
};

}  // namespace flash_dmattn::cuda
