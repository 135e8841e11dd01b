// Random tensors that several tests draw.
#pragma once
#include <cmath>
#include <functional>

#include "reference.h"

namespace flash_dmattn::test {

struct Sizes {
  std::int64_t B = 1, Q = 1, K = 1, H = 1, Hk = 1, D = 8;
};

inline Tensor<4> normal(Random& random, DType dtype, Index<4> size, Index<4> order = {0, 1, 2, 3},
                        std::int64_t gap = 0) {
  Tensor<4> t(dtype, size, order, gap);
  return t.fill([&] { return random.normal(); });
}

inline Inputs make_inputs(Random& random, const Sizes& n, DType dtype, bool is_causal) {
  Inputs in;
  in.query = normal(random, dtype, {n.B, n.Q, n.H, n.D});
  in.key = normal(random, dtype, {n.B, n.K, n.Hk, n.D});
  in.value = normal(random, dtype, {n.B, n.K, n.Hk, n.D});
  in.scale = 1 / std::sqrt(static_cast<double>(n.D));
  in.is_causal = is_causal;
  return in;
}

/// Scores of keys, one after the other. Kinds: distinct, with ties, all equal, rising, falling, with infinities and
/// NaN.
constexpr int kScoreKinds = 6;
inline std::function<double()> scores(Random& random, int kind) {
  return [&random, kind, step = 0.0]() mutable -> double {
    switch (kind) {
      case 0:
        return random.normal();
      case 1:
        return std::round(random.normal());
      case 2:
        return 0;
      case 3:
        return ++step;
      case 4:
        return --step;
      default:
        return random.chance(0.2) ? random.pick({kNaN, kInfinity, -kInfinity, -0.0, 0.0}) : random.normal();
    }
  };
}

}  // namespace flash_dmattn::test
