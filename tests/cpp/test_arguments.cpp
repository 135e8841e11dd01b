// What the engine refuses: each message begins with the argument's name and says what it got and what it takes.
#include "check.h"
#include "flash_dmattn/attention.h"
#include "flash_dmattn/dynamic_mask.h"
#include "reference.h"

namespace flash_dmattn::test {
namespace {

const Threads kThreads{.count = 1, .run = {}};
using F = Tensor<4>;
constexpr DType kFloat = DType::float32;

Inputs good() {
  Inputs in{F(kFloat, {2, 5, 4, 8}), F(kFloat, {2, 7, 2, 8}), F(kFloat, {2, 7, 2, 8}), {}, {}, {}};
  for (Tensor<4>* t : {&in.query, &in.key, &in.value}) t->fill([] { return 0.25; });
  return in;
}

/// The problem of `change` applied to a good one is refused.
#define CHECK_PROBLEM_REFUSED(change, argument, part)            \
  do {                                                           \
    Inputs in = good();                                          \
    change;                                                      \
    CHECK_REFUSED(Plan(in.problem(), kThreads), argument, part); \
  } while (false)

TEST(problem) {
  CHECK_PROBLEM_REFUSED(in.query = F(DType::int32, in.query.size), "query", "int32");
  CHECK_PROBLEM_REFUSED(in.query = F(kFloat, {2, 5, 4, 257}), "query", "257");
  CHECK_PROBLEM_REFUSED(in.query = F(kFloat, {2, 5, 4, 0}), "query", "0");
  CHECK_PROBLEM_REFUSED(in.query = F(kFloat, {2, 5, 0, 8}), "query", "0");
  CHECK_PROBLEM_REFUSED(in.query = F(kFloat, in.query.size, {0, 1, 3, 2}), "query", "stride 4");
  CHECK_PROBLEM_REFUSED(in.query.data = nullptr, "query", "no data");
  CHECK_PROBLEM_REFUSED(in.query.size[1] = -1, "query", "-1");
  CHECK_PROBLEM_REFUSED(in.key = F(DType::bfloat16, in.key.size), "key", "bfloat16, takes float32");
  CHECK_PROBLEM_REFUSED(in.key = F(kFloat, {2, 7, 3, 8}), "key", "3");
  CHECK_PROBLEM_REFUSED(in.key = F(kFloat, {2, 7, 2, 9}), "key", "(2, 7, 2, 9), takes (2, 7, 2, 8)");
  CHECK_PROBLEM_REFUSED(in.key = F(kFloat, {3, 7, 2, 8}), "key", "(3, 7, 2, 8), takes (2, 7, 2, 8)");
  CHECK_PROBLEM_REFUSED(in.key = F(kFloat, in.key.size, {0, 1, 3, 2}), "key", "stride 2");
  CHECK_PROBLEM_REFUSED(in.value = F(kFloat, {2, 6, 2, 8}), "value", "(2, 6, 2, 8), takes (2, 7, 2, 8)");
  CHECK_PROBLEM_REFUSED(in.value = F(DType::float64, in.value.size), "value", "float64, takes float32");
  CHECK_PROBLEM_REFUSED(in.value = F(kFloat, in.value.size, {0, 1, 3, 2}), "value", "stride 2");
  CHECK_PROBLEM_REFUSED(in.mask = F(kFloat, {2, 4, 5, 7}), "mask", "float32, takes bool");
  CHECK_PROBLEM_REFUSED(in.mask = F(DType::boolean, {2, 3, 5, 7}), "mask", "(2, 3, 5, 7), takes");
  CHECK_PROBLEM_REFUSED(in.mask = F(DType::boolean, {2, 4, 2, 7}), "mask", "(2, 4, 2, 7), takes");
  CHECK_PROBLEM_REFUSED(in.bias = F(DType::bfloat16, {2, 4, 5, 7}), "bias", "bfloat16, takes float32");
  CHECK_PROBLEM_REFUSED(in.bias = F(kFloat, {2, 4, 5, 6}), "bias", "(2, 4, 5, 6), takes");
  CHECK_PROBLEM_REFUSED(in.end = Tensor<3>(kFloat, {2, 2, 7}), "end", "float32, takes int32");
  CHECK_PROBLEM_REFUSED(in.end = Tensor<3>(DType::int32, {2, 2, 1}), "end", "(2, 2, 1), takes");
  CHECK_PROBLEM_REFUSED(in.scale = kNaN, "scale", "nan");
  CHECK_PROBLEM_REFUSED(in.softcap = -1, "softcap", "-1");
  CHECK_PROBLEM_REFUSED(in.softcap = kInfinity, "softcap", "inf");
}

TEST(outputs_and_gradients) {
  const Inputs in = good();
  const Problem problem = in.problem();
  const Plan plan(problem, kThreads);
  const F out(kFloat, in.query.size);
  const Tensor<3> lse(kFloat, {2, 4, 5});
  CHECK_REFUSED(forward(problem, plan, {F(DType::float64, in.query.size), lse}, kThreads), "out", "takes float32");
  CHECK_REFUSED(forward(problem, plan, {F(kFloat, {2, 5, 4, 9}), lse}, kThreads), "out", "takes (2, 5, 4, 8)");
  CHECK_REFUSED(forward(problem, plan, {out, Tensor<3>(kFloat, {2, 5, 4})}, kThreads), "lse", "takes (2, 4, 5)");
  CHECK_REFUSED(probabilities(problem, plan, lse, F(kFloat, {2, 4, 7, 5}), kThreads), "probs", "takes (2, 4, 5, 7)");

  const F grad_query(kFloat, in.query.size), grad_key(kFloat, in.key.size), grad_value(kFloat, in.value.size);
  const auto run = [&](const F& grad_out, const F& query, const F& key, const F& value,
                       const std::optional<View<4>>& bias) {
    backward(problem, plan, {out, lse}, {grad_out, {}}, {query, key, value, bias}, kThreads);
  };
  CHECK_REFUSED(run(F(kFloat, {2, 5, 4, 9}), grad_query, grad_key, grad_value, {}), "grad_out", "takes (2, 5, 4, 8)");
  CHECK_REFUSED(run(out, F(DType::float16, in.query.size), grad_key, grad_value, {}), "grad_query", "takes float32");
  CHECK_REFUSED(run(out, grad_query, grad_query, grad_value, {}), "grad_key", "takes (2, 7, 2, 8)");
  CHECK_REFUSED(run(out, grad_query, grad_key, F(kFloat, in.value.size, {0, 1, 3, 2}), {}), "grad_value", "stride 2");
  CHECK_REFUSED(run(out, grad_query, grad_key, grad_value, F(kFloat, {1, 1, 1, 7})), "grad_bias", "no bias");
}

TEST(dynamic_mask) {
  const Tensor<3> score = Tensor<3>(kFloat, {2, 2, 7}).fill([] { return 0; });
  const Tensor<3> end(DType::int32, score.size);
  const auto run = [&](const DynamicMask& mask, const View<3>& e, const std::optional<View<3>>& threshold = {}) {
    make_dynamic_mask(mask, e, threshold, kThreads);
  };
  CHECK_REFUSED(run({end, {}, 3, 7, true}, end), "score", "int32");
  CHECK_REFUSED(run({score, {}, 0, 7, true}, end), "keep_window_size", "0");
  CHECK_REFUSED(run({score, {}, 3, -1, true}, end), "query_len", "-1");
  CHECK_REFUSED(run({score, Tensor<2>(DType::boolean, {2, 6}), 3, 7, true}, end), "key_padding_mask", "(2, 6)");
  CHECK_REFUSED(run({score, Tensor<2>(kFloat, {2, 7}), 3, 7, true}, end), "key_padding_mask", "float32");
  CHECK_REFUSED(run({score, {}, 3, 7, true}, score), "end", "takes int32");
  CHECK_REFUSED(run({score, {}, 3, 7, true}, Tensor<3>(DType::int32, {2, 1, 7})), "end", "takes (2, 2, 7)");
  CHECK_REFUSED(run({score, {}, 3, 7, false}, end, end), "threshold", "causal");
}

TEST(selection) {
  const F score = F(kFloat, {2, 2, 5, 7}).fill([] { return 0; });
  const F selected(DType::boolean, score.size);
  CHECK_REFUSED(select_keys(selected, {}, 3, true, selected, kThreads), "score", "bool");
  CHECK_REFUSED(select_keys(F(kFloat, {2, 2, 4, 7}), {}, 3, true, selected, kThreads), "score", "(2, 2, 4, 7)");
  CHECK_REFUSED(select_keys(score, score, 3, true, selected, kThreads), "visible", "takes bool");
  CHECK_REFUSED(select_keys(score, {}, 0, true, selected, kThreads), "keep_window_size", "0");
  CHECK_REFUSED(select_keys(score, {}, 3, true, score, kThreads), "selected", "takes bool");
}

}  // namespace
}  // namespace flash_dmattn::test
