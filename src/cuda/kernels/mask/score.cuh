// Scores as integers that rank keys. Host and device.
#pragma once
#include "types.cuh"

namespace flash_dmattn::cuda {

enum class ScoreType : int { float16, bfloat16, float32, float64 };

/// Bits: the number as it is in memory. Score: what ranks it, of a size that lists are made of.
template <ScoreType kType>
struct Ranking;
template <>
struct Ranking<ScoreType::float16> {
  using Bits = u16;
  using Score = u32;
  static constexpr Score kInfinity = 0x7c00;
};
template <>
struct Ranking<ScoreType::bfloat16> {
  using Bits = u16;
  using Score = u32;
  static constexpr Score kInfinity = 0x7f80;
};
template <>
struct Ranking<ScoreType::float32> {
  using Bits = u32;
  using Score = u32;
  static constexpr Score kInfinity = 0x7f800000;
};
template <>
struct Ranking<ScoreType::float64> {
  using Bits = u64;
  using Score = u64;
  static constexpr Score kInfinity = 0x7ff0000000000000;
};

/// The score of a key that does not exist, or is padding: below NaN, which is 1 and below all numbers.
constexpr int kNoKey = 0;

/// An integer that is larger where the number is; -0 is +0.
template <ScoreType kType>
constexpr typename Ranking<kType>::Score rank_of(typename Ranking<kType>::Bits number) {
  using Score = typename Ranking<kType>::Score;
  constexpr Score sign = Score{1} << (8 * sizeof(number) - 1);
  const Score bits = number, magnitude = bits & (sign - 1);
  if (magnitude > Ranking<kType>::kInfinity) return 1;
  if (magnitude == 0) return sign;
  return bits & sign ? sign - 1 - magnitude : bits | sign;
}

}  // namespace flash_dmattn::cuda
