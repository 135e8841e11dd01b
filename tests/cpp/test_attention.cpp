#include "check.h"
#include "flash_dmattn/attention.h"
#include "random_inputs.h"

namespace flash_dmattn::test {
namespace {

const Threads kThreads{.count = 2, .run = {}};

double tolerance(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 1e-11;
    case DType::float32:
      return 1e-5;
    case DType::float16:
      return 4e-3;
    default:
      return 3e-2;
  }
}

DType lse_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

Tensor<3> dynamic_end(const Tensor<3>& score, std::int64_t keep_window_size, std::int64_t query_len, bool is_causal) {
  Tensor<3> end(DType::int32, score.size);
  make_dynamic_mask({score, {}, keep_window_size, query_len, is_causal}, end, {}, kThreads);
  return end;
}

struct Passes {
  Tensor<4> out;
  Tensor<3> lse;
  Tensor<4> probs;
  Tensor<4> grad_query, grad_key, grad_value;
  std::optional<Tensor<4>> grad_bias;
};

Passes run(const Inputs& in, const Tensor<4>& grad_out, const std::optional<Tensor<3>>& grad_lse,
           const Threads& threads = kThreads, Index<4> order = {0, 1, 2, 3}) {
  const auto [B, Q, H, D] = in.query.size;
  const DType dtype = in.query.dtype;
  const Problem problem = in.problem();
  const Plan plan(problem, threads);
  Passes r{{dtype, in.query.size, order},
           {lse_dtype(dtype), {B, H, Q}},
           {dtype, {B, H, Q, in.key.size[1]}},
           {dtype, in.query.size, order},
           {dtype, in.key.size, order},
           {dtype, in.value.size, order},
           {}};
  if (in.bias) r.grad_bias = Tensor<4>(in.bias->dtype, in.bias->size);
  forward(problem, plan, {r.out, r.lse}, threads);
  probabilities(problem, plan, r.lse, r.probs, threads);
  backward(problem, plan, {r.out, r.lse}, {grad_out, grad_lse}, {r.grad_query, r.grad_key, r.grad_value, r.grad_bias},
           threads);
  return r;
}

/// Runs every pass and holds it against the float64 loops.
void check_against_reference(const Inputs& in, Random& random, Index<4> order = {0, 1, 2, 3}) {
  const auto [B, Q, H, D] = in.query.size;
  const Tensor<4> grad_out = normal(random, in.query.dtype, in.query.size, order);
  std::optional<Tensor<3>> grad_lse;
  if (random.chance(0.3)) {
    grad_lse.emplace(lse_dtype(in.query.dtype), Index<3>{B, H, Q});
    grad_lse->fill([&] { return random.normal(); });
  }
  const Passes got = run(in, grad_out, grad_lse, kThreads, order);
  const Results expected = attention(in);
  const auto [gradient, magnitude] = attention_gradient(in, grad_out, grad_lse);
  const auto close = [&](const char* what, const auto& g, const auto& e, double scale) {
    const double off = difference(g, e), most = scale * std::max(tolerance(in.query.dtype), tolerance(g.dtype));
    Context context(std::string(what) + " is off by " + std::to_string(off / most) + " tolerances");
    CHECK(off <= most);
  };
  close("out", got.out, expected.out, 1);
  close("lse", got.lse, expected.lse, std::max(1.0, largest(expected.lse)));
  close("probs", got.probs, expected.probs, 1);
  close("grad_query", got.grad_query, gradient.query, largest(magnitude.query));
  close("grad_key", got.grad_key, gradient.key, largest(magnitude.key));
  close("grad_value", got.grad_value, gradient.value, largest(magnitude.value));
  if (in.bias) close("grad_bias", *got.grad_bias, *gradient.bias, largest(*magnitude.bias));
}

/// A size that broadcasts to (B, H, Q, K).
Index<4> broadcast_size(Random& random, const Sizes& n) {
  return {random.pick({n.B, std::int64_t{1}}), random.pick({n.H, n.Hk, std::int64_t{1}}),
          random.pick({n.Q, std::int64_t{1}}), random.chance(0.8) ? n.K : 1};
}

/// Sometimes a tensor of stride 0, in batch and query, that looks like the full one.
Tensor<4> maybe_expand(Random& random, const Tensor<4>& t, const Sizes& n) {
  if (!random.chance(0.3)) return t;
  Tensor<4> wide = t;
  if (t.size[0] == 1) wide = wide.expand(0, n.B);
  if (t.size[2] == 1) wide = wide.expand(2, n.Q);
  return wide;
}

/// One draw from everything that a problem can be.
Inputs random_inputs(Random& random, std::string& description) {
  Sizes n;
  n.B = random.integer(1, 2);
  n.Hk = random.pick({1, 2, 3});
  n.H = n.Hk * random.pick({1, 2, 4});
  n.D = random.pick({1, 3, 8, 16, 24, 33, 64, 65});
  const std::int64_t longest = random.pick({8, 40, 140});
  n.K = random.integer(1, longest);
  n.Q = random.chance(0.4) ? n.K : random.chance(0.3) ? 1 : random.integer(1, longest);
  const DType dtype = random.pick({DType::float32, DType::float64, DType::bfloat16, DType::float16});
  const Index<4> order = random.chance(0.5) ? Index<4>{0, 1, 2, 3} : Index<4>{0, 2, 1, 3};
  const std::int64_t gap = random.pick({0, 3});

  Inputs in;
  in.query = normal(random, dtype, {n.B, n.Q, n.H, n.D}, order, gap);
  in.key = normal(random, dtype, {n.B, n.K, n.Hk, n.D}, order, gap);
  in.value = normal(random, dtype, {n.B, n.K, n.Hk, n.D}, order, gap);
  in.is_causal = random.chance(0.5);
  in.scale = random.chance(0.8) ? 1 / std::sqrt(static_cast<double>(n.D)) : 0.3;
  in.softcap = random.chance(0.3) ? 1 + 5 * std::fabs(random.normal()) : 0;
  if (random.chance(0.5)) {
    const double density = random.pick({0.05, 0.5, 0.95});
    const std::int64_t block = random.pick({1, 1, 32});  // masks made of tiles, too
    Tensor<4> mask(DType::boolean, broadcast_size(random, n));
    mask.for_each([&](const Index<4>& i) {
      const bool first = i[2] % block == 0 && i[3] % block == 0;
      mask.set(i, first ? random.chance(density) : mask.at({i[0], i[1], i[2] - i[2] % block, i[3] - i[3] % block}));
    });
    in.mask = maybe_expand(random, mask, n);
  }
  if (random.chance(0.5)) {
    const double hidden = random.pick({0.0, 0.0, 0.2});
    Tensor<4> bias(random.chance(0.5) ? dtype : DType::float32, broadcast_size(random, n));
    bias.fill([&] { return random.chance(hidden) ? -kInfinity : random.normal(); });
    in.bias = maybe_expand(random, bias, n);
  }
  std::int64_t window = 0;
  bool dynamic_is_causal = false;
  if (random.chance(0.5)) {
    window = random.integer(1, n.K + 3);
    dynamic_is_causal = in.is_causal || random.chance(0.5);
    if (in.is_causal && random.chance(0.2)) dynamic_is_causal = false;
    Tensor<3> score(DType::float32,
                    {random.pick({n.B, std::int64_t{1}}), random.pick({n.H, n.Hk, std::int64_t{1}}), n.K});
    score.fill([&] { return std::round(2 * random.normal()); });  // with ties
    in.end = dynamic_end(score, window, n.Q, dynamic_is_causal);
  }

  std::ostringstream text;
  const auto size = [&](const char* name, const std::optional<Tensor<4>>& t) {
    if (t)
      text << " " << name << " (" << t->size[0] << ", " << t->size[1] << ", " << t->size[2] << ", " << t->size[3]
           << ")";
  };
  text << name_of(dtype) << " B " << n.B << " Q " << n.Q << " K " << n.K << " H " << n.H << " Hk " << n.Hk << " D "
       << n.D << " causal " << in.is_causal << " softcap " << in.softcap << " window " << window << " (causal "
       << dynamic_is_causal << ")";
  size("mask", in.mask);
  size("bias", in.bias);
  description = text.str();
  return in;
}

template <int Rank>
bool all_equal(const Tensor<Rank>& t, double x) {
  bool equal = true;
  t.for_each([&](const Index<Rank>& i) { equal = equal && t.at(i) == x; });
  return equal;
}

TEST(random_problems) {
  for (int seed = 0; seed < random_cases(); ++seed) {
    Random random(seed);
    std::string description;
    const Inputs in = random_inputs(random, description);
    Context context("case " + std::to_string(seed) + ": " + description);
    check_against_reference(in, random, random.chance(0.5) ? Index<4>{0, 1, 2, 3} : Index<4>{0, 2, 1, 3});
  }
}

TEST(head_dims) {
  Random random(1);
  for (std::int64_t D : {1, 2, 7, 15, 16, 17, 31, 63, 80, 96, 127, 128, 160, 192, 255, 256})
    for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
      Context context("D " + std::to_string(D) + " " + name_of(dtype));
      check_against_reference(make_inputs(random, {.B = 1, .Q = 19, .K = 21, .H = 2, .Hk = 1, .D = D}, dtype, true),
                              random);
    }
}

TEST(long_sequences) {
  Random random(2);
  for (DType dtype : {DType::float32, DType::bfloat16})
    for (std::int64_t window : {0, 1, 50, 1000}) {
      Context context(std::string(name_of(dtype)) + " window " + std::to_string(window));
      const Sizes n{.B = 1, .Q = 420, .K = 450, .H = 2, .Hk = 1, .D = 8};
      Inputs in = make_inputs(random, n, dtype, true);
      in.bias = normal(random, DType::float32, {1, 1, 1, n.K});
      if (window > 0) {
        Tensor<3> score(DType::float32, {1, 1, n.K});
        in.end = dynamic_end(score.fill([&] { return random.normal(); }), window, n.Q, true);
      }
      check_against_reference(in, random);
    }
}

TEST(short_queries_over_many_keys) {
  Random random(3);
  for (std::int64_t Q : {1, 3})
    for (int kind : {0, 1, 2}) {
      Context context("Q " + std::to_string(Q) + " kind " + std::to_string(kind));
      const Sizes n{.B = 2, .Q = Q, .K = 2500, .H = 4, .Hk = 2, .D = 16};
      Inputs in = make_inputs(random, n, DType::float32, true);
      if (kind == 1) in.mask = Tensor<4>(DType::boolean, {2, 1, 1, n.K}).fill([&] { return random.chance(0.4); });
      if (kind == 2) {
        Tensor<3> score(DType::bfloat16, {2, 2, n.K});
        in.end = dynamic_end(score.fill([&] { return random.normal(); }), 300, n.Q, true);
      }
      check_against_reference(in, random);
    }
}

TEST(large_scores) {
  Random random(4);
  Inputs in = make_inputs(random, {.B = 1, .Q = 40, .K = 40, .H = 1, .Hk = 1, .D = 16}, DType::float64, true);
  in.scale = 100;
  in.bias = Tensor<4>(DType::float64, {1, 1, 40, 40}).fill([&] { return 1000 * random.normal(); });
  check_against_reference(in, random);
  in.softcap = 20;
  check_against_reference(in, random);
}

TEST(queries_that_see_no_key) {
  Random random(5);
  for (int kind : {0, 1, 2, 3}) {
    Context context("kind " + std::to_string(kind));
    const Sizes n{.B = 1, .Q = 70, .K = 45, .H = 2, .Hk = 1, .D = 20};
    Inputs in = make_inputs(random, n, DType::float32, kind == 0);  // 0: causal with Q > K
    if (kind == 1) in.mask = Tensor<4>(DType::boolean, {1, 1, n.Q, n.K}).fill([&] { return 0; });
    if (kind == 2) in.mask = Tensor<4>(DType::boolean, {1, 1, 1, n.K}).fill([&] { return 0; });
    if (kind == 3) in.bias = Tensor<4>(DType::float32, {1, 1, n.Q, 1}).fill([&] { return -kInfinity; });
    const Tensor<4> grad_out = normal(random, DType::float32, in.query.size);
    const Passes got = run(in, grad_out, {});
    for (std::int64_t q = 0; q < (kind == 0 ? n.Q - n.K : n.Q); ++q)
      for (std::int64_t h = 0; h < n.H; ++h) {
        CHECK_EQUAL(got.lse.at({0, h, q}), -kInfinity);
        for (std::int64_t k = 0; k < n.K; ++k) CHECK_EQUAL(got.probs.at({0, h, q, k}), 0);
        for (std::int64_t d = 0; d < n.D; ++d) {
          CHECK_EQUAL(got.out.at({0, q, h, d}), 0);
          CHECK_EQUAL(got.grad_query.at({0, q, h, d}), 0);
        }
      }
    if (kind > 0) CHECK(all_equal(got.grad_key, 0) && all_equal(got.grad_value, 0));
    if (in.bias) CHECK(all_equal(*got.grad_bias, 0));
    check_against_reference(in, random);
  }
}

TEST(empty_tensors) {
  Random random(6);
  for (const Sizes& n : {Sizes{.B = 0, .Q = 3, .K = 4}, Sizes{.B = 2, .Q = 0, .K = 4}, Sizes{.B = 2, .Q = 3, .K = 0}})
    for (bool is_causal : {false, true}) {
      Context context("B " + std::to_string(n.B) + " Q " + std::to_string(n.Q) + " K " + std::to_string(n.K));
      Inputs in = make_inputs(random, n, DType::float32, is_causal);
      in.bias = normal(random, DType::float32, {n.B, 1, 1, n.K});
      const Passes got = run(in, normal(random, DType::float32, in.query.size), {});
      CHECK(all_equal(got.out, 0) && all_equal(got.lse, -kInfinity) && all_equal(got.grad_query, 0));
      CHECK(all_equal(got.grad_key, 0) && all_equal(got.grad_value, 0) && all_equal(*got.grad_bias, 0));
    }
}

TEST(the_same_bits_for_any_threads) {
  for (int kind : {0, 1, 2, 3}) {
    Context context("kind " + std::to_string(kind));
    Random random(7);
    const Sizes n{.B = 2, .Q = kind == 3 ? 2 : 150, .K = kind == 3 ? 1500 : 170, .H = 4, .Hk = 2, .D = 32};
    Inputs in = make_inputs(random, n, kind == 2 ? DType::bfloat16 : DType::float32, true);
    in.bias = normal(random, DType::float32, {1, 2, 1, n.K});
    if (kind == 1) in.mask = Tensor<4>(DType::boolean, {1, 1, n.Q, n.K}).fill([&] { return random.chance(0.3); });
    if (kind >= 2) {
      Tensor<3> score(DType::float32, {2, 2, n.K});
      in.end = dynamic_end(score.fill([&] { return random.normal(); }), 40, n.Q, true);
    }
    const Tensor<4> grad_out = normal(random, in.query.dtype, in.query.size);
    const Threads one_after_the_other{.count = 5, .run = [](int count, const std::function<void(int)>& body) {
                                        for (int worker = 0; worker < count; ++worker) body(worker);
                                      }};
    const Passes first = run(in, grad_out, {}, {.count = 1, .run = {}});
    for (const Threads& threads :
         {Threads{1, {}}, Threads{2, {}}, Threads{3, {}}, Threads{7, {}}, one_after_the_other}) {
      const Passes again = run(in, grad_out, {}, threads);
      CHECK(same_bits(again.out, first.out) && same_bits(again.lse, first.lse) && same_bits(again.probs, first.probs));
      CHECK(same_bits(again.grad_query, first.grad_query) && same_bits(again.grad_key, first.grad_key));
      CHECK(same_bits(again.grad_value, first.grad_value) && same_bits(*again.grad_bias, *first.grad_bias));
    }
  }
}

TEST(one_plan_serves_every_pass) {
  Random random(8);
  Inputs in = make_inputs(random, {.B = 1, .Q = 50, .K = 50, .H = 2, .Hk = 2, .D = 16}, DType::float32, true);
  const Problem problem = in.problem();
  Plan plan(problem, kThreads);
  Plan moved(std::move(plan));
  Passes a{{DType::float32, in.query.size}, {DType::float32, {1, 2, 50}}, {}, {}, {}, {}, {}}, b = a;
  b.out = {DType::float32, in.query.size};
  b.lse = {DType::float32, {1, 2, 50}};
  forward(problem, moved, {a.out, a.lse}, kThreads);
  forward(problem, moved, {b.out, b.lse}, kThreads);
  CHECK(same_bits(a.out, b.out) && same_bits(a.lse, b.lse));
}

}  // namespace
}  // namespace flash_dmattn::test
