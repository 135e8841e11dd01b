// The backward pass on emulated GPUs, against float64 loops.
#include <algorithm>

#include "attention/backward_rows.cuh"
#include "check.h"
#include "emulator.h"
#include "flash_dmattn/cuda.h"
#include "flash_dmattn/cuda_kernels.h"
#include "layout/copy_rows.cuh"
#include "layout/repeat.cuh"
#include "mask/plan_bits.cuh"
#include "mask/plan_columns.cuh"
#include "mask/plan_survivors.cuh"
#include "random_inputs.h"
#include "sm80/backward.cuh"
#include "sm90/backward.cuh"

namespace flash_dmattn::cuda {
namespace {

// The instances that the tests below need.
#define BACKWARD(...) EMULATE(Backward<BackwardOptions{__VA_ARGS__}>)
BACKWARD(90, 8, Number::bfloat16, Test::interval, BiasKind::none, false, false);
BACKWARD(90, 128, Number::bfloat16, Test::interval, BiasKind::per_key, false, false);
BACKWARD(90, 128, Number::bfloat16, Test::interval, BiasKind::per_key, false, true);
BACKWARD(86, 72, Number::float16, Test::bits, BiasKind::full, true, false);
BACKWARD(80, 72, Number::float16, Test::bits, BiasKind::full, false, true);
BACKWARD(90, 256, Number::bfloat16, Test::interval, BiasKind::per_key, false, false);
BACKWARD(80, 144, Number::bfloat16, Test::interval, BiasKind::none, false, true);
#define HOPPER_BACKWARD(...) EMULATE(HopperBackward<BackwardOptions{__VA_ARGS__}>)
HOPPER_BACKWARD(90, 128, Number::bfloat16, Test::interval, BiasKind::none, false, false);
HOPPER_BACKWARD(90, 128, Number::bfloat16, Test::interval, BiasKind::per_key, false, false);
HOPPER_BACKWARD(90, 128, Number::bfloat16, Test::interval, BiasKind::per_key, false, true);
HOPPER_BACKWARD(90, 72, Number::float16, Test::bits, BiasKind::per_key, true, false);
HOPPER_BACKWARD(90, 72, Number::float16, Test::bits, BiasKind::per_key, true, true);
HOPPER_BACKWARD(90, 64, Number::bfloat16, Test::interval, BiasKind::none, false, false);
HOPPER_BACKWARD(90, 64, Number::bfloat16, Test::interval, BiasKind::per_key, false, false);
HOPPER_BACKWARD(90, 64, Number::bfloat16, Test::interval, BiasKind::per_key, false, true);
HOPPER_BACKWARD(90, 96, Number::float16, Test::bits, BiasKind::full, false, false);
HOPPER_BACKWARD(90, 96, Number::float16, Test::bits, BiasKind::full, false, true);
HOPPER_BACKWARD(90, 40, Number::float16, Test::bits, BiasKind::full, false, false);
HOPPER_BACKWARD(90, 40, Number::float16, Test::bits, BiasKind::full, true, true);
HOPPER_BACKWARD(90, 96, Number::float16, Test::bits, BiasKind::full, true, false);
HOPPER_BACKWARD(90, 96, Number::float16, Test::bits, BiasKind::full, true, true);
HOPPER_BACKWARD(90, 256, Number::bfloat16, Test::interval, BiasKind::per_key, false, false);
HOPPER_BACKWARD(90, 256, Number::bfloat16, Test::interval, BiasKind::per_key, false, true);
HOPPER_BACKWARD(90, 192, Number::bfloat16, Test::interval, BiasKind::none, true, false);
HOPPER_BACKWARD(90, 136, Number::bfloat16, Test::interval, BiasKind::none, false, true);
EMULATE(WriteGradients<GradientOptions{90, 40, Number::float16, 64}>);
EMULATE(WriteGradients<GradientOptions{90, 256, Number::bfloat16, 64}>);
EMULATE(WriteGradients<GradientOptions{90, 192, Number::bfloat16, 64}>);
EMULATE(WriteGradients<GradientOptions{90, 136, Number::bfloat16, 64}>);
EMULATE(WriteGradients<GradientOptions{90, 64, Number::bfloat16, 128}>);
EMULATE(WriteGradients<GradientOptions{90, 96, Number::float16, 64}>);
EMULATE(WriteGradients<GradientOptions{90, 128, Number::bfloat16, 64}>);
EMULATE(WriteGradients<GradientOptions{90, 72, Number::float16, 64}>);
EMULATE(BackwardRows<Number::float16>);
EMULATE(BackwardRows<Number::bfloat16>);
EMULATE(WriteGradients<GradientOptions{90, 8, Number::bfloat16, 0}>);
EMULATE(WriteGradients<GradientOptions{90, 128, Number::bfloat16, 0}>);
EMULATE(WriteGradients<GradientOptions{86, 72, Number::float16, 0}>);
EMULATE(WriteGradients<GradientOptions{80, 72, Number::float16, 0}>);
EMULATE(WriteGradients<GradientOptions{90, 256, Number::bfloat16, 0}>);
EMULATE(WriteGradients<GradientOptions{80, 144, Number::bfloat16, 0}>);
EMULATE(WriteRowBiasGradient<Number::bfloat16>);
EMULATE(WriteRowBiasGradient<Number::float16>);
EMULATE(CopyRows);
EMULATE(PackMask);
EMULATE(BitLists);
EMULATE(ColumnLists);

using namespace test;

Tensor<3> dynamic_end(const Tensor<3>& score, std::int64_t keep_window_size, std::int64_t query_len) {
  Tensor<3> end(DType::int32, score.size);
  flash_dmattn::make_dynamic_mask({score, {}, keep_window_size, query_len, true}, end, {}, {.count = 1, .run = {}});
  return end;
}

/// The family of kernels that calls in its scope take; elsewhere they are the generic ones.
Family current_family = Family::generic;
struct InFamily {
  explicit InFamily(Family family) { current_family = family; }
  ~InFamily() { current_family = Family::generic; }
};

/// The forward pass is that of the float64 loops, rounded.
struct Saved {
  Tensor<4> out, grad_out;
  Tensor<3> lse;
  std::optional<Tensor<3>> grad_lse;

  Saved(const Inputs& in, Random& random, bool with_grad_lse)
      : out(in.query.dtype, in.query.size),
        grad_out(normal(random, in.query.dtype, in.query.size)),
        lse(DType::float32, {in.query.size[0], in.query.size[2], in.query.size[1]}) {
    const Results results = attention(in);
    out.for_each([&](const Index<4>& i) { out.set(i, results.out.at(i)); });
    lse.for_each([&](const Index<3>& i) { lse.set(i, results.lse.at(i)); });
    if (with_grad_lse) grad_lse = Tensor<3>(DType::float32, lse.size).fill([&] { return random.normal(); });
  }
};

Gradients run(const Inputs& in, const Saved& saved, bool deterministic, EmulatedStream& stream) {
  set_family(current_family);
  Gradients g{{in.query.dtype, in.query.size}, {in.key.dtype, in.key.size}, {in.value.dtype, in.value.size}, {}};
  if (in.bias) g.bias = Tensor<4>(in.bias->dtype, in.bias->size);
  backward(in.problem(), {saved.out, saved.lse}, {saved.grad_out, saved.grad_lse}, {g.query, g.key, g.value, g.bias},
           deterministic, stream);
  return g;
}

void check_backward(const Inputs& in, Random& random, int arch = 90, bool deterministic = false,
                    bool with_grad_lse = false) {
  const Saved saved(in, random, with_grad_lse);
  EmulatedStream stream(arch);
  const Gradients got = run(in, saved, deterministic, stream);
  const auto is_hopper = [](const std::string& name) { return name.rfind("HopperBackward", 0) == 0; };
  CHECK_EQUAL(std::any_of(stream.launched().begin(), stream.launched().end(), is_hopper),
              current_family == Family::hopper);
  const auto [gradient, magnitude] = attention_gradient(in, saved.grad_out, saved.grad_lse);
  const auto close = [&](const char* what, const auto& g, const auto& e, double scale) {
    const double off = difference(g, e) / (scale * (in.query.dtype == DType::float16 ? 4e-3 : 3e-2));
    Context context(std::string(what) + " is off by " + std::to_string(off) + " tolerances");
    CHECK(off <= 1);
  };
  close("grad_query", got.query, gradient.query, largest(magnitude.query));
  close("grad_key", got.key, gradient.key, largest(magnitude.key));
  close("grad_value", got.value, gradient.value, largest(magnitude.value));
  if (in.bias) close("grad_bias", *got.bias, *gradient.bias, largest(*magnitude.bias));
  if (!deterministic) return;
  for (unsigned seed : {2u, 3u}) {
    EmulatedStream other(arch, 5);
    other.seed(seed);
    const Gradients again = run(in, saved, deterministic, other);
    CHECK(same_bits(got.query, again.query) && same_bits(got.key, again.key) && same_bits(got.value, again.value));
    if (in.bias) CHECK(same_bits(*got.bias, *again.bias));
  }
}

TEST(cuda_backward_of_spans) {
  Random random(1);
  for (const bool is_causal : {false, true})
    for (const Sizes& n : {Sizes{2, 200, 200, 2, 2, 8}, Sizes{1, 130, 77, 6, 2, 8}, Sizes{1, 140, 300, 2, 1, 5}})
      check_backward(make_inputs(random, n, DType::bfloat16, is_causal), random, 90, false, is_causal);
}

TEST(cuda_backward_with_a_bias_of_keys) {
  Random random(2);
  for (const bool deterministic : {false, true})
    for (const auto& size :
         {Index<4>{1, 2, 1, 150}, Index<4>{2, 4, 1, 150}, Index<4>{1, 1, 1, 150}, Index<4>{2, 1, 1, 1}}) {
      const Sizes n{2, 40, 150, 4, 2, 128};
      Inputs in = make_inputs(random, n, DType::bfloat16, true);
      in.bias = normal(random, size[1] == 2 ? DType::bfloat16 : DType::float32, size);
      in.bias->set({0, 0, 0, 17}, -kInfinity);
      check_backward(in, random, 90, deterministic, size[1] == 1);
    }
}

TEST(cuda_backward_of_a_dynamic_mask) {
  Random random(3);
  for (const Family family : {Family::generic, Family::hopper})
    for (const bool deterministic : {false, true}) {
      const InFamily in_family(family);
      const Sizes n{1, 560, 560, 2, 1, 128};  // two runs
      Inputs in = make_inputs(random, n, DType::bfloat16, true);
      Tensor<3> score(DType::float32, {1, 1, n.K});
      in.end = dynamic_end(score.fill([&] { return random.normal(); }), 60, n.Q);
      in.bias = normal(random, DType::float32, {1, 1, 1, n.K});
      check_backward(in, random, 90, deterministic);
    }
}

TEST(cuda_backward_with_a_full_bias) {
  Random random(4);
  for (const auto& size : {Index<4>{2, 4, 40, 140}, Index<4>{1, 2, 40, 140}, Index<4>{2, 1, 40, 140},
                           Index<4>{1, 1, 40, 140}, Index<4>{1, 4, 40, 1}})
    for (const bool deterministic : {false, true}) {
      Context context("bias of " + std::to_string(size[0]) + " x " + std::to_string(size[1]));
      const Sizes n{2, 40, 140, 4, 2, 72};
      Inputs in = make_inputs(random, n, DType::float16, true);
      in.bias = normal(random, size[1] == 4 ? DType::float32 : DType::float16, size);
      in.mask = Tensor<4>(DType::boolean, {1, 2, n.Q, n.K}).fill([&] { return random.chance(0.3); });
      if (!deterministic) in.softcap = 3;
      check_backward(in, random, deterministic ? 80 : 86, deterministic, size[0] == 1);
    }
}

// A value for each pair of each head, in 16 bits: nothing is summed, and the gradient is written as it is.
TEST(cuda_backward_with_a_full_bias_of_each_head) {
  Random random(15);
  for (const Family family : {Family::generic, Family::hopper})
    for (const bool deterministic : {false, true}) {
      const InFamily in_family(family);
      const bool is_hopper = family == Family::hopper;
      Inputs in = make_inputs(random, {2, 140, 150, 4, 2, is_hopper ? 96 : 72}, DType::float16, true);
      in.bias = normal(random, DType::float16, {2, 4, 140, 150});
      in.mask = Tensor<4>(DType::boolean, {1, 2, 140, 150}).fill([&] { return random.chance(0.3); });
      if (!is_hopper && !deterministic) in.softcap = 3;
      check_backward(in, random, is_hopper ? 90 : deterministic ? 80 : 86, deterministic);
    }
}

TEST(cuda_backward_of_wide_heads) {
  Random random(5);
  Inputs in = make_inputs(random, {1, 130, 140, 4, 2, 256}, DType::bfloat16, true);
  in.bias = normal(random, DType::float32, {1, 2, 1, 140});
  check_backward(in, random);
  check_backward(make_inputs(random, {2, 150, 100, 2, 2, 144}, DType::bfloat16, true), random, 80, true);
}

TEST(hopper_backward_of_spans) {
  Random random(6);
  const InFamily family(Family::hopper);
  for (const bool is_causal : {false, true})
    for (const Sizes& n : {Sizes{2, 200, 200, 2, 2, 128}, Sizes{1, 130, 77, 6, 2, 128}, Sizes{1, 140, 300, 2, 1, 125},
                           Sizes{1, 300, 140, 3, 1, 64}})
      check_backward(make_inputs(random, n, DType::bfloat16, is_causal), random, 90, false, is_causal);
}

// Tiles of rows are as many as there are rows for, whatever work there is for how many multiprocessors.
TEST(backward_of_many_short_sequences_takes_little_memory) {
  const InFamily family(Family::hopper);
  Random random(12);
  const Inputs in = make_inputs(random, {.B = 24, .Q = 128, .K = 128, .H = 1, .Hk = 1, .D = 64}, DType::bfloat16, true);
  const Saved saved(in, random, false);
  EmulatedStream stream(90, 1);
  run(in, saved, false, stream);
  const std::size_t row = 64 * sizeof(float), numbers = 2 * sizeof(float);
  CHECK(stream.allocated_bytes() <= 24 * 128 * (3 * row + numbers) + 1024);
}

TEST(hopper_backward_with_a_bias_of_keys) {
  Random random(7);
  const InFamily family(Family::hopper);
  for (const bool deterministic : {false, true})
    for (const auto& size : {Index<4>{1, 2, 1, 150}, Index<4>{2, 4, 1, 150}, Index<4>{2, 1, 1, 1}}) {
      const std::int64_t dim = size[0] == 1 ? 128 : 64;
      Inputs in = make_inputs(random, {2, 140, 150, 4, 2, dim}, DType::bfloat16, true);
      in.bias = normal(random, size[1] == 2 ? DType::bfloat16 : DType::float32, size);
      in.bias->set({0, 0, 0, 17}, -kInfinity);
      check_backward(in, random, 90, deterministic, size[1] == 2);
    }
}

// Sums of two do not tell an order: here five tiles of keys add to each row.
TEST(hopper_backward_in_order) {
  Random random(11);
  const InFamily family(Family::hopper);
  Inputs in = make_inputs(random, {1, 300, 600, 2, 1, 64}, DType::bfloat16, false);
  in.bias = normal(random, DType::float32, {1, 1, 1, 600});
  check_backward(in, random, 90, true);
}

TEST(hopper_backward_with_a_full_bias) {
  Random random(10);
  const InFamily family(Family::hopper);
  for (const auto& size : {Index<4>{2, 4, 140, 150}, Index<4>{1, 2, 140, 150}, Index<4>{1, 1, 140, 150}})
    for (const bool deterministic : {false, true}) {
      Context context("bias of " + std::to_string(size[0]) + " x " + std::to_string(size[1]));
      Inputs in = make_inputs(random, {2, 140, 150, 4, 2, 96}, DType::float16, true);
      in.bias = normal(random, size[1] == 4 ? DType::float32 : DType::float16, size);
      in.bias->set({0, 0, 3, 2}, -kInfinity);
      in.mask = Tensor<4>(DType::boolean, {1, 2, 140, 150}).fill([&] { return random.chance(0.3); });
      check_backward(in, random, 90, deterministic, size[0] == 1);
    }
}

// The warpgroups have the same keys.
TEST(hopper_backward_that_shares_keys) {
  Random random(13);
  const InFamily family(Family::hopper);
  for (const std::int64_t dim : {40, 96})
    for (const bool deterministic : {false, true}) {
      Inputs in = make_inputs(random, {2, 140, 150, 4, 2, dim}, DType::float16, true);
      in.bias = normal(random, DType::float16, {1, 4, 140, 150});
      in.mask = Tensor<4>(DType::boolean, {1, 2, 140, 150}).fill([&] { return random.chance(0.3); });
      if (dim == 96 || deterministic) in.softcap = 3;
      check_backward(in, random, 90, deterministic);
    }
  for (const bool deterministic : {false, true}) {
    Inputs in = make_inputs(random, {1, 330, 560, 2, 1, 256}, DType::bfloat16, true);
    Tensor<3> score(DType::float32, {1, 1, 560});
    in.end = dynamic_end(score.fill([&] { return random.normal(); }), 60, 330);
    in.bias = normal(random, DType::float32, {1, 1, 1, 560});
    check_backward(in, random, 90, deterministic, deterministic);
  }
  Inputs in = make_inputs(random, {1, 300, 140, 3, 1, 190}, DType::bfloat16, true);
  in.softcap = 3;
  check_backward(in, random, 90, false, true);
  check_backward(make_inputs(random, {2, 150, 300, 2, 2, 132}, DType::bfloat16, false), random, 90, true);
}

// Heads share a mask by ones, twos and threes: tiles of rows begin between the heads of a position.
TEST(hopper_backward_of_dense_masks) {
  Random random(9);
  const InFamily family(Family::hopper);
  for (const std::int64_t group : {1, 2, 3})
    for (const bool deterministic : {false, true}) {
      Inputs in = make_inputs(random, {1, 150, 270, 2 * group, 2, 72}, DType::float16, true);
      in.mask = Tensor<4>(DType::boolean, {1, 2, 150, 270}).fill([&] { return random.chance(0.3); });
      in.bias = normal(random, DType::float16, {1, 2, 1, 270});
      in.softcap = 3;
      check_backward(in, random, 90, deterministic);
    }
}

// Runs are as long as bits allow: all words of a key are needed.
TEST(hopper_backward_of_long_dense_masks) {
  Random random(14);
  const InFamily family(Family::hopper);
  Inputs in = make_inputs(random, {1, 1100, 1100, 1, 1, 72}, DType::float16, true);
  in.mask = Tensor<4>(DType::boolean, {1, 1, 1100, 1100}).fill([&] { return random.chance(0.1); });
  in.bias = normal(random, DType::float16, {1, 1, 1, 1100});
  in.softcap = 3;
  check_backward(in, random);
}

}  // namespace
}  // namespace flash_dmattn::cuda
