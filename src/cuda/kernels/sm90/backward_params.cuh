// The backward pass on Hopper: its tile sizes and parameters.
#pragma once
#include "attention/backward_params.cuh"
#include "tensor_map.cuh"

namespace flash_dmattn::cuda {

/// Tiles of dQ of so many rows. A warpgroup has 64 of 128 rows and all columns; or all of 64 rows, and half of the
/// columns.
constexpr QueryTile hopper_query_tile(int head_dim, int rows) {
  return rows == 128 ? QueryTile{128, 8, 1, 1, head_dim <= 32 ? 2 : 4}
                     : QueryTile{64, 8, 2, 1, 2 * divide_up(head_dim, 64)};
}

/// Two warpgroups multiply, and one more copies rows and adds dQ. Either each has 64 keys of its own. Or, where that
/// takes too many registers, both have the same 64: half of the rows each in the scores, half of the columns in dK, dV
/// and dQ. Probabilities then go through shared memory.
struct HopperBackwardConfig {
  int head_dim;
  int dim;         ///< of the products: what head_dim is padded to
  int keys, rows;  ///< of a tile
  int bit_words;   ///< of a key, in shared memory: one more than it may have, so that keys are in different banks
  bool halves;     ///< tiles of rows that see keys of one warpgroup only come last: half of the products are left out
  int query_stages = 2, grad_out_stages = 2;
  int shared_bytes = 0;

  static constexpr int kConsumers = 2, kThreads = 3 * 128;
  static constexpr int kRegisters = 240, kCopyRegisters = 24;

  constexpr bool shares_keys() const { return keys == 64; }
  constexpr int panels() const { return divide_up(dim, 64); }
  constexpr bool cuts_rows() const { return rows == 128; }
  /// Keys shared: the panels of which a warpgroup has all columns; and whether it has half of one more.
  constexpr int whole_panels() const { return panels() / 2; }
  constexpr bool halves_panel() const { return panels() % 2 != 0; }
  constexpr BackwardTiles tiles() const {
    return {keys,      rows,  dim, shares_keys() ? 2 : 1, query_stages, shares_keys() && halves_panel() ? 2 : 0,
            bit_words, halves};
  }
  constexpr QueryTile query_tile() const { return hopper_query_tile(head_dim, rows); }
  constexpr BackwardBlocks blocks() const { return {tiles(), query_tile(), kThreads, shared_bytes}; }
};

/// The addresses of a full bias and its gradient take registers. Deterministic blocks come to tiles of rows in the same
/// order, or they would wait for each other; a softcap's derivative leaves no registers for a second loop.
constexpr HopperBackwardConfig hopper_backward_config(const BackwardOptions& options) {
  const int head_dim = options.head_dim;
  const bool shares_keys = head_dim > 128 || options.bias == BiasKind::full;
  HopperBackwardConfig config{.head_dim = head_dim,
                              .dim = round_up(head_dim, shares_keys ? 64 : 32),
                              .keys = shares_keys ? 64 : 128,
                              .rows = shares_keys || head_dim > 64 ? 64 : 128,
                              .bit_words = options.test == Test::bits ? kMostBits / 32 + 1 : 0,
                              .halves = !shares_keys && !options.deterministic && !options.softcap};
  if (head_dim > 192) config.grad_out_stages = 1;
  const int rows = config.rows * (config.query_stages + config.grad_out_stages), scores = 2 * config.keys * config.rows;
  const int tiles = (2 * config.keys + rows) * config.panels() * 128 + scores * 2 +
                    config.query_tile().size() * 4 / (shares_keys ? 2 : 1);
  const int numbers =
      config.query_stages * config.rows * 8 + config.keys * (24 + 4 * config.bit_words) + kMostRowTiles * 3 + 96;
  const int barriers = 13 * 8;
  config.shared_bytes = round_up(tiles + numbers + barriers, 1024);
  return config;
}

struct HopperBackwardParams {
  BackwardParams pass;
  TensorMap query, grad_out;  ///< boxes of a tile of rows
};

}  // namespace flash_dmattn::cuda
