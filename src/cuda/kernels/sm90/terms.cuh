// A number for each column of scores that their product adds itself, in a step more: three numbers of 16 bits, which
// have the 24 bits of the one between them, against ones. It is the last step: what comes after a large number is cut
// off beside it.
#pragma once
#include "ptx/number.cuh"
#include "ptx/warpgroup.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

/// The first half of the step's 16 columns, bfloat16 whatever the other operands are; the second half is zeros.
struct alignas(16) Terms {
  u16 bits[8];

  /// Of a number, or -inf.
  static Terms of(float x) {
    Terms terms{};
    float rest = x;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const bfloat16 part = from_float<bfloat16>(rest);
      terms.bits[i] = part.bits;
      rest = x == -kInfinity ? 0.0f : rest - to_float(part);
    }
    return terms;
  }
  static Terms ones() {
    Terms terms{};
    for (int i = 0; i < kParts; ++i) terms.bits[i] = from_float<bfloat16>(1).bits;
    return terms;
  }

 private:
  static constexpr int kParts = 3;
};

/// What is known of a key's bias.
template <bool kHasTerms>
struct BiasType {
  using type = float;
};
template <>
struct BiasType<true> {
  using type = Terms;
};

}  // namespace flash_dmattn::cuda
