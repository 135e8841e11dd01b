// The forward pass of the generic family: its options, tile sizes and parameters.
#pragma once
#include "sm80/scores_params.cuh"

namespace flash_dmattn::cuda {

struct ForwardOptions {
  int arch, head_dim;  ///< a multiple of 8
  Number number;
  Test test;
  BiasKind bias;
  bool softcap;
  int rows;            ///< one of forward_rows
  bool split = false;  ///< the parts of a list go to different blocks, and `Combine` follows
};

/// Rows of a tile: 128, or as few as can hold `needed` rows, in case that is fewer.
constexpr int forward_rows(int arch, int head_dim, i64 needed) {
  const bool is_small = shared_capacity(arch) < 128 * 1024 && head_dim > 192;
  return needed <= 16 ? 16 : needed <= 64 || is_small ? 64 : 128;
}

struct ForwardConfig {
  ScoresConfig scores;
  int blocks;  ///< per multiprocessor
  int shared_bytes;
};

constexpr int forward_shared_bytes(const ScoresConfig& config) {
  const int row_bytes = tile_pitch(config.head_dim) * 2;
  return (config.rows + 2 * config.stages * config.keys) * row_bytes + staging_bytes(config);
}

/// A warp has 32 rows where its registers can hold their output: each fragment of keys and values that it reads from
/// shared memory then serves twice.
constexpr ForwardConfig forward_config(const ForwardOptions& options) {
  const int capacity = shared_capacity(options.arch);
  const bool is_small = capacity < 128 * 1024, is_wide = options.head_dim > 128;
  ScoresConfig scores{options.head_dim, options.number, options.test, options.bias, options.softcap};
  scores.rows = options.rows;
  scores.keys = options.rows == 16 || (is_small && is_wide) ? 32 : 64;
  scores.warps = options.rows == 16 ? 1 : options.rows == 64 || !(is_small || is_wide) ? 4 : 8;
  int blocks = options.rows == 16 ? 4 : scores.warps == 8 || is_wide || is_small ? 1 : 2;
  // 1 KiB of each block is the system's.
  auto fits = [&](int stages) {
    scores.stages = stages;
    return blocks * (forward_shared_bytes(scores) + 1024) <= capacity + 1024;
  };
  if (options.rows == 16)
    while (blocks > 1 && !fits(2)) --blocks;
  // One stage's addresses and 64 scores a thread leave too few registers for fetching biases.
  if (blocks == 2 && options.bias == BiasKind::per_key && !fits(2)) scores.keys = 32;
  if (!fits(2)) scores.stages = 1;
  return {scores, blocks, forward_shared_bytes(scores)};
}

/// The sum of a row's exponentials, as 2^reference * sum. Not as its logarithm, which has no room for the sum beside a
/// large reference.
struct PartialSum {
  float reference, sum;
};

struct ForwardParams {
  ScoresParams scores;
  Rows value, out;
  RowNumbers lse;
  // With split: how many tiles of keys a part has, and where its output (splits, B, H, Q, D) and sums (splits, B, H, Q)
  // go.
  int split_tiles;
  float* split_out = nullptr;
  PartialSum* split_sums = nullptr;
};

struct CombineOptions {
  int arch;
  Number number;
};

constexpr int kMostSplits = 256, kCombineThreads = 128;

struct CombineParams {
  static constexpr int kSharedBytes = kMostSplits * 4;
  Shape shape;
  Rows out;
  RowNumbers lse;
  int splits;
  const float* split_out;
  const PartialSum* split_sums;
};

}  // namespace flash_dmattn::cuda
