// What the kernel that selects keys is told. Host and device.
#pragma once
#include "mask/score.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

/// (B, heads, Q, K), stride 0 where broadcast.
template <class T>
struct Pairs {
  T* data;
  i64 batch, head, query, key;

  constexpr T* row(i64 b, i64 h, i64 q) const { return data + b * batch + h * head + q * query; }
};

template <ScoreType kType>
struct SelectKeysParams {
  Pairs<const typename Ranking<kType>::Bits> score;
  Pairs<const unsigned char> visible;  // data null: every key
  Pairs<unsigned char> selected;
  i64 rows;  // B * heads * Q
  int heads, queries, keys, keep, is_causal;
  int in_shared;  // whether shared memory holds the scores of a row
};
constexpr int kSelectThreads = 256, kSelectWarps = kSelectThreads / 32;

struct SelectSums {
  int of_warp[2][kSelectWarps];
  int oldest;
};
/// The scores are read in words of 8 bytes.
constexpr i64 select_shared_bytes(i64 keys, int score_bytes) {
  return static_cast<i64>(round_up(sizeof(SelectSums), 8)) + (keys * score_bytes + 7) / 8 * 8;
}

}  // namespace flash_dmattn::cuda
