// The backward pass on Hopper: its tile sizes.
#pragma once
#include "attention/backward_params.cuh"

namespace flash_dmattn::cuda {

/// Two warpgroups have 64 keys each; one more copies rows and adds dQ.
struct HopperBackwardConfig {
  int head_dim;
  int dim;   ///< of the products: what head_dim is padded to
  int rows;  ///< of a tile
  int shared_bytes = 0;

  static constexpr int kKeys = 128, kStages = 2, kConsumers = 2, kThreads = 3 * 128;
  static constexpr int kRegisters = 232, kCopyRegisters = 40;

  constexpr int panels() const { return divide_up(dim, 64); }
  constexpr BackwardTiles tiles() const { return {kKeys, rows, dim, 1, kStages}; }
  /// A warpgroup has 64 of the rows, or of the columns.
  constexpr QueryTile query_tile() const {
    return rows == 128 ? QueryTile{rows, 8, 1, 1, 4} : QueryTile{rows, 8, panels(), 1, 4};
  }
  constexpr BackwardBlocks blocks() const { return {tiles(), query_tile(), kThreads, shared_bytes}; }
};

constexpr int kMostHopperBackwardDim = 128;  ///< the sums of more do not fit the registers

constexpr HopperBackwardConfig hopper_backward_config(int head_dim) {
  const auto make = [&](int dim, int rows) {
    HopperBackwardConfig config{head_dim, dim, rows};
    const int tiles = (2 * config.kKeys + 2 * config.kStages * rows) * config.panels() * 128 +
                      2 * config.kKeys * rows * 2 + config.query_tile().size() * 4;
    const int numbers = config.kStages * rows * 8 + config.kKeys * 24 + kMostRowTiles * 3 + 80, barriers = 10 * 8;
    config.shared_bytes = round_up(tiles + numbers + barriers, 1024);
    return config;
  };
  if (head_dim <= 64) return make(64, 128);
  return head_dim <= 96 ? make(96, 64) : make(128, 64);
}

}  // namespace flash_dmattn::cuda
