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
/// The same by a thread's part of a row's exponentials of a tile: it is smaller than this, and so is each term.
constexpr float kLargestSum = 256;
/// A reference that is farther than this from 0 (in base 2) is subtracted from the scores before anything is rounded.
constexpr float kFar = 4096;

/// The rows of `kRowTiles` blocks of 16.
template <int kRowTiles>
struct Softmax {
  float factor;                   ///< from scores to base 2; positive
  float reference[kRowTiles][2];  ///< a score; -inf before the first that is not
  float sum[kRowTiles][2];        ///< this thread's part
  bool is_far = false;            ///< whether one of the warp's references is
  bool is_unset = true;           ///< whether one of them is -inf

  explicit Softmax(float to_base_2) : factor(to_base_2) {
    for (int m = 0; m < kRowTiles; ++m)
      for (int half = 0; half < 2; ++half) reference[m][half] = -kInfinity, sum[m][half] = 0;
  }

  /// Moves the references to what a tile of scores asks for, and with them the sums and `out`, the products so far.
  /// Far references are subtracted from the scores.
  template <int kColumnTiles, int kOutTiles>
  void follow(float (&score)[kRowTiles][kColumnTiles][4], float (&out)[kRowTiles][kOutTiles][4]) {
    bool grows = is_far;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)  // false for -inf - -inf
        grows |= (highest(score[m], half) - reference[m][half]) * factor > kSlack;
    if (!any(grows)) return;
    float scale[kRowTiles][2];
    move(score, scale);
    rescale(out, scale);
  }

  /// The exponentials of a tile of scores, as operands A of the products with the values. If it is true the references
  /// have moved, and the products so far have to be rescaled by `scale`.
  ///
  /// That one of them has to move is seen from sums that are too large, which takes fewer steps than the maximum does,
  /// and none before the exponentials. Where there is no reference yet, or a far one, they move at once.
  template <class T, int kSteps>
  bool exponentiate(u32 (&p)[kSteps][4], float (&score)[1][2 * kSteps][4], float (&scale)[1][2]) {
    static_assert(kRowTiles == 1);
    bool moves = is_far || is_unset;
    float added[2];
    while (true) {
      if (moves) move(score, scale);
      added[0] = added[1] = 0;
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        exponentials<T>(p[step], score[0][2 * step], score[0][2 * step + 1], offset(0, 0), offset(0, 1), added);
      if (moves || !any(added[0] > kLargestSum || added[1] > kLargestSum)) break;
      moves = true;
    }
    for (int half = 0; half < 2; ++half) sum[0][half] += added[half];
    return moves;
  }

  template <int kColumnTiles>
  static float highest(const float (&score)[kColumnTiles][4], int half) {
    float x = maximum(score[0][2 * half], score[0][2 * half + 1]);
#pragma unroll
    for (int n = 1; n < kColumnTiles; ++n) x = maximum(x, maximum(score[n][2 * half], score[n][2 * half + 1]));
    return x;
  }
  /// Moves the references to the maxima, and the sums with them. `scale`: of what was summed of a row.
  template <int kColumnTiles>
  void move(float (&score)[kRowTiles][kColumnTiles][4], float (&scale)[kRowTiles][2]) {
    bool far = false, unset = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = maximum(quad_max(highest(score[m], half)), reference[m][half]);
        scale[m][half] = x == -kInfinity ? 1.0f : fast_exp2((reference[m][half] - x) * factor);
        reference[m][half] = x;
        unset |= x == -kInfinity;
        far |= finite_reference(m, half) * factor > kFar || finite_reference(m, half) * factor < -kFar;
        sum[m][half] *= scale[m][half];
      }
    is_unset = any(unset);
    is_far = any(far);
    if (!is_far) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[m][n][i] -= finite_reference(m, i / 2);
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

  /// Scores of two neighbouring 16 x 8 blocks to their exponentials, as the operand A of the product with the values.
  template <class T>
  void exponentials(u32 (&p)[4], const float (&left)[4], const float (&right)[4], int m) {
    exponentials<T>(p, left, right, offset(m, 0), offset(m, 1), sum[m]);
  }
  template <class T>
  void exponentials(u32 (&p)[4], const float (&left)[4], const float (&right)[4], float low, float high,
                    float (&to)[2]) const {
    auto power = [&](float score, float offset) { return fast_exp2(multiply_add(score, factor, -offset)); };
    auto two = [&](float x, float y, float offset, float& to) {
      const float a = power(x, offset), b = power(y, offset);
      to += a + b;
      return pack<T>(a, b);
    };
    p[0] = two(left[0], left[1], low, to[0]);
    p[1] = two(left[2], left[3], high, to[1]);
    p[2] = two(right[0], right[1], low, to[0]);
    p[3] = two(right[2], right[3], high, to[1]);
  }
};

}  // namespace flash_dmattn::cuda
