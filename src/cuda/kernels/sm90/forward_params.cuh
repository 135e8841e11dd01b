// The forward pass on Hopper: its options, tile sizes and parameters.
#pragma once
#include "attention/scores_params.cuh"
#include "tensor_map.cuh"

namespace flash_dmattn::cuda {

struct HopperForwardOptions {
  int head_dim;  ///< a multiple of 8
  Number number;
  Test test;
  BiasKind bias;
  bool softcap;
};

/// A block has one tile of rows at a time: 64 for each warpgroup that computes. One more warpgroup copies.
struct HopperForwardConfig {
  int head_dim;
  int dim;             ///< of the products: what head_dim is padded to
  int rows, keys;      ///< of a tile
  int stages;          ///< tiles of keys in shared memory
  int registers;       ///< of a thread that computes
  int copy_registers;  ///< of one that copies
  bool has_terms;      ///< products add the keys' biases
  int shared_bytes = 0;

  constexpr int consumers() const { return rows / 64; }
  constexpr int threads() const { return (consumers() + 1) * 128; }
  constexpr int panels() const { return divide_up(dim, 64); }
};

/// Words that the test of a key takes: the first row that sees it and the end, or bits of at most 192 positions.
constexpr int kMostHopperWords = 6;
constexpr int hopper_test_words(Test test) { return test == Test::interval ? 2 : kMostHopperWords; }

/// The accumulators of 64 x dim output, 64 x keys scores and their probabilities must fit a warpgroup's registers: more
/// rows take fewer bytes of keys for each product, and leave fewer registers.
constexpr HopperForwardConfig hopper_forward_config(const HopperForwardOptions& options) {
  const int head_dim = options.head_dim;
  const auto make = [&](int dim, int rows, int keys, int stages) {
    HopperForwardConfig config{head_dim,
                               dim,
                               rows,
                               keys,
                               stages,
                               rows == 192 ? 160 : 224,
                               rows == 192 ? 32 : 56,
                               options.bias == BiasKind::per_key && !options.softcap};
    const int tiles = (rows + 2 * stages * keys) * config.panels() * 128;
    const int bias_words = config.has_terms ? 4 : 1;
    const int numbers = stages * keys * (1 + bias_words + hopper_test_words(options.test)) * 4,
              others =
                  rows * 8 + (6 + 4 * stages) * 8 + 6 * 28 + 96 + (config.has_terms ? (64 + most(keys, 64)) * 16 : 32);
    config.shared_bytes = round_up(tiles + numbers + others, 1024);
    return config;
  };
  const bool is_full = options.bias == BiasKind::full;  // its addresses take registers
  if (head_dim <= 64) return is_full ? make(64, 128, 128, 4) : make(64, 192, options.softcap ? 96 : 112, 4);
  if (head_dim <= 96) return is_full ? make(96, 128, 96, 3) : make(96, 192, options.softcap ? 80 : 96, 3);
  if (head_dim <= 128) return is_full ? make(128, 128, 96, 3) : make(128, 192, options.softcap ? 64 : 80, 4);
  if (head_dim <= 192) return make(192, 128, is_full ? 64 : 96, 2);
  return is_full ? make(256, 128, 32, 4) : make(256, 128, 64, 2);
}

struct HopperForwardParams {
  ScoresParams scores;
  Rows value, out;
  RowNumbers lse;
  u32 works;  ///< tiles of rows
  int units, units_per_kv_head;
  u32 inverse_pack;  ///< row / pack is  row * inverse_pack >> 16
  int query_parts;   ///< in which a tile's queries come: one for each warpgroup that computes, if pack divides its rows
  int part_positions;
  int by_boxes;                      ///< whether keys and values come in boxes: the keys 0, 1, 2, …
  TensorMap query_boxes;             ///< of a part
  TensorMap key_boxes, value_boxes;  ///< of a tile
};

}  // namespace flash_dmattn::cuda
