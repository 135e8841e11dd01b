// The tiles in which the passes of the generic family (mma.sync, cp.async) compute scores.
#pragma once
#include "attention/scores_params.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

/// Numbers from one row of a tile in shared memory to the next: an odd number of 16-byte chunks, so that eight rows of
/// one column, which is what load_matrices reads at a time, never meet in a bank. Columns are padded to a multiple
/// of 16.
constexpr int tile_pitch(int columns) { return (round_up(columns, 16) / 8 | 1) * 8; }

/// The tiles of one block, and what its kernel is specialised on.
struct ScoresConfig {
  int head_dim;
  Number number;
  Test test;
  BiasKind bias;
  bool softcap;
  int rows = 0, keys = 0, warps = 0;
  int stages = 1;  ///< 2: the next tile of keys is copied while one is worked at; 1: its halves are

  constexpr int threads() const { return warps * 32; }
  constexpr int row_tiles() const { return rows / (16 * warps); }  ///< of 16 rows, of a warp
  constexpr int padded_dim() const { return round_up(head_dim, 16); }
};

/// Words of bits that a run of at most 128 positions has for each key.
constexpr int kMostWords = 4;

/// Words that are kept for the test of a key.
constexpr int test_words(Test test) { return test == Test::interval ? 1 : kMostWords; }

/// Bytes of shared memory beside the tiles of queries, keys and values.
constexpr int staging_bytes(const ScoresConfig& config) {
  return (4 + 2 + 2 * test_words(config.test)) * config.keys * 4 +
         (config.bias == BiasKind::full ? 12 * config.rows : 4 * config.rows + 16) + 64;
}

}  // namespace flash_dmattn::cuda
