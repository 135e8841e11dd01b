// The backward pass of the generic family: its options, tile sizes and parameters.
#pragma once
#include "sm80/scores_params.cuh"

namespace flash_dmattn::cuda {

struct BackwardOptions {
  int arch, head_dim;  ///< a multiple of 8
  Number number;
  Test test;
  BiasKind bias;
  bool softcap, deterministic;
};

/// A block has a tile of keys; it goes over the tiles of rows of its run.
struct BackwardConfig {
  int head_dim;
  int keys, rows;
  int split;   ///< warps that share 16 keys: in the scores each has its part of the rows, in dK and dV of the columns
  int stages;  ///< of rows; 2: the next tile is copied while one is worked at
  int dq_stages;  ///< of dS; 2: its product with the keys is made while the next tile's scores are
  int shared_bytes;

  constexpr int warps() const { return keys / 16 * split; }
  constexpr int threads() const { return warps() * 32; }
  constexpr int padded_dim() const { return round_up(head_dim, 16); }
  constexpr int pairs() const { return padded_dim() / 16; }  ///< of 16 x 8 blocks of accumulators, side by side

  // dQ, rows x head dim, is cut among the warps: column_groups() side by side.
  constexpr int row_tiles(int groups) const { return rows / 16 / (warps() / groups); }
  constexpr int column_groups() const {
    int best = 0;
    const auto cost = [&](int groups) {
      const int m = row_tiles(groups), n = divide_up(pairs(), groups);
      return 64 * m * n + m + n;
    };
    for (int groups = 1; groups <= warps(); groups *= 2)
      if (row_tiles(groups) > 0 && (best == 0 || cost(groups) < cost(best))) best = groups;
    return best;
  }
  constexpr int dq_row_tiles() const { return row_tiles(column_groups()); }
  constexpr int dq_pairs() const { return divide_up(pairs(), column_groups()); }
  constexpr int dq_blocks() const { return dq_row_tiles() * dq_pairs() * 2; }
  /// Floats of a tile of dQ: what each thread holds of each 16 x 8 block stays together.
  constexpr int dq_size() const { return warps() * dq_blocks() * 128; }
  constexpr bool has_dq_of(const BackwardConfig& other) const {
    return rows == other.rows && warps() == other.warps() && head_dim == other.head_dim;
  }
};

/// Query positions of a run: about 1024 rows, so that what belongs to a tile of keys is loaded and stored seldom.
constexpr int backward_run(int pack) { return most(128, least(512, 1024 / pack / 64 * 64)); }
constexpr int kMostRowTiles = 256;  ///< of a run of at most 64 * 128 rows

/// Which tile of which list a block has.
struct BackwardWork {
  int b, unit, run, kv_head;
  int tile;  ///< of keys
  int first_query;
  int rows;  ///< of the run
  int turn;  ///< deterministic: blocks that add to the same dK and dV before
  int ticket;
  KeyList list;
  i64 row_tiles;  ///< of all runs before this one
};

/// What stands in shared memory beside the tiles of numbers.
template <int kKeys, int kRows, int kStages>
struct BackwardNumbers {
  float lse[kStages][kRows], delta[kStages][kRows];
  float bias[kKeys];             // in base 2; -inf beyond the end of the list
  int position[kKeys];           // -1 beyond the end of the list
  int start[kKeys], end[kKeys];  // Test::interval: the rows of the run that see the key
  float bias_sum[2][kKeys];      // of the rows so far, for each of the warps that share a key
  u16 tiles[kMostRowTiles];      // those that any key sees, and which of them need tests
  unsigned char seen[kMostRowTiles];
  int tile_count;
  BackwardWork work;
};

/// A full bias takes registers of its own. The tiles of dQ are the same with and without.
constexpr BackwardConfig backward_config(int arch, int head_dim, BiasKind bias = BiasKind::none) {
  const auto make = [&](int keys, int rows, int split, int stages, int dq_stages) {
    const int pitch = tile_pitch(head_dim) * 2, score_tiles = dq_stages + (split > 1 ? 1 : 0);
    const int numbers = stages * rows * 8 + keys * 24 + kMostRowTiles * 3 + 80;
    return BackwardConfig{
        head_dim,
        keys,
        rows,
        split,
        stages,
        dq_stages,
        round_up((2 * keys + 2 * stages * rows) * pitch + score_tiles * keys * tile_pitch(rows) * 2 + numbers, 128)};
  };
  const BackwardConfig narrow[] = {make(128, 64, 1, 2, 2), make(128, 64, 1, 2, 1), make(128, 64, 1, 1, 1)};
  const BackwardConfig wide[] = {make(64, 64, 2, 2, 2), make(64, 64, 2, 2, 1), make(64, 64, 2, 1, 1),
                                 make(64, 32, 2, 1, 1), make(32, 32, 2, 1, 1)};
  if (head_dim <= (bias == BiasKind::full ? 64 : 128)) {
    for (const BackwardConfig& config : narrow)
      if (config.shared_bytes <= shared_capacity(arch)) return config;
  }
  for (const BackwardConfig& config : wide)
    if (config.shared_bytes <= shared_capacity(arch)) return config;
  return {};
}

/// Which (batch, unit)s a launch has: those whose sums never meet, or all.
struct Part {
  int first_batch, batches, first_unit, units, unit_step;
};

struct BackwardParams {
  Shape shape;
  Plan plan;
  Rows query, key, value, grad_out;
  const float *lse, *delta;  ///< from BackwardRows
  Bias bias;
  BiasGradient grad_bias;  ///< BiasKind::full
  float* grad_key_bias;    ///< BiasKind::per_key: (B, units, K), null where not asked for
  Logits logits;
  float factor;                  ///< logits.factor with the sign of the queries
  float* grad_query;             ///< tiles: (B, units, runs, tiles of a run, BackwardConfig::dq_size())
  float *grad_key, *grad_value;  ///< (B, K, Hk, padded head dim), columns in the order of column_in_sums
  Part part;
  int key_tiles;     ///< of the longest list
  int group;         ///< lists whose tiles are worked at together
  u32 inverse_pack;  ///< 2^20 / pack, rounded up: r / pack is r * inverse_pack >> 20
  // Deterministic: the next block's number, whose turn it is to add to a tile of dQ, and to dK and dV of a KV head.
  // Lists that are spans have the same keys in the same tile: then each tile has its own turns.
  int *ticket, *query_turn, *key_turn;
};

/// A thread's four sums of two neighbouring 16 x 8 blocks stand together.
constexpr int column_in_sums(int column) {
  return column / 16 * 16 + column % 8 / 2 * 4 + column / 8 % 2 * 2 + column % 2;
}

/// What the pass needs to know of each row.
struct BackwardRowsParams {
  Shape shape;
  int run, runs;
  Rows out, grad_out;
  RowNumbers lse, grad_lse;   ///< grad_lse: its data null where there is none
  float *base_2_lse, *delta;  ///< (B, units, runs * run, pack): +inf where the row sees nothing; sum(out * dO) - dLse
};
/// Threads that have a row of BackwardRows.
constexpr int lanes_of_row(int head_dim) {
  int lanes = 1;
  while (lanes < 32 && lanes * 8 < head_dim) lanes *= 2;
  return lanes;
}
constexpr int kRowThreads = 256;  ///< of the kernels before and after the pass

struct QueryGradientOptions {
  int arch, head_dim;
  Number number;
};
constexpr int query_gradient_shared_bytes(int arch, int head_dim) {
  const BackwardConfig config = backward_config(arch, head_dim);
  return config.rows * tile_pitch(config.padded_dim()) * 2;
}
struct QueryGradientParams {
  Shape shape;
  int run, runs;
  const float* sums;
  Rows out;
  float scale;
};

struct KeyGradientsParams {
  Shape shape;
  int padded_dim;
  const float *grad_key, *grad_value;
  Rows key_out, value_out;
  float scale;
};

/// out[b, h, q, k] = the sum of `batches` x `heads` elements of `sums`.
struct BiasGradientParams {
  const float* sums;
  i64 sums_batch, sums_head, sums_query, sums_key;  ///< strides
  int batches, heads;                               ///< that are summed into one
  int size[4];
  void* out;
  i64 stride[4];
  int is_float32;
};

/// The gradient of a bias that is the same for all keys: it moves only lse.
struct RowBiasGradientParams {
  Shape shape;
  RowNumbers lse, grad_lse;
  int size[3];  ///< of the bias: (B | 1, 1 | Hk | H, 1 | Q)
  void* out;
  i64 stride[3];
  int is_float32;
};

}  // namespace flash_dmattn::cuda
