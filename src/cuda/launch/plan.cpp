#include "cuda/launch/plan.h"

#include <algorithm>

#include "core/shape.h"

namespace flash_dmattn::cuda {
namespace {

/// Whether query heads of one KV head have values of their own in a mask, end or bias.
template <int Rank>
bool is_per_query_head(const std::optional<View<Rank>>& view, const flash_dmattn::Shape& s) {
  return view && s.heads != s.kv_heads && without_expand(*view).size[1] == s.heads;
}

/// What the mask is, once an expand is undone: at most one of a value for each key, for each query, for each pair.
struct Masks {
  std::optional<View<4>> columns, rows, dense;

  explicit Masks(const Problem& problem) {
    if (!problem.mask) return;
    const View<4> mask = without_expand(*problem.mask);
    (mask.size[2] == 1 ? columns : mask.size[3] == 1 ? rows : dense) = mask;
  }
};

}  // namespace

Shape make_shape(const Problem& problem, int rows) {
  const flash_dmattn::Shape s(problem);
  const bool alone = is_per_query_head(problem.mask, s) || is_per_query_head(problem.end, s) ||
                     (bias_kind(problem) == BiasKind::per_key && is_per_query_head(problem.bias, s));
  int pack = alone ? 1 : static_cast<int>(std::min<std::int64_t>(s.group(), rows));
  while (s.group() % pack != 0) --pack;
  return {.batch = static_cast<int>(s.batch),
          .query_len = static_cast<int>(s.query_len),
          .key_len = static_cast<int>(s.key_len),
          .heads = static_cast<int>(s.heads),
          .kv_heads = static_cast<int>(s.kv_heads),
          .head_dim = static_cast<int>(s.head_dim),
          .pack = pack};
}

BiasKind bias_kind(const Problem& problem) {
  if (!problem.bias) return BiasKind::none;
  return without_expand(*problem.bias).size[2] == 1 ? BiasKind::per_key : BiasKind::full;
}

Bias make_bias(const Problem& problem) {
  const flash_dmattn::Shape s(problem);
  const View<4> bias = without_expand(*problem.bias);
  return {.data = bias.data,
          .batch = bias.stride[0],
          .head = bias.stride[1],
          .query = bias.stride[2],
          .key = bias.stride[3],
          .heads_per_head = static_cast<int>(s.heads / std::max<std::int64_t>(bias.size[1], 1)),
          .is_float32 = bias.dtype == DType::float32};
}

Test test_of(const Problem& problem) { return Masks(problem).dense ? Test::bits : Test::interval; }

MadePlan make_plan(const Problem& problem, const Shape& shape, int run, Stream&) {
  Plan plan{};
  plan.run = run;
  plan.runs = divide_up(shape.query_len, run);
  plan.is_causal = problem.is_causal;
  return {plan, shape.key_len};
}

}  // namespace flash_dmattn::cuda
