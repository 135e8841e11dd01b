// The probabilities: options, tile sizes and parameters.
#pragma once
#include "sm80/scores_params.cuh"

namespace flash_dmattn::cuda {

struct ProbabilitiesOptions {
  int arch, head_dim;  ///< a multiple of 8
  Number number;
  Test test;
  BiasKind bias;
  bool softcap;
};

constexpr ScoresConfig probabilities_config(const ProbabilitiesOptions& options) {
  return {.head_dim = options.head_dim,
          .number = options.number,
          .test = options.test,
          .bias = options.bias,
          .softcap = options.softcap,
          .rows = 64,
          .keys = 64,
          .warps = 4,
          .stages = 1};
}
constexpr int probabilities_shared_bytes(const ScoresConfig& config) {
  return (config.rows + config.stages * config.keys) * tile_pitch(config.head_dim) * 2 + staging_bytes(config);
}

constexpr int kProbabilitiesTiles = 16;  ///< of keys, that a block has at most
constexpr float kLog2e = 1.4426950408889634f;

/// (B, H, Q, K) of 16-bit numbers, any strides.
struct Matrix {
  void* data;
  i64 batch, head, query, key;
};

struct ProbabilitiesParams {
  ScoresParams scores;
  RowNumbers lse;
  Matrix probs;
};

constexpr int kZeroThreads = 256;

struct ZeroMatrixParams {
  Matrix to;
  int heads, queries;
  i64 keys;
};

}  // namespace flash_dmattn::cuda
