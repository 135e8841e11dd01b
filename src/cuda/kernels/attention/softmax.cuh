// The softmax of rows whose scores come tile after tile, in base 2, held as accumulators of mma: of each 16 x 8 block a
// thread has two numbers of each of two rows, and the four threads of a quad share these rows.
#pragma once
#include "ptx/number.cuh"
#include "ptx/warp.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

inline float quad_max(float x) {
  x = maximum(x, shuffle_xor(x, 1));
  return maximum(x, shuffle_xor(x, 2));
}
inline float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

constexpr float kLn2 = 0.6931471805599453f;

/// The natural logarithm of 2^reference * sum, which a softmax divides by; -inf where it saw nothing.
inline float natural_lse(float reference, float sum) { return (reference + fast_log2(sum)) * kLn2; }

/// The reference of a row, which is subtracted from its scores, follows their maximum only when that has grown by more
/// than this: rescaling what was summed is rare, and no term is larger than 2^8.
constexpr float kSlack = 8;
/// A reference that is farther than this from 0 (in base 2) is subtracted from the scores before anything is rounded.
constexpr float kFar = 4096;

/// The rows of `kRowTiles` blocks of 16.
template <int kRowTiles>
struct Softmax {
  float factor;                   ///< from scores to base 2; positive
  float reference[kRowTiles][2];  ///< a score; -inf before the first that is not
  float sum[kRowTiles][2];        ///< this thread's part
  int& is_far;                    ///< whether one of the warp's references is; in shared memory

  Softmax(float to_base_2, int& far) : factor(to_base_2), is_far(far) {
    sync_warp();
    is_far = false;
    sync_warp();
    for (int m = 0; m < kRowTiles; ++m)
      for (int half = 0; half < 2; ++half) reference[m][half] = -kInfinity, sum[m][half] = 0;
  }

  /// Moves the references to what a tile of scores asks for, and with them the sums and `out`, the products so far.
  /// Far references are subtracted from the scores.
  template <int kColumnTiles, int kOutTiles>
  void follow(float (&score)[kRowTiles][kColumnTiles][4], float (&out)[kRowTiles][kOutTiles][4]) {
    move_references(score, [&](int m, int half, float scale) {
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) out[m][n][2 * half] *= scale, out[m][n][2 * half + 1] *= scale;
    });
  }
  /// The same, but that it leaves `out` alone: if it is true, `out` has to be rescaled.
  template <int kColumnTiles>
  bool follow(float (&score)[kRowTiles][kColumnTiles][4], float (&scale)[kRowTiles][2]) {
    return move_references(score, [&](int m, int half, float x) { scale[m][half] = x; });
  }
  /// rescale(m, half, scale): of what was summed of a row.
  template <int kColumnTiles, class Rescale>
  bool move_references(float (&score)[kRowTiles][kColumnTiles][4], const Rescale& rescale) {
    float highest[kRowTiles][2];
    bool grows = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = maximum(score[m][0][2 * half], score[m][0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < kColumnTiles; ++n)
          x = maximum(x, maximum(score[m][n][2 * half], score[m][n][2 * half + 1]));
        highest[m][half] = quad_max(x);
        // False for -inf - -inf.
        grows |= (highest[m][half] - reference[m][half]) * factor > kSlack;
      }
    const bool moves = is_far || ballot(grows) != 0;
    if (moves) {
      bool far = false;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float x = maximum(highest[m][half], reference[m][half]);
          const float scale = x == -kInfinity ? 1.0f : fast_exp2((reference[m][half] - x) * factor);
          reference[m][half] = x;
          far |= finite_reference(m, half) * factor > kFar || finite_reference(m, half) * factor < -kFar;
          sum[m][half] *= scale;
          rescale(m, half, scale);
        }
      far = ballot(far) != 0;
      sync_warp();
      is_far = far;
      sync_warp();
      if (is_far) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) score[m][n][i] -= finite_reference(m, i / 2);
      }
    }
    return moves;
  }
  template <int kOutTiles>
  static void rescale(float (&out)[kRowTiles][kOutTiles][4], const float (&scale)[kRowTiles][2]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][n][i] *= scale[m][i / 2];
  }

  float finite_reference(int m, int half) const { return reference[m][half] == -kInfinity ? 0.0f : reference[m][half]; }
  /// What is left to subtract from the scores of a row, in base 2.
  float offset(int m, int half) const { return is_far ? 0.0f : finite_reference(m, half) * factor; }

  /// Scores to their exponentials.
  template <int kColumnTiles>
  void exponentiate(float (&score)[kRowTiles][kColumnTiles][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const float offsets[2] = {offset(m, 0), offset(m, 1)};
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          score[m][n][i] = fast_exp2(multiply_add(score[m][n][i], factor, -offsets[i / 2]));
          sum[m][i / 2] += score[m][n][i];
        }
    }
  }
  /// Scores of two neighbouring 16 x 8 blocks to their exponentials, as the operand A of the product with the values.
  template <class T>
  void exponentials(u32 (&p)[4], const float (&left)[4], const float (&right)[4], int m) {
    const float low = offset(m, 0), high = offset(m, 1);
    auto power = [&](float score, float offset) { return fast_exp2(multiply_add(score, factor, -offset)); };
    auto two = [&](float x, float y, float offset, float& sum) {
      const float a = power(x, offset), b = power(y, offset);
      sum += a + b;
      return pack<T>(a, b);
    };
    p[0] = two(left[0], left[1], low, sum[m][0]);
    p[1] = two(left[2], left[3], high, sum[m][1]);
    p[2] = two(right[0], right[1], low, sum[m][0]);
    p[3] = two(right[2], right[3], high, sum[m][1]);
  }
};

}  // namespace flash_dmattn::cuda
