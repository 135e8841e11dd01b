// The forward pass and the probabilities on emulated GPUs, against float64 loops: what is special about them.
// test_cuda_attention.cpp draws from all that a problem can be.
#include "check.h"
#include "emulator.h"
#include "flash_dmattn/cuda.h"
#include "flash_dmattn/cuda_kernels.h"
#include "mask/plan_bits.cuh"
#include "random_inputs.h"
#include "sm80/combine.cuh"
#include "sm80/forward.cuh"
#include "sm80/probabilities.cuh"

namespace flash_dmattn::cuda {
namespace {

// The instances that the tests below need.
#define FORWARD(...) EMULATE(Forward<ForwardOptions{__VA_ARGS__}>)
FORWARD(90, 8, Number::bfloat16, Test::interval, BiasKind::none, false, 128, false);
FORWARD(90, 8, Number::bfloat16, Test::interval, BiasKind::per_key, false, 128, false);
FORWARD(90, 8, Number::bfloat16, Test::interval, BiasKind::full, false, 128, false);
FORWARD(90, 8, Number::bfloat16, Test::interval, BiasKind::full, true, 128, false);
FORWARD(90, 8, Number::bfloat16, Test::bits, BiasKind::none, false, 128, false);
FORWARD(80, 72, Number::float16, Test::interval, BiasKind::per_key, true, 64, false);
FORWARD(90, 128, Number::bfloat16, Test::interval, BiasKind::per_key, false, 128, false);
FORWARD(90, 128, Number::bfloat16, Test::interval, BiasKind::per_key, false, 16, true);
FORWARD(90, 128, Number::bfloat16, Test::interval, BiasKind::per_key, false, 16, false);
FORWARD(80, 128, Number::float16, Test::interval, BiasKind::none, false, 128, false);
FORWARD(80, 128, Number::float16, Test::interval, BiasKind::per_key, false, 128, false);
FORWARD(86, 256, Number::float16, Test::interval, BiasKind::none, false, 64, false);
FORWARD(90, 256, Number::float16, Test::interval, BiasKind::none, false, 128, false);
EMULATE(Combine<CombineOptions{90, Number::bfloat16}>);
EMULATE(Probabilities<ProbabilitiesOptions{90, 8, Number::bfloat16, Test::interval, BiasKind::per_key, false}>);
EMULATE(ZeroMatrix);
EMULATE(PackMask);
EMULATE(BitLists);

using namespace test;

Inputs make_inputs(Random& random, const Sizes& n, DType dtype = DType::bfloat16) {
  return test::make_inputs(random, n, dtype, true);
}

struct Results {
  Tensor<4> out;
  Tensor<3> lse;
};

Results run(const Inputs& in, EmulatedStream& stream) {
  Results r{{in.query.dtype, in.query.size}, {DType::float32, {in.query.size[0], in.query.size[2], in.query.size[1]}}};
  set_family(Family::generic);
  forward(in.problem(), {r.out, r.lse}, stream);
  return r;
}

Results check_forward(const Inputs& in, int arch = 90, int multiprocessors = 1) {
  EmulatedStream stream(arch, multiprocessors);
  const Results got = run(in, stream);
  const test::Results expected = attention(in);
  const double tolerance = in.query.dtype == DType::float16 ? 4e-3 : 3e-2;
  const double off = difference(got.out, expected.out) / tolerance,
               lse_off = difference(got.lse, expected.lse) / (1e-3 * std::max(1.0, largest(expected.lse)));
  Context context("out is off by " + std::to_string(off) + " tolerances, lse by " + std::to_string(lse_off));
  CHECK(off <= 1);
  CHECK(lse_off <= 1);
  return got;
}

TEST(cuda_forward_of_spans) {
  Random random(1);
  for (const bool is_causal : {false, true})
    for (const Sizes& n : {Sizes{2, 200, 200, 2, 2, 8}, Sizes{1, 130, 77, 4, 2, 8}, Sizes{1, 150, 300, 6, 2, 8}})
      check_forward(make_inputs(random, n, DType::bfloat16, is_causal));
}

TEST(cuda_forward_of_head_dims_and_architectures) {
  Random random(2);
  Inputs wide = make_inputs(random, {1, 150, 150, 1, 1, 128}, DType::float16);
  check_forward(wide, 80);
  wide.bias = normal(random, DType::float32, {1, 1, 1, 150});
  check_forward(wide, 80);
  check_forward(make_inputs(random, {1, 70, 130, 2, 1, 256}, DType::float16), 90);
  check_forward(make_inputs(random, {1, 70, 130, 2, 1, 256}, DType::float16), 86);
  Inputs in = make_inputs(random, {1, 40, 100, 2, 2, 72}, DType::float16);
  in.softcap = 3;
  in.bias = normal(random, DType::float16, {1, 2, 1, 100});
  check_forward(in, 80);
}

// Every score of the first keys is lower than of those to come, and the other way around.
TEST(cuda_forward_follows_the_maximum) {
  Random random(3);
  for (const double slope : {0.5, -0.5, 0.05}) {
    Inputs in = make_inputs(random, {1, 200, 300, 2, 1, 8});
    in.bias.emplace(DType::float32, Index<4>{1, 1, 1, 300});
    in.bias->for_each([&](const Index<4>& i) { in.bias->set(i, slope * i[3]); });
    check_forward(in);
  }
}

TEST(cuda_forward_of_any_scale) {
  Random random(4);
  for (const double scale : {-0.7, 0.0, -0.0, 1e-40, 2.0}) {
    Context context("scale " + std::to_string(scale));
    Inputs in = make_inputs(random, {1, 140, 140, 2, 1, 8});
    in.scale = scale;
    check_forward(in);
    in.bias = normal(random, DType::bfloat16, {1, 1, 1, 140});
    check_forward(in);
    in.bias = normal(random, DType::float32, {1, 2, 140, 140});
    check_forward(in);
    in.softcap = 0.8;
    check_forward(in);
  }
}

TEST(cuda_forward_of_rows_that_see_nothing) {
  Random random(5);
  visit_rows_that_see_nothing(random, 8, 200, [](const Inputs& in) { check_forward(in); });
}

TEST(cuda_forward_of_huge_biases_is_finite) {
  Random random(6);
  for (const double huge : {3.4e38, -3.4e38, 1e37}) {
    Inputs in = make_inputs(random, {1, 130, 130, 1, 1, 8});
    in.bias = normal(random, DType::float32, {1, 1, 1, 130});
    in.bias->for_each([&](const Index<4>& i) {
      if (i[3] % 3 == 0 || huge < 0) in.bias->set(i, huge);
    });
    EmulatedStream stream(90, 1);
    const Results got = run(in, stream);
    CHECK(std::isfinite(difference(got.out, Tensor<4>(DType::float32, got.out.size).fill([] { return 0.0; }))));
  }
}

TEST(cuda_forward_of_dense_masks) {
  Random random(10);
  visit_dense_masks(random, 150, 8, [](const Inputs& in) { check_forward(in); });
}

// A few queries split their keys over the GPU; the number of parts depends on the GPU, and may be anything.
TEST(cuda_forward_in_parts) {
  Random random(7);
  for (const Sizes& n : {Sizes{1, 100, 200, 4, 2, 128}, Sizes{2, 1, 300, 4, 2, 128}, Sizes{1, 3, 1100, 4, 2, 128}}) {
    Inputs in = make_inputs(random, n);
    in.bias = normal(random, DType::float32, {1, n.Hk, 1, n.K});
    for (const int multiprocessors : {1, 3, 132}) {
      EmulatedStream stream(90, multiprocessors);
      if (n.Q > 3 && multiprocessors > 1) continue;
      check_forward(in, 90, multiprocessors);
      if (n.K != 300 || multiprocessors != 132) continue;
      // Parts of which some see nothing.
      in.bias->for_each([&](const Index<4>& i) {
        if (i[3] < 150) in.bias->set(i, -kInfinity);
      });
      check_forward(in, 90, multiprocessors);
      const Results a = run(in, stream), b = run(in, stream);
      CHECK(same_bits(a.out, b.out) && same_bits(a.lse, b.lse));
      CHECK(stream.launched()[1].rfind("Combine", 0) == 0);
    }
  }
}

// Beside a large reference the logarithm of a part's sum has no room for how many keys the part had.
TEST(cuda_forward_in_parts_of_unequal_length) {
  Random random(11);
  Inputs in = make_inputs(random, {1, 1, 1100, 4, 2, 128});
  in.bias = Tensor<4>(DType::float32, {1, 1, 1, 1100}).fill([] { return -1e30; });
  in.value.for_each([&](const Index<4>& i) { in.value.set(i, i[1] < 1088 ? 1 : 0); });
  EmulatedStream stream(90, 132);
  const Results got = run(in, stream);
  CHECK(stream.launched()[1].rfind("Combine", 0) == 0);
  CHECK(difference(got.out, Tensor<4>(DType::float32, got.out.size).fill([] { return 1088 / 1100.0; })) < 4e-3);
}

TEST(cuda_probabilities) {
  Random random(8);
  Inputs in = make_inputs(random, {2, 90, 150, 4, 2, 8});
  in.bias = normal(random, DType::bfloat16, {2, 1, 1, 150});
  in.bias->for_each([&](const Index<4>& i) {
    if (i[0] == 1 && i[3] < 70) in.bias->set(i, -kInfinity);
  });
  for (const Index<4>& order : {Index<4>{0, 1, 2, 3}, Index<4>{3, 0, 2, 1}}) {
    EmulatedStream stream(90, 1);
    const Results got = run(in, stream);
    Tensor<4> probs(DType::bfloat16, {2, 4, 90, 150}, order, 3);
    probabilities(in.problem(), got.lse, probs, stream);
    CHECK(difference(probs, attention(in).probs) < 1e-2);
  }
}

TEST(cuda_forward_refuses) {
  Random random(9);
  EmulatedStream stream(90, 1);
  CHECK_REFUSED(run(make_inputs(random, {1, 2, 2, 1, 1, 8}, DType::float32), stream), "query", "on a GPU");
}

}  // namespace
}  // namespace flash_dmattn::cuda
