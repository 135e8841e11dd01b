// The backward pass of the generic family: its tile sizes.
#pragma once
#include "attention/backward_params.cuh"
#include "sm80/scores_params.cuh"

namespace flash_dmattn::cuda {

/// A block has a tile of keys; it goes over the tiles of rows of its run.
struct BackwardConfig {
  int head_dim;
  int keys, rows;
  int split, stages;  ///< as in BackwardTiles
  int dq_stages;      ///< of dS; 2: its product with the keys is made while the next tile's scores are
  int shared_bytes;

  constexpr int warps() const { return keys / 16 * split; }
  constexpr int threads() const { return warps() * 32; }
  constexpr int padded_dim() const { return round_up(head_dim, 16); }
  constexpr int pairs() const { return padded_dim() / 16; }  ///< of 16 x 8 blocks of accumulators, side by side

  constexpr BackwardTiles tiles() const { return {keys, rows, padded_dim(), split, stages}; }

  /// The cut of dQ that reads the fewest operands from shared memory.
  constexpr QueryTile query_tile() const {
    const auto cut = [&](int groups) {
      return QueryTile{rows, warps(), groups, rows / 16 / (warps() / groups), divide_up(pairs(), groups)};
    };
    const auto cost = [](const QueryTile& tile) {
      return 64 * tile.row_tiles * tile.pairs + tile.row_tiles + tile.pairs;
    };
    QueryTile best{};
    for (int groups = 1; groups <= warps(); groups *= 2) {
      const QueryTile tile = cut(groups);
      if (tile.row_tiles > 0 && (best.rows == 0 || cost(tile) < cost(best))) best = tile;
    }
    return best;
  }
  constexpr bool has_query_tile_of(const BackwardConfig& other) const {
    return rows == other.rows && warps() == other.warps() && head_dim == other.head_dim;
  }
  constexpr BackwardBlocks blocks() const { return {tiles(), query_tile(), threads(), shared_bytes}; }
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

}  // namespace flash_dmattn::cuda
