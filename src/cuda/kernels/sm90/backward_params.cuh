// The backward pass on Hopper: its tile sizes and parameters.
#pragma once
#include "attention/backward_params.cuh"
#include "tensor_map.cuh"

namespace flash_dmattn::cuda {

/// Two warpgroups have 64 keys each; one more copies rows and adds dQ.
struct HopperBackwardConfig {
  int head_dim;
  int dim;   ///< of the products: what head_dim is padded to
  int rows;  ///< of a tile
  int shared_bytes = 0;

  static constexpr int kKeys = 128, kStages = 2, kConsumers = 2, kThreads = 3 * 128;
  static constexpr int kRegisters = 240, kCopyRegisters = 24;

  constexpr int panels() const { return divide_up(dim, 64); }
  constexpr BackwardTiles tiles() const { return {kKeys, rows, dim, 1, kStages}; }
  /// A warpgroup has 64 of the rows and all columns, or all rows and 64 of the columns.
  constexpr bool cuts_rows() const { return rows == 128; }
  constexpr QueryTile query_tile() const { return {rows, 8, cuts_rows() ? 1 : 2, 1, cuts_rows() ? dim / 16 : 4}; }
  constexpr BackwardBlocks blocks() const { return {tiles(), query_tile(), kThreads, shared_bytes}; }
};

/// The sums of wider heads do not fit the registers; nor, beside tiles of 128 rows or a softcap, the addresses of a
/// full bias.
constexpr int kWidestHopperBackward = 128;
constexpr bool has_hopper_backward(const BackwardOptions& options) {
  return options.arch == 90 && options.head_dim <= kWidestHopperBackward &&
         (options.bias != BiasKind::full || (options.head_dim > 64 && !options.softcap));
}

constexpr HopperBackwardConfig hopper_backward_config(int head_dim) {
  const int dim = head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : head_dim <= 96 ? 96 : 128;
  HopperBackwardConfig config{head_dim, dim, dim <= 64 ? 128 : 64};
  const int tiles = (2 * config.kKeys + 2 * config.kStages * config.rows) * config.panels() * 128 +
                    2 * config.kKeys * config.rows * 2 + config.query_tile().size() * 4;
  const int numbers = config.kStages * config.rows * 8 + config.kKeys * 24 + kMostRowTiles * 3 + 80;
  const int barriers = 11 * 8;
  config.shared_bytes = round_up(tiles + numbers + barriers, 1024);
  return config;
}

struct HopperBackwardParams {
  BackwardParams pass;
  TensorMap query, grad_out;  ///< boxes of a tile of rows
};

}  // namespace flash_dmattn::cuda
