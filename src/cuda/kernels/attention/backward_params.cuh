// The backward pass: its options and parameters, whatever the family of its kernels.
#pragma once
#include "attention/scores_params.cuh"

namespace flash_dmattn::cuda {

struct BackwardOptions {
  int arch, head_dim;  ///< a multiple of 8
  Number number;
  Test test;
  BiasKind bias;
  bool softcap, deterministic;
};

/// The tiles of a block.
struct BackwardTiles {
  int keys, rows, dim;  ///< dim: what the head dim is padded to
  int split;   ///< warps that share 16 keys: in the scores each has its part of the rows, in dK and dV of the columns
  int stages;  ///< of rows; 2: the next tile is copied while one is worked at
  int turned = 0;       ///< of the second part's columns, the last `turned` pairs of 8 come first
  int bit_words = 0;    ///< Test::bits: room for those of a key in shared memory; 0: they are read where they are
  bool halves = false;  ///< tiles of rows that see keys of one half of the tile only come after the others
};

/// How the sums of a tile of dQ are cut among warps, column_groups side by side: a warp has row_tiles x pairs of 16 x
/// 16 blocks. What a thread holds of each 16 x 8 block stands together.
struct QueryTile {
  int rows, warps, column_groups, row_tiles, pairs;

  constexpr int blocks() const { return row_tiles * pairs * 2; }
  constexpr int size() const { return warps * blocks() * 128; }  ///< floats
};

/// What the host knows of a kernel.
struct BackwardBlocks {
  BackwardTiles tiles;
  QueryTile query_tile;
  int threads, shared_bytes;
};

/// A tile of rows has all heads of a unit at as many neighbouring positions as fit; rows to spare at its end are
/// nobody's.
constexpr int positions_of_tile(int rows, int pack) { return rows / pack; }
constexpr int kMostRowTiles = 256;  ///< of a run

/// Which tile of which list a block has.
struct BackwardWork {
  int b, unit, run, kv_head;
  int tile;  ///< of keys
  int first_query;
  int rows;  ///< of the run's tiles, up to those of its last position
  int turn;  ///< deterministic: blocks that add to the same dK and dV before
  int ticket;
  KeyList list;
  i64 row_tiles;  ///< of all runs before this one
};

/// What stands in shared memory beside the tiles of numbers.
template <int kKeys, int kRows, int kStages, int kBitWords = 0>
struct BackwardNumbers {
  float lse[kStages][kRows], delta[kStages][kRows];
  float bias[kKeys];                  // in base 2; -inf beyond the end of the list
  int position[kKeys];                // -1 beyond the end of the list
  int start[kKeys], end[kKeys];       // Test::interval: the rows of the run that see the key
  float bias_sum[2][kKeys];           // of the rows so far, for each of the warps that share a key
  u32 bits[kKeys * kBitWords + 1];    // of the positions of the run
  u16 tiles[kMostRowTiles];           // those that see any key; in the upper 3 bits what `seen` says
  unsigned char seen[kMostRowTiles];  // whether it sees keys of the lower half, of the upper; whether it needs tests
  int tile_count, whole_count;        // BackwardTiles::halves: the first ones see both
  BackwardWork work;
};

/// Which (batch, unit)s a launch has: those whose sums never meet, or all.
struct Part {
  int first_batch;
  Divisor batches;
  int first_unit;
  Divisor units;
  int unit_step;
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
  float* grad_query;             ///< tiles: (B, units, runs, tiles of a run, QueryTile::size())
  float *grad_key, *grad_value;  ///< (B, K, Hk, BackwardTiles::dim), columns by place_of_column
  // Where a tile of keys has one block, it writes dK and dV themselves: the data of these is not null then.
  Rows key_out, value_out;
  float scale;
  Part part;
  int key_tiles;         ///< of the longest list
  Divisor group;         ///< lists whose tiles are worked at together; deterministic: with one of a KV head at most
  Divisor group_blocks;  ///< group * key_tiles
  int tile_positions;    ///< positions_of_tile
  u32 inverse_pack;      ///< 2^16 / pack, rounded up: r / pack is r * inverse_pack >> 16 for the rows r of a tile
  // Deterministic: the next block's number, whose turn it is to add to a tile of dQ, and to dK and dV of a KV head.
  // Lists that are spans have the same keys in the same tile: then each tile has its own turns.
  int *ticket, *query_turn, *key_turn;
};

}  // namespace flash_dmattn::cuda
