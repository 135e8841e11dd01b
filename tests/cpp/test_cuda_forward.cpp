// The forward pass and the probabilities on emulated GPUs, against float64 loops.
#include "check.h"
#include "emulator.h"
#include "flash_dmattn/cuda.h"
#include "reference.h"
#include "sm80/combine.cuh"
#include "sm80/forward.cuh"

namespace flash_dmattn::cuda {
namespace {

// The instances that the tests below need.
#define FORWARD(...) EMULATE(Forward<ForwardOptions{__VA_ARGS__}>)
FORWARD(90, 8, Number::bfloat16, Test::interval, BiasKind::none, false, 128, false);
FORWARD(90, 128, Number::bfloat16, Test::interval, BiasKind::per_key, false, 128, false);
FORWARD(90, 128, Number::bfloat16, Test::interval, BiasKind::per_key, false, 16, true);
EMULATE(Combine<CombineOptions{90, Number::bfloat16}>);

using namespace test;

struct Sizes {
  std::int64_t B = 1, Q = 1, K = 1, H = 1, Hk = 1, D = 8;
};

Tensor<4> normal(Random& random, DType dtype, Index<4> size) {
  return Tensor<4>(dtype, size).fill([&] { return random.normal(); });
}

Inputs make_inputs(Random& random, const Sizes& n, DType dtype, bool is_causal) {
  Inputs in;
  in.query = normal(random, dtype, {n.B, n.Q, n.H, n.D});
  in.key = normal(random, dtype, {n.B, n.K, n.Hk, n.D});
  in.value = normal(random, dtype, {n.B, n.K, n.Hk, n.D});
  in.scale = 1 / std::sqrt(static_cast<double>(n.D));
  in.is_causal = is_causal;
  return in;
}

void check_forward(const Inputs& in, int arch = 90) {
  const DType dtype = in.query.dtype;
  Tensor<4> out(dtype, in.query.size);
  Tensor<3> lse(DType::float32, {in.query.size[0], in.query.size[2], in.query.size[1]});
  EmulatedStream stream(arch);
  forward(in.problem(), {out, lse}, stream);
  const Results expected = attention(in);
  const double tolerance = dtype == DType::float16 ? 4e-3 : 3e-2;
  const double off = difference(out, expected.out) / tolerance,
               lse_off = difference(lse, expected.lse) / (1e-3 * std::max(1.0, largest(expected.lse)));
  Context context("out is off by " + std::to_string(off) + " tolerances, lse by " + std::to_string(lse_off));
  CHECK(off <= 1);
  CHECK(lse_off <= 1);
}

TEST(cuda_forward_of_spans) {
  Random random(1);
  for (const bool is_causal : {false, true})
    for (const Sizes& n : {Sizes{2, 200, 200, 2, 2, 8}, Sizes{1, 130, 77, 4, 2, 8}, Sizes{1, 150, 300, 6, 2, 8}})
      check_forward(make_inputs(random, n, DType::bfloat16, is_causal));
}

TEST(cuda_forward_with_a_bias_of_keys) {
  Random random(2);
  for (const Sizes& n : {Sizes{1, 100, 200, 4, 2, 128}, Sizes{2, 1, 300, 4, 2, 128}}) {
    Inputs in = make_inputs(random, n, DType::bfloat16, true);
    in.bias = normal(random, DType::float32, {1, n.Hk, 1, n.K});
    check_forward(in);
  }
}

}  // namespace
}  // namespace flash_dmattn::cuda
