// Every pass of attention on emulated GPUs, against the float64 loops.
#include <algorithm>
#include <set>

#include "attention/backward_rows.cuh"
#include "check.h"
#include "emulator.h"
#include "flash_dmattn/cuda.h"
#include "flash_dmattn/cuda_kernels.h"
#include "kernel_list.h"
#include "reference.h"
#include "sm80/backward.cuh"
#include "sm80/combine.cuh"
#include "sm80/forward.cuh"
#include "sm80/probabilities.cuh"
#include "sm90/backward.cuh"
#include "sm90/forward.cuh"

namespace flash_dmattn::cuda {
namespace {

using namespace test;

/// What kernels are specialised on. Each kind takes many seconds to compile: these have every value, and most pairs.
struct Kind {
  int arch;
  std::int64_t head_dim;  // a multiple of 8; those just below it are padded to it
  Number number;
  Test test;
  BiasKind bias;
  bool softcap;
};

#define HOPPER_KINDS(KIND)                                                \
  KIND(90, 64, Number::bfloat16, Test::interval, BiasKind::none, false)   \
  KIND(90, 64, Number::float16, Test::bits, BiasKind::full, false)        \
  KIND(90, 24, Number::bfloat16, Test::interval, BiasKind::per_key, true) \
  KIND(90, 24, Number::float16, Test::interval, BiasKind::full, false)    \
  KIND(90, 136, Number::bfloat16, Test::interval, BiasKind::per_key, false)
#define KINDS(KIND)                                                       \
  HOPPER_KINDS(KIND)                                                      \
  KIND(80, 24, Number::bfloat16, Test::bits, BiasKind::none, true)        \
  KIND(80, 64, Number::float16, Test::interval, BiasKind::per_key, false) \
  KIND(86, 24, Number::float16, Test::bits, BiasKind::per_key, false)     \
  KIND(86, 24, Number::bfloat16, Test::interval, BiasKind::full, true)    \
  KIND(86, 208, Number::bfloat16, Test::bits, BiasKind::none, false)      \
  KIND(86, 128, Number::float16, Test::interval, BiasKind::none, false)   \
  KIND(80, 8, Number::float16, Test::bits, BiasKind::full, true)

#define LIST(...) {__VA_ARGS__},
constexpr Kind kKinds[] = {KINDS(LIST)};

#define FORWARD(...) EMULATE(Forward<ForwardOptions{__VA_ARGS__}>);
#define BACKWARD(...) EMULATE(Backward<BackwardOptions{__VA_ARGS__}>);
// The gradient of an expanded bias is a full one's.
#define PASSES(arch, head_dim, number, test, bias, softcap)                                  \
  FORWARD(arch, head_dim, number, test, bias, softcap, 16, false)                            \
  FORWARD(arch, head_dim, number, test, bias, softcap, 16, true)                             \
  FORWARD(arch, head_dim, number, test, bias, softcap, 64, false)                            \
  FORWARD(arch, head_dim, number, test, bias, softcap, 64, true)                             \
  FORWARD(arch, head_dim, number, test, bias, softcap, 128, false)                           \
  FORWARD(arch, head_dim, number, test, bias, softcap, 128, true)                            \
  EMULATE(Probabilities<ProbabilitiesOptions{arch, head_dim, number, test, bias, softcap}>); \
  BACKWARD(arch, head_dim, number, test, bias, softcap, false)                               \
  BACKWARD(arch, head_dim, number, test, bias, softcap, true)                                \
  BACKWARD(arch, head_dim, number, test, BiasKind::full, softcap, false)                     \
  BACKWARD(arch, head_dim, number, test, BiasKind::full, softcap, true)                      \
  EMULATE(WriteGradients<GradientOptions{arch, head_dim, number, 0}>);
KINDS(PASSES)
#define HOPPER_BACKWARD(...) EMULATE(HopperBackward<BackwardOptions{90, __VA_ARGS__}>);
#define HOPPER_PASSES(arch, head_dim, number, test, bias, softcap)                     \
  EMULATE(HopperForward<HopperForwardOptions{head_dim, number, test, bias, softcap}>); \
  HOPPER_BACKWARD(head_dim, number, test, bias, softcap, false)                        \
  HOPPER_BACKWARD(head_dim, number, test, bias, softcap, true)                         \
  HOPPER_BACKWARD(head_dim, number, test, BiasKind::full, softcap, false)              \
  HOPPER_BACKWARD(head_dim, number, test, BiasKind::full, softcap, true)               \
  EMULATE(WriteGradients<GradientOptions{90, head_dim, number, 64}>);                  \
  EMULATE(WriteGradients<GradientOptions{90, head_dim, number, 128}>);
HOPPER_KINDS(HOPPER_PASSES)

#define OF_NUMBERS(number)                      \
  EMULATE(Combine<CombineOptions{80, number}>); \
  EMULATE(Combine<CombineOptions{86, number}>); \
  EMULATE(Combine<CombineOptions{90, number}>); \
  EMULATE(BackwardRows<number>);                \
  EMULATE(WriteRowBiasGradient<number>);
OF_NUMBERS(Number::float16)
OF_NUMBERS(Number::bfloat16)
EMULATE(ZeroMatrix);

double tolerance(DType dtype) { return dtype == DType::float16 ? 4e-3 : dtype == DType::bfloat16 ? 3e-2 : 2e-4; }

/// In any layout. `is_odd`: no row starts at a multiple of 16 bytes.
Tensor<4> normal(Random& random, DType dtype, Index<4> size, Index<4> order = {0, 1, 2, 3}, bool is_odd = false) {
  Tensor<4> t(dtype, {size[0], size[1], size[2], size[3] + is_odd}, order);
  if (is_odd) {
    t.size[3] = size[3];
    t.data = static_cast<std::byte*>(t.data) + size_of(dtype);
  }
  return t.fill([&] { return random.normal(); });
}

/// While it lives, kernels are those of a family.
struct InFamily {
  explicit InFamily(Family family) { set_family(family); }
  InFamily(const InFamily&) = delete;
  InFamily& operator=(const InFamily&) = delete;
  ~InFamily() { set_family(Family::automatic); }
};
const char* name_of(Family family) { return family == Family::hopper ? "hopper" : "generic"; }

/// A problem, and what a GPU makes of its dynamic mask.
struct Case {
  Inputs in;
  std::optional<Tensor<4>> survivors;
  Tensor<4> grad_out;
  std::optional<Tensor<3>> grad_lse;
  Index<4> order{0, 1, 2, 3};  // of what the passes write
  bool is_odd = false;
  bool saves_bits = false;  // of the mask, for the backward pass
  Family family = Family::generic;

  Problem problem() const {
    Problem p = in.problem();
    p.survivors = survivors;
    return p;
  }
};

struct Gradient {
  Tensor<4> query, key, value;
  std::optional<Tensor<4>> bias;
};

struct Saved {
  Tensor<4> out;
  Tensor<3> lse;
  Tensor<4> probs;
  std::optional<Tensor<4>> mask_bits;
};

Tensor<4> empty(const Case& c, const Tensor<4>& like) {
  Random unused(0);
  return normal(unused, like.dtype, like.size, c.order, c.is_odd).fill([] { return kNaN; });
}

Gradient run_backward(const Case& c, const Saved& saved, bool deterministic, Stream& stream) {
  const Inputs& in = c.in;
  Gradient g{empty(c, in.query), empty(c, in.key), empty(c, in.value), {}};
  if (in.bias) g.bias = Tensor<4>(in.bias->dtype, in.bias->size, c.order);
  const InFamily in_family(c.family);
  backward(c.problem(), {saved.out, saved.lse, saved.mask_bits}, {c.grad_out, c.grad_lse},
           {g.query, g.key, g.value, g.bias}, deterministic, stream);
  return g;
}

Saved run_forward(const Case& c, Stream& stream) {
  const auto [B, Q, H, D] = c.in.query.size;
  Saved r{empty(c, c.in.query),
          {DType::float32, {B, H, Q}, c.is_odd ? Index<3>{0, 2, 1} : Index<3>{0, 1, 2}},
          {c.in.query.dtype, {B, H, Q, c.in.key.size[1]}, c.order},
          {}};
  if (c.saves_bits) r.mask_bits = Tensor<4>(DType::int32, mask_bits_size(c.problem()));
  {
    const InFamily in_family(c.family);
    forward(c.problem(), {r.out, r.lse, r.mask_bits}, stream);
  }
  probabilities(c.problem(), r.lse, r.probs, stream);
  return r;
}

/// Runs every pass and holds it against the float64 loops.
void check_against_reference(const Case& c, bool deterministic, Stream& stream) {
  const auto close = [&](const char* what, const auto& got, const auto& expected, DType dtype, double scale) {
    const double off = difference(got, expected) / (scale * tolerance(dtype));
    Context context(std::string(what) + " is off by " + std::to_string(off) + " tolerances");
    CHECK(off <= 1);
  };
  const DType dtype = c.in.query.dtype;
  const Saved saved = run_forward(c, stream);
  const Results expected = attention(c.in);
  close("out", saved.out, expected.out, dtype, std::max(1.0, largest(expected.out)));
  close("lse", saved.lse, expected.lse, DType::float32, std::max(1.0, largest(expected.lse)));
  close("probs", saved.probs, expected.probs, dtype, 1);

  const Gradient got = run_backward(c, saved, deterministic, stream);
  const auto [gradient, magnitude] = attention_gradient(c.in, c.grad_out, c.grad_lse);
  close("grad_query", got.query, gradient.query, dtype, std::max(1e-3, largest(magnitude.query)));
  close("grad_key", got.key, gradient.key, dtype, std::max(1e-3, largest(magnitude.key)));
  close("grad_value", got.value, gradient.value, dtype, std::max(1e-3, largest(magnitude.value)));
  if (c.in.bias) close("grad_bias", *got.bias, *gradient.bias, dtype, std::max(1e-3, largest(*magnitude.bias)));
}

struct Sizes {
  std::int64_t B = 1, Q = 1, K = 1, H = 1, Hk = 1, D = 8;

  std::int64_t work() const { return B * H * Q * K * (D + 16); }
};

/// One draw from all problems of a kind.
Case random_case(Random& random, const Kind& kind, Stream& stream, std::string& description) {
  Sizes n;
  const bool needs_rows = kind.test == Test::bits || kind.bias == BiasKind::full;  // several queries and keys
  do {
    n.B = random.integer(1, 2);
    n.Hk = random.pick({1, 1, 2, 3});
    n.H = n.Hk * random.pick({1, 1, 2, 3, 4, 20});
    if (random.chance(0.03)) n.H = n.Hk * random.pick({67, 80, 144});
    n.D = kind.head_dim - random.pick({0, 0, 1, 6, 7});
    const std::int64_t longest = random.pick({8, 40, 140, 140, 300});
    n.K = random.integer(needs_rows ? 2 : 1, longest);
    n.Q = random.chance(0.4) ? n.K : random.chance(0.4) ? random.integer(1, 3) : random.integer(1, longest);
    if (needs_rows) n.Q = std::max<std::int64_t>(n.Q, 2);
    if (n.Q < 4) n.K *= random.integer(1, 3);
  } while (n.work() > 1500000);

  const DType dtype = kind.number == Number::float16 ? DType::float16 : DType::bfloat16;
  const auto any_order = [&] { return random.chance(0.5) ? Index<4>{0, 1, 2, 3} : Index<4>{0, 2, 1, 3}; };
  Case c;
  c.is_odd = random.chance(0.2);
  c.order = any_order();
  if (kind.arch == 90 && random.chance(0.5)) c.family = Family::hopper;
  Inputs& in = c.in;
  in.query = normal(random, dtype, {n.B, n.Q, n.H, n.D}, any_order(), random.chance(0.2));
  in.key = normal(random, dtype, {n.B, n.K, n.Hk, n.D}, any_order(), random.chance(0.2));
  in.value = normal(random, dtype, {n.B, n.K, n.Hk, n.D}, any_order(), random.chance(0.2));
  in.is_causal = random.chance(0.5);
  in.scale = random.chance(0.7) ? 1 / std::sqrt(static_cast<double>(n.D)) : random.pick({0.3, -0.2, -0.3, 0.0});
  in.softcap = kind.softcap ? 1 + 5 * std::fabs(random.normal()) : 0;

  const auto head_count = [&] { return random.pick({n.H, n.Hk, std::int64_t{1}}); };
  const auto or_one = [&](std::int64_t size) { return random.pick({size, std::int64_t{1}}); };
  /// Sometimes of stride 0 in batch and query, as expand makes it.
  const auto maybe_expand = [&](Tensor<4> t) {
    if (!random.chance(0.3)) return t;
    if (t.size[0] == 1) t = t.expand(0, n.B);
    return t.size[2] == 1 ? t.expand(2, n.Q) : t;
  };
  const char* mask_kind = "none";
  if (kind.test == Test::bits || random.chance(0.4)) {
    const bool is_dense = kind.test == Test::bits, is_rows = !is_dense && n.Q > 1 && random.chance(0.3);
    mask_kind = is_dense ? "dense" : is_rows ? "rows" : "keys";
    const double density = random.pick({0.0, 0.05, 0.5, 0.5, 0.95});
    const std::int64_t block = random.pick({1, 1, 32, 128});  // masks made of tiles, too
    Tensor<4> mask(DType::boolean, {or_one(n.B), head_count(), is_dense || is_rows ? n.Q : 1, is_rows ? 1 : n.K},
                   is_dense && random.chance(0.2) ? Index<4>{0, 1, 3, 2} : Index<4>{0, 1, 2, 3});
    mask.for_each([&](const Index<4>& i) {
      const bool first = i[2] % block == 0 && i[3] % block == 0;
      mask.set(i, first ? random.chance(density) : mask.at({i[0], i[1], i[2] - i[2] % block, i[3] - i[3] % block}));
    });
    in.mask = maybe_expand(mask);
  }
  if (kind.bias != BiasKind::none) {
    const double hidden = random.pick({0.0, 0.0, 0.2, 1.0});
    Tensor<4> bias(random.chance(0.5) ? dtype : DType::float32,
                   {or_one(n.B), head_count(), kind.bias == BiasKind::full ? n.Q : 1, random.chance(0.8) ? n.K : 1});
    bias.fill([&] { return random.chance(hidden) ? -kInfinity : random.normal(); });
    in.bias = maybe_expand(bias);
  }
  std::int64_t window = 0;
  bool dynamic_is_causal = false;
  if (random.chance(0.5)) {
    window = random.chance(0.5) ? random.integer(1, n.K + 3) : random.integer(1, 1 + n.K / 8);
    dynamic_is_causal = in.is_causal ? random.chance(0.8) : random.chance(0.5);
    Tensor<3> score(DType::float32, {or_one(n.B), head_count(), n.K});
    score.fill([&] { return std::round(2 * random.normal()); });  // with ties
    std::optional<Tensor<2>> padding;
    if (random.chance(0.3)) {
      const Index<2> size{or_one(score.size[0]), n.K};
      padding = Tensor<2>(DType::boolean, size).fill([&] { return random.chance(0.8); });
    }
    const DynamicMask mask{score, padding, window, n.Q, dynamic_is_causal};
    in.end = Tensor<3>(DType::int32, score.size);
    if (dynamic_is_causal && random.chance(0.7)) {
      const std::int64_t chunk = survivor_chunk(window);
      c.survivors = Tensor<4>(
          DType::int32, {score.size[0], score.size[1], (n.K + chunk - 1) / chunk, std::min<std::int64_t>(window, n.K)});
    }
    make_dynamic_mask(mask, *in.end, c.survivors, stream);
  }
  c.grad_out = normal(random, dtype, in.query.size, any_order(), random.chance(0.2));
  if (random.chance(0.3)) {
    c.grad_lse = Tensor<3>(DType::float32, {n.B, n.H, n.Q});
    c.grad_lse->fill([&] { return random.normal(); });
  }
  c.saves_bits = kind.test == Test::bits && random.chance(0.5);

  std::ostringstream text;
  const auto size = [&](const char* name, const auto& t) {
    if (!t) return;
    text << ", " << name;
    for (std::int64_t s : t->size) text << " " << s;
  };
  text << "arch " << kind.arch << " " << name_of(c.family) << " " << name_of(dtype) << " B " << n.B << " Q " << n.Q
       << " K " << n.K << " H " << n.H << " Hk " << n.Hk << " D " << n.D << " causal " << in.is_causal << " scale "
       << in.scale << " softcap " << in.softcap << " multiprocessors " << stream.multiprocessors() << ", mask of "
       << mask_kind;
  size("mask", in.mask);
  size("bias", in.bias);
  if (in.bias) text << " " << name_of(in.bias->dtype);
  size("end", in.end);
  if (in.end) text << " window " << window << " (causal " << dynamic_is_causal << ")";
  size("survivors", c.survivors);
  if (c.grad_lse) text << ", gradient of lse";
  if (c.saves_bits) text << ", saved bits";
  description = text.str();
  return c;
}

/// Ahead of time, kernels are compiled from a list: what was launched must be on it.
void check_listed(const EmulatedStream& stream, const Kind& kind) {
  std::set<std::string> listed;
  for (const ListedKernel& kernel : list_kernels({kind.arch, {kind.number}, {static_cast<int>(kind.head_dim)}}))
    listed.insert(kernel.kernel.name);
  for (const std::string& name : stream.launched()) {
    Context context(name);
    CHECK(listed.contains(name));
  }
}
bool has_launched(const EmulatedStream& stream, const std::string& kernel) {
  const auto& names = stream.launched();
  return std::any_of(names.begin(), names.end(), [&](const std::string& name) { return name.starts_with(kernel); });
}

// Each way to copy tiles of keys is there: while the tile before is worked at, or in halves.
constexpr int stages_of(const Kind& kind, int rows) {
  return forward_config(
             {kind.arch, static_cast<int>(kind.head_dim), kind.number, kind.test, kind.bias, kind.softcap, rows})
      .scores.stages;
}
static_assert(stages_of(kKinds[0], 128) == 2 && stages_of(kKinds[10], 128) == 1);

TEST(random_problems_on_a_gpu) {
  for (int seed = 0; seed < random_cases(); ++seed) {
    Random random(seed);
    const Kind& kind = kKinds[seed % std::size(kKinds)];
    EmulatedStream stream(kind.arch, random.pick({1, 2, 7, 40}));
    std::string description = "before its passes";
    try {
      const Case c = random_case(random, kind, stream, description);
      Context context("case " + std::to_string(seed) + ": " + description);
      check_against_reference(c, random.chance(0.5), stream);
      check_listed(stream, kind);
      CHECK_EQUAL(has_launched(stream, "HopperForward<"), c.family == Family::hopper && c.in.scale >= 0);
    } catch (const std::exception& error) {
      Context context("case " + std::to_string(seed) + ": " + description);
      fail(__FILE__, __LINE__, error.what());
    }
  }
}

/// A problem of the first kind, which has no bias, or of one with a bias of keys.
constexpr Kind kPlain = kKinds[0], kBiased = kKinds[4], kDense = kKinds[1];

Case make_case(Random& random, const Kind& kind, const Sizes& n, bool is_causal) {
  const DType dtype = kind.number == Number::float16 ? DType::float16 : DType::bfloat16;
  Case c;
  c.in.query = normal(random, dtype, {n.B, n.Q, n.H, n.D});
  c.in.key = normal(random, dtype, {n.B, n.K, n.Hk, n.D});
  c.in.value = normal(random, dtype, {n.B, n.K, n.Hk, n.D});
  c.in.scale = 1 / std::sqrt(static_cast<double>(n.D));
  c.in.softcap = kind.softcap ? 3 : 0;
  c.in.is_causal = is_causal;
  c.grad_out = normal(random, dtype, c.in.query.size);
  return c;
}

void add_dynamic_mask(Random& random, Case& c, Index<2> size, std::int64_t window, Stream& stream) {
  const std::int64_t K = c.in.key.size[1], chunk = survivor_chunk(window);
  Tensor<3> score(DType::float32, {size[0], size[1], K});
  score.fill([&] { return random.normal(); });
  c.in.end = Tensor<3>(DType::int32, score.size);
  c.survivors = Tensor<4>(DType::int32, {size[0], size[1], (K + chunk - 1) / chunk, std::min(window, K)});
  make_dynamic_mask({score, {}, window, c.in.query.size[1], true}, *c.in.end, c.survivors, stream);
}

TEST(long_sequences_on_a_gpu) {
  Random random(1);
  const Kind& kind = kKinds[3];  // float16 D 24 with a full bias
  for (const std::int64_t window : {0, 1, 40, 300})
    for (const bool deterministic : {false, true}) {
      Context context("window " + std::to_string(window) + " deterministic " + std::to_string(deterministic));
      EmulatedStream stream(kind.arch);
      Case c = make_case(random, kind, {.B = 1, .Q = 530, .K = 600, .H = 1, .Hk = 1, .D = 24}, true);
      c.in.bias = normal(random, DType::float32, {1, 1, 530, 600});
      if (window > 0) add_dynamic_mask(random, c, {1, 1}, window, stream);
      check_against_reference(c, deterministic, stream);
    }
}

TEST(deterministic_gradients_are_the_same_bits_whatever_the_order) {
  Random random(2);
  for (const Kind& kind : kKinds) {
    if (kind.head_dim > 64) continue;
    Context context("head dim " + std::to_string(kind.head_dim) + ", arch " + std::to_string(kind.arch));
    // Heads with masks of their own: four add to the gradients of one KV head, where order is seen.
    const Sizes n{.B = 2, .Q = 70, .K = 270, .H = 4, .Hk = 1, .D = kind.head_dim};
    EmulatedStream stream(kind.arch, 4);
    Case c = make_case(random, kind, n, true);
    if (kind.test == Test::bits)
      c.in.mask = Tensor<4>(DType::boolean, {1, 1, n.Q, n.K}).fill([&] { return random.chance(0.5); });
    if (kind.bias != BiasKind::none)
      c.in.bias = normal(random, DType::float32, {1, n.Hk, kind.bias == BiasKind::full ? n.Q : 1, n.K});
    add_dynamic_mask(random, c, {2, n.H}, 60, stream);
    const Saved saved = run_forward(c, stream);
    const Gradient first = run_backward(c, saved, true, stream);
    for (unsigned seed = 100; seed < 103; ++seed) {
      stream.seed(seed);
      const Gradient again = run_backward(c, saved, true, stream);
      CHECK(same_bits(again.query, first.query) && same_bits(again.key, first.key));
      CHECK(same_bits(again.value, first.value) && (!c.in.bias || same_bits(*again.bias, *first.bias)));
    }
  }
}

TEST(deterministic_sums_wait_for_their_turn) {
  // Every query sees its own key: the gradient of a value is the sum over heads, of which two cancel. What is left of
  // the others tells the order. Heads have masks of their own, so that each is added by a block of its own.
  Random random(7);
  const Sizes n{.B = 1, .Q = 200, .K = 200, .H = 6, .Hk = 1, .D = 64};
  Case c = make_case(random, kPlain, n, true);
  c.in.end = Tensor<3>(DType::int32, {1, n.H, n.K});
  c.in.end->for_each([&](const Index<3>& i) { c.in.end->set(i, i[2] + 1); });
  c.grad_out.for_each([&](const Index<4>& i) {
    if (i[2] == 0) c.grad_out.set(i, 1e8 * c.grad_out.at(i));
    if (i[2] == 3) c.grad_out.set(i, -c.grad_out.at({i[0], i[1], 0, i[3]}));
  });
  EmulatedStream stream(kPlain.arch, 6);
  const Saved saved = run_forward(c, stream);
  for (const bool deterministic : {false, true}) {
    const Gradient first = run_backward(c, saved, deterministic, stream);
    bool same = true;
    for (unsigned seed = 100; seed < 104; ++seed) {
      stream.seed(seed);
      same = same && same_bits(run_backward(c, saved, deterministic, stream).value, first.value);
    }
    CHECK_EQUAL(same, deterministic);
  }
}

template <int Rank>
bool all_equal(const Tensor<Rank>& t, double x) {
  bool equal = true;
  t.for_each([&](const Index<Rank>& i) { equal = equal && t.at(i) == x; });
  return equal;
}

TEST(queries_that_see_no_key_on_a_gpu) {
  Random random(3);
  const Sizes n{.B = 1, .Q = 70, .K = 45, .H = 4, .Hk = 2, .D = 64};
  const auto nothing = [](const Index<4>& size) { return Tensor<4>(DType::boolean, size).fill([] { return 0; }); };
  for (const int i : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}) {
    const int what = i / 2;
    Context context("case " + std::to_string(what) + (i % 2 == 0 ? "" : ", hopper"));
    const Kind& kind = what < 4 ? kPlain : what == 4 ? kDense : kBiased;
    EmulatedStream stream(kind.arch);
    Case c = make_case(random, kind, {n.B, n.Q, n.K, n.H, n.Hk, kind.head_dim}, what == 0);  // 0: causal with Q > K
    if (i % 2 == 1) c.family = Family::hopper;
    if (what == 1) c.in.mask = nothing({1, 1, n.Q, 1});
    if (what == 2) c.in.mask = nothing({1, 1, 1, n.K});
    if (what == 3) c.in.end = Tensor<3>(DType::int32, {1, n.H, n.K}).fill([] { return -1000; });
    if (what == 4) c.in.mask = nothing({1, 1, n.Q, n.K});
    if (kind.bias != BiasKind::none)
      c.in.bias = Tensor<4>(DType::float32, {1, 1, kind.bias == BiasKind::full ? n.Q : 1, n.K}).fill([&] {
        return what == 5 ? -kInfinity : random.normal();
      });
    const Saved saved = run_forward(c, stream);
    const Gradient gradient = run_backward(c, saved, false, stream);
    for (std::int64_t q = 0; q < (what == 0 ? n.Q - n.K : n.Q); ++q)
      for (std::int64_t h = 0; h < n.H; ++h) {
        CHECK_EQUAL(saved.lse.at({0, h, q}), -kInfinity);
        for (std::int64_t k = 0; k < n.K; ++k) CHECK_EQUAL(saved.probs.at({0, h, q, k}), 0);
        for (std::int64_t d = 0; d < kind.head_dim; ++d) {
          CHECK_EQUAL(saved.out.at({0, q, h, d}), 0);
          CHECK_EQUAL(gradient.query.at({0, q, h, d}), 0);
        }
      }
    if (what > 0) CHECK(all_equal(gradient.key, 0) && all_equal(gradient.value, 0));
    if (c.in.bias) CHECK(all_equal(*gradient.bias, 0));
    check_against_reference(c, true, stream);
  }
}

template <int Rank>
bool all_finite(const Tensor<Rank>& t) {
  bool finite = true;
  t.for_each([&](const Index<Rank>& i) { finite = finite && std::isfinite(t.at(i)); });
  return finite;
}

TEST(large_numbers_on_a_gpu) {
  Random random(4);
  for (const Kind& kind : kKinds) {
    if (kind.head_dim > 64) continue;
    for (const char* what : {"logits", "values", "biases", "the lowest bias"}) {
      const std::string name = what;
      const bool is_biases = name == "biases" || name == "the lowest bias";
      if (is_biases && kind.bias == BiasKind::none) continue;
      Context context("large " + name + ", arch " + std::to_string(kind.arch) + ", head dim " +
                      std::to_string(kind.head_dim) + ", softcap " + std::to_string(kind.softcap));
      const Sizes n{.B = 1, .Q = 70, .K = 130, .H = 2, .Hk = 1, .D = kind.head_dim};
      EmulatedStream stream(kind.arch);
      Case c = make_case(random, kind, n, true);
      if (name == "logits")
        for (Tensor<4>* t : {&c.in.query, &c.in.key}) t->fill([&] { return 300 * random.normal(); });
      if (name == "values") c.in.value.fill([&] { return kind.number == Number::float16 ? 200 : 1e36; });
      if (kind.test == Test::bits)
        c.in.mask = Tensor<4>(DType::boolean, {1, 1, n.Q, n.K}).fill([&] { return random.chance(0.5); });
      if (kind.bias != BiasKind::none) {
        const Index<4> size{1, 1, kind.bias == BiasKind::full ? n.Q : 1, n.K};
        c.in.bias = Tensor<4>(DType::float32, size).fill([&] {
          constexpr double kLargest = std::numeric_limits<float>::max();
          if (name == "biases") return random.pick({0.0, kLargest, -kLargest});
          return name == "the lowest bias" ? -kLargest : random.normal();
        });
      }
      if (kind.arch == 90) {
        c.family = Family::hopper;
        const Saved of_hopper = run_forward(c, stream);
        CHECK(all_finite(of_hopper.out));
        CHECK(kind.test == Test::bits || all_finite(of_hopper.lse));
        c.family = Family::generic;
      }
      const Saved saved = run_forward(c, stream);
      CHECK(all_finite(saved.out));
      CHECK(all_finite(saved.probs));
      CHECK(kind.test == Test::bits || all_finite(saved.lse));
      if (name == "values") continue;
      const Gradient gradient = run_backward(c, saved, false, stream);
      CHECK(all_finite(gradient.query) && all_finite(gradient.key) && all_finite(gradient.value));
      CHECK(!c.in.bias || all_finite(*gradient.bias));
      if (name == "logits" && kind.softcap) check_against_reference(c, false, stream);
    }
  }
}

TEST(empty_tensors_on_a_gpu) {
  Random random(5);
  for (Sizes n : {Sizes{.B = 0, .Q = 3, .K = 4}, Sizes{.B = 2, .Q = 0, .K = 4}, Sizes{.B = 2, .Q = 3, .K = 0}})
    for (const bool is_causal : {false, true})
      for (const bool deterministic : {false, true}) {
        Context context("B " + std::to_string(n.B) + " Q " + std::to_string(n.Q) + " K " + std::to_string(n.K));
        EmulatedStream stream(kBiased.arch);
        n.D = kBiased.head_dim;
        Case c = make_case(random, kBiased, n, is_causal);
        c.in.bias = normal(random, DType::float32, {n.B, 1, 1, n.K});
        c.family = deterministic ? Family::hopper : Family::generic;  // of the other pass
        const Saved saved = run_forward(c, stream);
        const Gradient gradient = run_backward(c, saved, deterministic, stream);
        CHECK(all_equal(saved.out, 0) && all_equal(saved.lse, -kInfinity) && all_equal(gradient.query, 0));
        CHECK(all_equal(gradient.key, 0) && all_equal(gradient.value, 0) && all_equal(*gradient.bias, 0));
      }
}

TEST(a_gpu_takes_numbers_of_16_bits) {
  Random random(6);
  EmulatedStream stream;
  Case c = make_case(random, kPlain, {.B = 1, .Q = 2, .K = 3, .H = 1, .Hk = 1, .D = 64}, false);
  for (Tensor<4>* t : {&c.in.query, &c.in.key, &c.in.value, &c.grad_out}) *t = normal(random, DType::float32, t->size);
  Tensor<4> out(DType::float32, c.in.query.size), probs(DType::float32, {1, 1, 2, 3});
  Tensor<3> lse(DType::float32, {1, 1, 2});
  CHECK_REFUSED(forward(c.problem(), {out, lse}, stream), "query", "float32");
  CHECK_REFUSED(probabilities(c.problem(), lse, probs, stream), "query", "float32");
  CHECK_REFUSED(
      backward(c.problem(), {out, lse}, {c.grad_out, {}}, {c.in.query, c.in.key, c.in.value, {}}, false, stream),
      "query", "float32");
  CHECK(stream.launched().empty());
}

TEST(bits_of_a_mask_that_was_expanded) {
  Random random(9);
  constexpr Kind kMasked = kKinds[9];
  EmulatedStream stream(kMasked.arch);
  Case c = make_case(random, kMasked, {.B = 2, .Q = 40, .K = 48, .H = 2, .Hk = 1, .D = kMasked.head_dim}, false);
  const Tensor<4> mask = Tensor<4>(DType::boolean, {1, 1, 40, 48}).fill([&] { return random.chance(0.5); });
  c.in.mask = mask.expand(0, 2).expand(1, 2);
  c.saves_bits = true;
  const Saved saved = run_forward(c, stream);
  c.in.mask = Tensor<4>(DType::boolean, {2, 2, 40, 48});
  c.in.mask->for_each([&](const Index<4>& i) { c.in.mask->set(i, mask.at({0, 0, i[2], i[3]})); });
  const Gradient got = run_backward(c, saved, true, stream);
  const Gradient expected = run_backward(c, {saved.out, saved.lse, saved.probs, {}}, true, stream);
  CHECK(same_bits(got.query, expected.query) && same_bits(got.key, expected.key));
}

TEST(bits_of_another_mask_are_refused) {
  Random random(8);
  EmulatedStream stream;
  const Sizes n{.B = 2, .Q = 40, .K = 48, .H = 2, .Hk = 1, .D = 64};
  Case c = make_case(random, kPlain, n, false);
  c.in.mask = Tensor<4>(DType::boolean, {1, n.H, n.Q, n.K}).fill([&] { return random.chance(0.5); });
  const Tensor<4> out(c.in.query.dtype, c.in.query.size);
  const Tensor<3> lse(DType::float32, {n.B, n.H, n.Q});
  const auto check_refused = [&](const Tensor<4>& bits, const std::string& what) {
    CHECK_REFUSED(forward(c.problem(), {out, lse, bits}, stream), "mask_bits", what);
    CHECK_REFUSED(backward(c.problem(), {out, lse, bits}, {c.grad_out, {}}, {c.in.query, c.in.key, c.in.value, {}},
                           false, stream),
                  "mask_bits", what);
  };
  const Index<4> size{1, n.H, 2, n.K};
  check_refused({DType::float32, size}, "float32, takes int32");
  check_refused({DType::int32, {n.B, n.H, 2, n.K}}, "(2, 2, 2, 48), takes (1, 2, 2, 48)");
  check_refused({DType::int32, {1, n.H, n.Q, n.K}}, "(1, 2, 40, 48), takes (1, 2, 2, 48)");
  check_refused({DType::int32, size, {0, 1, 3, 2}}, "takes a contiguous tensor");
  c.in.mask = Tensor<4>(DType::boolean, {1, 1, 1, n.K}).expand(2, n.Q);  // has no value for each pair
  check_refused({DType::int32, {1, 1, 2, n.K}}, "(1, 1, 2, 48), takes (0, 0, 0, 0)");
  CHECK(stream.launched().empty());
}

}  // namespace
}  // namespace flash_dmattn::cuda
