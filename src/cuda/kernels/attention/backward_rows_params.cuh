// Before and after the backward pass: the parameters.
#pragma once
#include "attention/backward_params.cuh"
#include "sm80/backward_params.cuh"
#include "sm90/backward_params.cuh"

namespace flash_dmattn::cuda {

/// The float32 sums of the gradients, one after the other. Those of keys that nobody sees are neither written nor read.
struct GradientSums {
  float* data;
  i64 query;       ///< how many there are of dQ
  i64 key_rows;    ///< (B, K, Hk), of dK and then of dV; 0: they have no sums
  int padded_dim;  ///< of such a row
  i64 all;         ///< with those of the bias; a multiple of 4, as all are

  float* grad_key() const { return data + query; }
  float* grad_value() const { return grad_key() + key_rows * padded_dim; }
  float* grad_bias() const { return grad_value() + key_rows * padded_dim; }
};

/// How many zeros a block writes: fours of dQ's and the bias's, rows of dK's and dV's.
struct ZerosOfBlock {
  int query, bias, key_rows;
};

/// What the pass needs to know of each row; and where its sums begin, with zeros.
struct BackwardRowsParams {
  Shape shape;
  Plan plan;
  GradientSums sums;
  ZerosOfBlock zeros;
  int tile_rows, tile_positions, tiles;  ///< tiles: of a unit
  Rows out, grad_out;
  RowNumbers lse, grad_lse;   ///< grad_lse: its data null where there is none
  float *base_2_lse, *delta;  ///< (B, units, tiles, tile_rows): +inf where a row sees nothing; sum(out * dO) - dLse
};
/// Threads that have a row of BackwardRows.
constexpr int lanes_of_row(int head_dim) {
  int lanes = 1;
  while (lanes < 32 && lanes * 8 < head_dim) lanes *= 2;
  return lanes;
}
constexpr int kRowThreads = 256;  ///< of the kernels before and after the pass

struct GradientOptions {
  int arch, head_dim;
  Number number;
  int hopper_rows;  ///< of a tile of HopperBackward, whose sums these are; 0: they are those of Backward
};
constexpr QueryTile query_tile(const GradientOptions& options) {
  return options.hopper_rows > 0 ? hopper_query_tile(options.head_dim, options.hopper_rows)
                                 : backward_config(options.arch, options.head_dim).query_tile();
}
constexpr int query_gradient_shared_bytes(const GradientOptions& options) {
  return query_tile(options).rows * tile_pitch(round_up(options.head_dim, 16)) * 2;
}
struct QueryGradientParams {
  Shape shape;
  int tile_positions, tiles;  ///< tiles: of a unit
  const float* sums;
  Rows out;
  float scale;
};

struct KeyGradientsParams {
  Shape shape;
  Plan plan;
  GradientSums sums;
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

/// What is to be written, and by how many blocks; the bias by those that are left.
struct GradientsParams {
  QueryGradientParams query;
  KeyGradientsParams keys;
  BiasGradientParams bias;
  int query_blocks, key_blocks;
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
