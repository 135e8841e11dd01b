// What the copy engine takes boxes of: the host describes a tensor once for each launch.
#pragma once
#include "problem.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

/// Opaque to kernels, which have it among their parameters (CUtensorMap).
struct alignas(64) TensorMap {
  u64 words[16];
};

constexpr int kBoxColumns = 64;  ///< 128 bytes of a row

/// A tensor (B, N, H, D) of 16-bit numbers, D a multiple of 8, and its boxes: kBoxColumns columns of `heads` heads at
/// each of `positions` positions. What lies outside of the tensor is zeros.
struct TensorBoxes {
  Rows rows;  ///< strides above 0, multiples of 8; starts at a multiple of 16 bytes
  int size[4];
  int positions, heads;
};

}  // namespace flash_dmattn::cuda
