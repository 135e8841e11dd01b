// Hopper's own kernels on emulated GPUs, against float64 loops: what is special about them. test_cuda_attention.cpp
// draws from all that a problem can be.
#include <algorithm>

#include "check.h"
#include "emulator.h"
#include "flash_dmattn/cuda.h"
#include "flash_dmattn/cuda_kernels.h"
#include "mask/plan_bits.cuh"
#include "random_inputs.h"
#include "sm90/forward.cuh"

namespace flash_dmattn::cuda {
namespace {

#define FORWARD(...) EMULATE(HopperForward<HopperForwardOptions{__VA_ARGS__}>)
FORWARD(64, Number::bfloat16, Test::interval, BiasKind::none, false);
FORWARD(64, Number::bfloat16, Test::interval, BiasKind::per_key, false);
FORWARD(64, Number::bfloat16, Test::interval, BiasKind::full, false);
FORWARD(64, Number::bfloat16, Test::bits, BiasKind::none, false);
FORWARD(8, Number::float16, Test::interval, BiasKind::per_key, true);
FORWARD(96, Number::bfloat16, Test::interval, BiasKind::none, false);
FORWARD(128, Number::float16, Test::interval, BiasKind::per_key, false);
FORWARD(168, Number::bfloat16, Test::interval, BiasKind::none, false);
FORWARD(256, Number::float16, Test::interval, BiasKind::none, false);

using namespace test;

struct Results {
  Tensor<4> out;
  Tensor<3> lse;
};

bool is_hopper(const EmulatedStream& stream) {
  return std::any_of(stream.launched().begin(), stream.launched().end(),
                     [](const std::string& name) { return name.rfind("HopperForward", 0) == 0; });
}

Results run(const Inputs& in, EmulatedStream& stream) {
  Results r{{in.query.dtype, in.query.size}, {DType::float32, {in.query.size[0], in.query.size[2], in.query.size[1]}}};
  r.out.fill([] { return kNaN; });
  struct InFamily {
    InFamily() { set_family(Family::hopper); }
    ~InFamily() { set_family(Family::automatic); }
  } in_family;
  forward(in.problem(), {r.out, r.lse}, stream);
  CHECK_EQUAL(is_hopper(stream), in.scale >= 0);
  return r;
}

void check_forward(const Inputs& in, int multiprocessors = 1) {
  EmulatedStream stream(90, multiprocessors);
  const Results got = run(in, stream);
  const test::Results expected = attention(in);
  const double tolerance = in.query.dtype == DType::float16 ? 4e-3 : 3e-2;
  const double off = difference(got.out, expected.out) / tolerance,
               lse_off = difference(got.lse, expected.lse) / (1e-3 * std::max(1.0, largest(expected.lse)));
  Context context("out is off by " + std::to_string(off) + " tolerances, lse by " + std::to_string(lse_off));
  CHECK(off <= 1);
  CHECK(lse_off <= 1);
}

// Where it is not, kernels run that test_cuda_attention emulates.
TEST(hopper_forward_is_automatic_where_there_are_full_tiles_for_most_multiprocessors) {
  Random random(3);
  set_family(Family::automatic);
  const auto is_chosen = [&](const Sizes& n, int multiprocessors) {
    const Inputs in = test::make_inputs(random, n, DType::bfloat16, true);
    const Results r{{in.query.dtype, in.query.size}, {DType::float32, {n.B, n.H, n.Q}}};
    EmulatedStream stream(90, multiprocessors);
    forward(in.problem(), {r.out, r.lse}, stream);
    return is_hopper(stream);
  };
  const Sizes eight_tiles{1, 600, 600, 2, 2, 64};
  CHECK(is_chosen(eight_tiles, 13));
  CHECK(!is_chosen(eight_tiles, 14));
  CHECK(is_chosen({4, 96, 100, 2, 2, 64}, 13));
  CHECK(!is_chosen({4, 95, 100, 2, 2, 64}, 13));
}

// Blocks that take several tiles of rows, and tiles of rows that take several rounds of the stages.
TEST(hopper_forward_of_spans) {
  Random random(1);
  for (const bool is_causal : {false, true})
    for (const Sizes& n : {Sizes{2, 200, 200, 2, 2, 64}, Sizes{1, 130, 77, 4, 2, 64}, Sizes{1, 450, 900, 6, 2, 64}})
      for (const int multiprocessors : {1, 2, 40})
        check_forward(test::make_inputs(random, n, DType::bfloat16, is_causal), multiprocessors);
}

// Query heads that do not divide the rows of a tile, and queries that count as zeros.
TEST(hopper_forward_of_rows_to_spare) {
  Random random(4);
  for (const double scale : {0.1, 0.0})
    for (const Sizes& n : {Sizes{1, 130, 77, 5, 1, 64}, Sizes{2, 70, 333, 14, 2, 64}, Sizes{1, 3, 200, 100, 1, 64}}) {
      Inputs in = test::make_inputs(random, n, DType::bfloat16, true);
      in.scale = scale;
      check_forward(in);
    }
}

TEST(hopper_forward_of_expanded_rows) {
  Random random(6);
  for (const int dimension : {0, 1, 2})
    for (const bool is_causal : {false, true}) {
      Inputs in = test::make_inputs(random, {2, 200, 200, 4, 2, 64}, DType::bfloat16, is_causal);
      const auto expand = [&](Tensor<4>& t) {
        Index<4> size = t.size;
        size[dimension] = 1;
        t = normal(random, DType::bfloat16, size).expand(dimension, t.size[dimension]);
      };
      expand(in.query);
      check_forward(in);
      expand(in.key);
      check_forward(in);
      expand(in.value);
      check_forward(in);
    }
}

TEST(hopper_forward_of_head_dims) {
  Random random(2);
  for (const std::int64_t D : {5, 90, 96, 128, 168, 250}) {
    const bool is_float16 = D == 5 || D == 128 || D == 250;
    Inputs in = test::make_inputs(random, {1, 210, 300, 2, 1, D}, is_float16 ? DType::float16 : DType::bfloat16, true);
    if (D == 5) in.softcap = 3;
    if (D == 5 || D == 128) in.bias = normal(random, DType::float16, {1, 2, 1, 300});
    Context context("head dim " + std::to_string(D));
    check_forward(in);
  }
}

TEST(hopper_forward_follows_the_maximum) {
  Random random(3);
  for (const double slope : {0.5, -0.5, 0.05}) {
    Inputs in = test::make_inputs(random, {1, 200, 500, 2, 1, 64}, DType::bfloat16, true);
    in.bias.emplace(DType::float32, Index<4>{1, 1, 1, 500});
    in.bias->for_each([&](const Index<4>& i) { in.bias->set(i, slope * i[3]); });
    check_forward(in);
  }
}

TEST(hopper_forward_of_biases_of_any_size) {
  Random random(13);
  for (const double size : {1e4, 1e10, 1e37, 3.4e38}) {
    Inputs in = test::make_inputs(random, {1, 200, 300, 2, 1, 128}, DType::float16, true);
    in.bias.emplace(DType::float32, Index<4>{1, 1, 1, 300});
    in.bias->for_each([&](const Index<4>& i) {
      in.bias->set(i, i[3] % 7 == 6 ? -INFINITY : (i[3] % 3 - 2) * size + random.normal());
    });
    check_forward(in);
  }
}

TEST(hopper_forward_of_rows_that_see_nothing) {
  Random random(5);
  // So many queries that whole tiles of rows see no key.
  visit_rows_that_see_nothing(random, 64, 500, [](const Inputs& in) { check_forward(in); });
}

TEST(hopper_forward_of_dense_masks) {
  Random random(10);
  visit_dense_masks(random, 250, 64, [](const Inputs& in) { check_forward(in); });
}

TEST(hopper_forward_of_full_biases) {
  Random random(11);
  for (const std::int64_t K : {300, 301}) {
    Inputs in = test::make_inputs(random, {1, 250, K, 4, 2, 64}, DType::bfloat16, false);
    in.bias = normal(random, DType::bfloat16, {1, 4, 250, K});
    check_forward(in);
    in.is_causal = true;
    check_forward(in);
  }
}

TEST(hopper_forward_leaves_negative_scales_to_the_generic_one) {
  Random random(12);
  Inputs in = test::make_inputs(random, {1, 250, 250, 1, 1, 64}, DType::bfloat16, false);
  for (const double scale : {0.0, 1e-40, -0.2}) {
    in.scale = scale;
    check_forward(in);
  }
}

}  // namespace
}  // namespace flash_dmattn::cuda
