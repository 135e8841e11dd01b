// What kernels need to know to compute scores.
#pragma once
#include "plan.cuh"
#include "problem.cuh"

namespace flash_dmattn::cuda {

/// A logit in base 2 is  factor * (query . key + bias_factor * bias),  or with softcap
/// cap * tanh(query . key / …) + bias_factor * bias.
struct Logits {
  float factor;       ///< from what the softmax is given to logits in base 2; positive
  float bias_factor;  ///< what a bias is multiplied by before it is added
  float cap, inner;   ///< softcap * log2(e); 2 log2(e) scale / softcap
  int sign;           ///< of the queries: -1, 0 or 1 (with softcap always 1)
};

/// The largest magnitude that a finite bias may add: the sum stays finite.
constexpr float kLargestBias = 1e38f;

/// An order of columns in which a thread's four of two neighbouring 16 x 8 blocks stand together.
constexpr int place_of_column(int column) {
  return column / 16 * 16 + column % 8 / 2 * 4 + column / 8 % 2 * 2 + column % 2;
}

struct ScoresParams {
  Shape shape;
  Rows query, key;
  Bias bias;
  Plan plan;
  Logits logits;
};

}  // namespace flash_dmattn::cuda
