// What a kernel is told about a problem of attention. The host fills it in, kernels read it.
#pragma once
#include "types.cuh"

namespace flash_dmattn::cuda {

/// `pack` query heads that read one KV head, and share its mask and per-key bias, are rows of the same tile: row r of a
/// tile is position r / pack, head r % pack. They are a *unit*; unit u has the query heads [u * pack, (u + 1) * pack).
struct Shape {
  int batch, query_len, key_len, heads, kv_heads, head_dim, pack;

  constexpr int units() const { return heads / pack; }
  constexpr int kv_head(int unit) const { return unit * pack / (heads / kv_heads); }
  /// The absolute position of query 0: queries are aligned with the last keys.
  constexpr int first_position() const { return key_len - query_len; }
};

/// (B, N, H, D) of 16-bit numbers or float32; strides in elements, the last dimension contiguous. Rows start at
/// multiples of 16 bytes, unless a kernel says that it takes others.
struct Rows {
  void* data;
  i64 batch, position, head;

  template <class T>
  T* at(int b, int n, int h) const {
    return static_cast<T*>(data) + b * batch + n * position + h * head;
  }
};

/// (B, H, Q) float32, any strides.
struct RowNumbers {
  float* data;
  i64 batch, head, query;

  float* at(int b, int h, int q) const { return data + b * batch + h * head + q * query; }
};

/// (B | 1, 1 | Hk | H, 1 | Q, 1 | K), the query's dtype or float32; stride 0 where broadcast. `heads_per_head` query
/// heads read one head of it.
struct Bias {
  const void* data;
  i64 batch, head, query, key;
  int heads_per_head;
  int is_float32;

  constexpr i64 offset(int b, int h, int q, int k) const {
    return b * batch + h / heads_per_head * head + q * query + k * key;
  }
};

/// The gradient of a bias, zeros at first: its sums over broadcast dimensions, or where nothing is summed its numbers,
/// in the query's dtype. Null both: not asked for.
struct BiasGradient {
  float* sums;
  u16* numbers;
  i64 batch, head, query, key;
  int heads_per_head;

  constexpr i64 offset(int b, int h, int q, int k) const {
    return b * batch + h / heads_per_head * head + q * query + k * key;
  }
};

enum class BiasKind : int {
  none,
  per_key,  ///< stride 0 over queries, and the same for all heads of a unit
  full,     ///< anything
};

/// How the keys that not every position of a list sees are tested.
enum class Test : int { interval, bits };

}  // namespace flash_dmattn::cuda
