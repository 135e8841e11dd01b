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

/// check(inputs) for problems in which some or all rows see no key.
template <class Check>
void visit_rows_that_see_nothing(Random& random, std::int64_t head_dim, std::int64_t many_queries, const Check& check) {
  Inputs in = make_inputs(random, {1, 140, 140, 2, 1, head_dim}, DType::bfloat16, true);
  // All keys of the first queries are masked by the bias; later ones by half.
  in.bias = normal(random, DType::float32, {1, 1, 1, 140});
  in.bias->for_each([&](const Index<4>& i) {
    if (i[3] < 20 || i[3] % 2 == 0) in.bias->set(i, -kInfinity);
  });
  check(in);
  in.bias->fill([] { return -kInfinity; });
  check(in);
  in.bias.reset();
  in.mask.emplace(DType::boolean, Index<4>{1, 1, 140, 1});
  in.mask->fill([&] { return random.chance(0.7); });
  check(in);
  // More queries than keys.
  check(make_inputs(random, {1, many_queries, 30, 2, 1, head_dim}, DType::bfloat16, true));
  check(make_inputs(random, {1, 70, 0, 2, 1, head_dim}, DType::bfloat16, true));
}

/// check(inputs) where heads share a dense mask by ones, twos and threes: the bits of a warp's rows begin anywhere in a
/// word.
template <class Check>
void visit_dense_masks(Random& random, std::int64_t query_len, std::int64_t head_dim, const Check& check) {
  for (const std::int64_t group : {1, 2, 3}) {
    const Sizes n{1, query_len, query_len + 20, 2 * group, 2, head_dim};
    Inputs in = make_inputs(random, n, DType::bfloat16, true);
    in.mask.emplace(DType::boolean, Index<4>{1, 2, n.Q, n.K});
    in.mask->fill([&] { return random.chance(0.4); });
    check(in);
  }
}

}  // namespace flash_dmattn::test
