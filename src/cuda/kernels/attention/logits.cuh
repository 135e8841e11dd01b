// From the products of queries and keys to what the softmax takes: softcap, biases, and the tests of the keys that not
// every row sees. Scores are held as accumulators of mma and wgmma, [row tiles][column tiles][4]: of each 16 x 8 block
// a thread has two numbers of each of two rows.
#pragma once
#include "attention/scores_params.cuh"
#include "ptx/number.cuh"
#include "ptx/warp.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

template <int kRowTiles, int kColumnTiles>
void cap_scores(float (&score)[kRowTiles][kColumnTiles][4], const Logits& logits) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)  // tanh(x) = 1 - 2 / (1 + e^2x)
        score[m][n][i] =
            multiply_add(-2 * logits.cap, fast_reciprocal(1 + fast_exp2(score[m][n][i] * logits.inner)), logits.cap);
}

/// The biases of a problem, whose dtype is T or float32.
template <class T>
struct Biases {
  const Bias& bias;
  const Logits& logits;

  explicit Biases(const ScoresParams& params) : bias(params.bias), logits(params.logits) {}

  /// Where those of a row begin: that of key 0.
  const void* row(int b, int head, int query) const {
    return static_cast<const char*>(bias.data) + bias.offset(b, head, query, 0) * (bias.is_float32 ? 4 : 2);
  }
  u32 bits(const void* row, int key) const {
    const i64 offset = key * bias.key;
    return bias.is_float32 ? static_cast<const u32*>(row)[offset] : static_cast<const u16*>(row)[offset];
  }
  /// As it is added to products.
  float scaled(u32 bits) const {
    return scaled(bias.is_float32 ? float_of(bits) : to_float(T{static_cast<u16>(bits)}));
  }
  float scaled(float x) const {
    const float scaled = x * logits.bias_factor;
    return x == -kInfinity ? x : maximum(minimum(scaled, kLargestBias), -kLargestBias);
  }

  /// Whether those of neighbouring keys can be read two at a time.
  bool are_pairs() const {
    return bias.key == 1 && ((bias.batch | bias.head | bias.query) & 1) == 0 &&
           reinterpret_cast<u64>(bias.data) % (bias.is_float32 ? 8 : 4) == 0;
  }
  struct alignas(8) Pair {
    float x, y;
  };
  Pair pair(const void* row, int key) const {
    if (bias.is_float32) return *reinterpret_cast<const Pair*>(static_cast<const float*>(row) + key);
    const u32 both = *reinterpret_cast<const u32*>(static_cast<const u16*>(row) + key);
    return {to_float(T{static_cast<u16>(both)}), to_float(T{static_cast<u16>(both >> 16)})};
  }

  /// BiasKind::full. `positions`: of this thread's first column and on; `by_pairs`: are_pairs, and the positions are
  /// neighbours. `row_at(m, half)` is what row() gives for the row `half` of row tile m.
  template <int kRowTiles, int kColumnTiles, class RowAt>
  void add(float (&score)[kRowTiles][kColumnTiles][4], const int* positions, bool by_pairs, const RowAt& row_at) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const void* const of_row = row_at(m, half);
        if (by_pairs) {
          const int first = positions[0];
#pragma unroll
          for (int n = 0; n < kColumnTiles; ++n) {
            const Pair both = pair(of_row, first + 8 * n);
            score[m][n][2 * half] += scaled(both.x);
            score[m][n][2 * half + 1] += scaled(both.y);
          }
        } else {
#pragma unroll
          for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) score[m][n][2 * half + i] += scaled(bits(of_row, positions[8 * n + i]));
        }
      }
  }
};

/// BiasKind::per_key: the scaled biases of the columns, by place_of_column.
template <int kRowTiles, int kColumnTiles>
void add_key_biases(float (&score)[kRowTiles][kColumnTiles][4], const float* biases, int lane) {
  static_assert(kColumnTiles % 2 == 0);
  struct alignas(16) Four {
    float x[4];
  };
  const Four* const of_thread = reinterpret_cast<const Four*>(biases) + lane % 4;
#pragma unroll
  for (int n = 0; n < kColumnTiles; n += 2) {
    const Four bias = of_thread[2 * n];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < 8; ++i) score[m][n + i / 4][i % 4] += bias.x[i / 4 * 2 + i % 2];
  }
}

/// Sets the scores of pairs that do not see each other to -inf. `key_of(column)(m, half)`: whether the row `half` of
/// row tile m, one of the two that this thread holds there, sees the key of that column.
template <int kRowTiles, int kColumnTiles, class Key>
void mask_scores(float (&score)[kRowTiles][kColumnTiles][4], int lane, const Key& key_of) {
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto sees = key_of(8 * n + lane % 4 * 2 + i);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (!sees(m, half)) score[m][n][2 * half + i] = -kInfinity;
    }
}

/// Where a row sees the first `count` columns.
template <int kRowTiles, int kColumnTiles>
void mask_by_count(float (&score)[kRowTiles][kColumnTiles][4], int lane, const int (&count)[kRowTiles][2]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int seen = count[m][half] - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (8 * n + i >= seen) score[m][n][2 * half + i] = -kInfinity;
    }
}

/// Test::interval. `at`: the absolute positions of the rows; `positions` and `ends` of the columns.
template <int kRowTiles, int kColumnTiles>
void mask_by_intervals(float (&score)[kRowTiles][kColumnTiles][4], int lane, const int (&at)[kRowTiles][2],
                       bool is_causal, const int* positions, const u32* ends) {
  mask_scores(score, lane, [&](int column) {
    const int start = is_causal ? positions[column] : kSmallest, end = static_cast<int>(ends[column]);
    return [=, &at](int m, int half) { return start <= at[m][half] && at[m][half] < end; };
  });
}

/// Test::bits, `words` of `kPitch` for each column. The positions of a warp's rows are at most 32 neighbours, from
/// position `first` of the run on: `bit` counts from there.
template <int kPitch, int kRowTiles, int kColumnTiles>
void mask_by_bits(float (&score)[kRowTiles][kColumnTiles][4], int lane, const int (&bit)[kRowTiles][2], int first,
                  int words, const u32* bits) {
  const int low = least(first / 32, words - 1), high = least(low + 1, words - 1);
  mask_scores(score, lane, [&](int column) {
    const u32* const of_key = bits + column * kPitch;
    const u32 seen = static_cast<u32>((static_cast<u64>(of_key[high]) << 32 | of_key[low]) >> (first % 32));
    return [=, &bit](int m, int half) { return (seen >> bit[m][half] & 1) != 0; };
  });
}

}  // namespace flash_dmattn::cuda
