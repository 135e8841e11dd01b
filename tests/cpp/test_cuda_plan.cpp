// Plans made on the device, by the emulator: every pair of a query and a key against the definition of the mask.
#include <algorithm>
#include <numeric>
#include <set>

#include "check.h"
#include "emulator.h"
#include "layout/copy_rows.cuh"
#include "layout/repeat.cuh"
#include "mask/plan_bits.cuh"
#include "mask/plan_columns.cuh"
#include "mask/plan_survivors.cuh"
#include "plan.h"
#include "reference.h"
#include "rows.h"

namespace flash_dmattn::cuda {
EMULATE(BitLists);
EMULATE(ColumnLists);
EMULATE(CopyRows);
EMULATE(PackMask);
EMULATE(PackSavedMask);
EMULATE(Repeat<int>);
EMULATE(Repeat<unsigned char>);
EMULATE(SurvivorLists);
}  // namespace flash_dmattn::cuda

namespace flash_dmattn::test {
namespace {

using cuda::EmulatedStream;

const Threads kThreads{.count = 1, .run = {}};

/// A problem without numbers: what matters to a plan.
struct Case {
  std::int64_t B = 1, Q = 1, K = 1, H = 1, Hk = 1;
  bool is_causal = false;
  std::optional<Tensor<4>> mask, bias, survivors;
  std::optional<Tensor<3>> end;
  Tensor<4> query, key;

  Problem problem() {
    query = Tensor<4>(DType::bfloat16, {B, Q, H, 8});
    key = Tensor<4>(DType::bfloat16, {B, K, Hk, 8});
    return {.query = query,
            .key = key,
            .value = key,
            .mask = mask,
            .bias = bias,
            .end = end,
            .survivors = survivors,
            .is_causal = is_causal};
  }
  std::int64_t head(std::int64_t count, std::int64_t h) const { return count == Hk ? h / (H / Hk) : h; }
  bool visible(std::int64_t b, std::int64_t h, std::int64_t q, std::int64_t k) const {
    const std::int64_t p = q + K - Q;
    return (!mask || mask->at({b, head(mask->size[1], h), q, k}) != 0) && (!is_causal || k <= p) &&
           (!end || p < end->at({b, head(end->size[1], h), k}));
  }
};

cuda::Runs runs_of(const Case& c, int length, bool is_short_first) {
  return (is_short_first ? cuda::Runs::short_first : cuda::Runs::short_last)(static_cast<int>(c.Q), length);
}
cuda::Runs runs_of(const Case& c, int length) { return runs_of(c, length, c.Q % 2 == 0); }

/// Holds every list of the plan against the definition. `exact`: no key is listed, and none is tested, in vain.
void check_plan(Case& c, const cuda::Runs& runs, int rows, EmulatedStream& stream, bool exact,
                const cuda::MaskBits& mask_bits = {}) {
  const Problem problem = c.problem();
  const cuda::Shape shape = cuda::make_shape(problem, rows);
  const cuda::Test test = cuda::test_of(problem);
  const auto [plan, longest] = cuda::make_plan(problem, shape, runs, stream, mask_bits);
  CHECK(runs.first(0) == 0 && runs.stop(runs.count - 1) == c.Q);
  CHECK(shape.pack >= 1 && shape.pack <= rows && (c.H / c.Hk) % shape.pack == 0);
  int wrong = 0;
  for (int b = 0; b < c.B; ++b)
    for (int unit = 0; unit < shape.units(); ++unit)
      for (int r = 0; r < plan.runs.count; ++r) {
        CHECK(runs.size(r) > 0 && runs.size(r) <= runs.length && (r == 0 || runs.first(r) == runs.stop(r - 1)));
        const cuda::KeyList list = plan.list(shape, b, unit, r);
        wrong += list.full < 0 || list.full > list.count || list.count > longest;
        if (wrong) break;
        std::vector<int> entry(c.K, -1);
        for (int j = 0; j < list.count; ++j) {
          const int key = plan.key(list, j);
          wrong += key < 0 || key >= c.K || entry[key] >= 0;
          if (key >= 0 && key < c.K) entry[key] = j;
        }
        for (int key = 0; key < c.K; ++key) {
          bool in_vain = entry[key] >= 0, seen_by_all = true;
          for (int i = 0; i < runs.size(r); ++i) {
            const int q = runs.first(r) + i, p = q + shape.first_position();
            bool seen = entry[key] >= 0 && !plan.is_hidden(b, unit, q);
            if (seen && entry[key] >= list.full) {
              const auto [start, end] = plan.interval(b, unit, key);
              seen = test == cuda::Test::interval
                         ? start <= p && p < end
                         : plan.bits[(list.offset + entry[key]) * plan.words + i / 32] >> i % 32 & 1;
            }
            for (int h = unit * shape.pack; h < (unit + 1) * shape.pack; ++h) {
              wrong += seen != c.visible(b, h, q, key);
              in_vain &= !c.visible(b, h, q, key);
              seen_by_all &= c.visible(b, h, q, key);
            }
          }
          wrong += exact && (in_vain || (seen_by_all && entry[key] >= list.full));
        }
      }
  CHECK_EQUAL(wrong, 0);
}

bool has_launched(const EmulatedStream& stream, const std::string& kernel) {
  const auto& names = stream.launched();
  return std::find(names.begin(), names.end(), kernel) != names.end();
}

Tensor<4> boolean(Random& random, Index<4> size, double density) {
  return Tensor<4>(DType::boolean, size).fill([&] { return random.chance(density); });
}

Tensor<3> dynamic_end(Random& random, const Index<3>& size, std::int64_t window, std::int64_t query_len,
                      bool is_causal) {
  Tensor<3> score(DType::float32, size), end(DType::int32, size);
  score.fill([&] { return std::round(4 * random.normal()); });  // with ties
  std::optional<Tensor<2>> padding;
  if (random.chance(0.3)) padding = Tensor<2>(DType::boolean, {1, size[2]}).fill([&] { return random.chance(0.8); });
  make_dynamic_mask({score, padding, window, query_len, is_causal}, end, {}, kThreads);
  return end;
}

/// The keys that are visible at the last position before each chunk, in any order.
Tensor<4> survivors_of(Random& random, const Tensor<3>& end, std::int64_t window) {
  const std::int64_t K = end.size[2], chunk = cuda::survivor_chunk(window);
  Tensor<4> survivors(DType::int32, {end.size[0], end.size[1], (K + chunk - 1) / chunk, std::min(window, K)});
  survivors.fill([] { return -1; });
  for (std::int64_t b = 0; b < end.size[0]; ++b)
    for (std::int64_t h = 0; h < end.size[1]; ++h)
      for (std::int64_t c = 0; c < survivors.size[2]; ++c) {
        std::vector<std::int64_t> slots(survivors.size[3]);
        std::iota(slots.begin(), slots.end(), 0);
        std::shuffle(slots.begin(), slots.end(), std::minstd_rand(static_cast<unsigned>(random.integer(0, 1 << 20))));
        std::size_t used = 0;
        for (std::int64_t k = 0; k < c * chunk; ++k)
          if (end.at({b, h, k}) >= c * chunk) survivors.set({b, h, c, slots[used++]}, static_cast<double>(k));
      }
  return survivors;
}

/// A head count that a mask may have.
std::int64_t heads(Random& random, const Case& c) { return random.pick({std::int64_t{1}, c.Hk, c.H}); }
std::int64_t batch(Random& random, const Case& c) { return random.pick({std::int64_t{1}, c.B}); }

Case random_case(Random& random, std::int64_t longest) {
  Case c;
  c.B = random.integer(1, 2);
  c.Hk = random.integer(1, 2);
  c.H = c.Hk * random.pick({1, 2, 3, 4});
  c.K = random.integer(1, longest);
  c.Q = random.chance(0.4) ? c.K : random.chance(0.3) ? 1 : random.integer(1, c.K + 20);
  c.is_causal = random.chance(0.6);
  return c;
}

template <class Visit>
void for_random_cases(int cases, Visit visit) {
  for (int seed = 0; seed < cases; ++seed) {
    Random random(seed);
    Context context("case " + std::to_string(seed));
    visit(random);
  }
}

TEST(divisions_by_multiplication) {
  const int extremes[] = {1, 2, 3, 7, 8, 641, 65535, 65536, cuda::kLargest - 1, cuda::kLargest};
  const auto check = [](int n, int value) { CHECK_EQUAL(cuda::Divisor::of(value).quotient(n), n / value); };
  for (const int value : extremes) {
    check(0, value);
    for (const int n : extremes) check(n, value);
  }
  for_random_cases(random_cases(), [&](Random& random) {
    const int value = random.integer(1, cuda::kLargest), n = random.integer(0, cuda::kLargest);
    check(n, value);
    check(n, value >> random.integer(0, 30) | 1);
    check(n / value * value, value);
  });
}

TEST(spans_columns_and_rows) {
  for_random_cases(random_cases(), [](Random& random) {
    Case c = random_case(random, random.pick({20, 150}));
    const int kind = static_cast<int>(random.integer(0, 3));
    if (kind == 1)
      c.mask = boolean(random, {batch(random, c), heads(random, c), 1, random.pick({c.K, c.K, std::int64_t{1}})},
                       random.pick({0.0, 0.5, 1.0}));
    if (kind == 2) c.mask = boolean(random, {batch(random, c), heads(random, c), c.Q, 1}, 0.7);
    if (c.mask && kind == 1 && random.chance(0.3)) c.mask = c.mask->expand(2, c.Q);
    if (random.chance(0.5))
      c.end = dynamic_end(random, {batch(random, c), heads(random, c), c.K}, random.integer(1, c.K + 1), c.Q,
                          random.chance(0.6));
    if (random.chance(0.2)) c.bias = Tensor<4>(DType::float32, {c.B, heads(random, c), 1, c.K});
    EmulatedStream stream;
    check_plan(c, runs_of(c, static_cast<int>(random.pick({1, 8, 42, 64, 512}))),
               static_cast<int>(random.pick({1, 2, 64})), stream, false);
  });
}

TEST(columns_of_many_slices) {
  for (const bool is_causal : {false, true})
    for (const bool dynamic : {false, true}) {
      Random random(1);
      Case c;
      c.K = 33000;
      c.Q = 40;
      c.is_causal = is_causal;
      c.mask = boolean(random, {1, 1, 1, c.K}, 0.5);
      if (dynamic) c.end = dynamic_end(random, {1, 1, c.K}, 500, c.Q, false);
      EmulatedStream stream;
      check_plan(c, runs_of(c, 16), 64, stream, false);
      CHECK_EQUAL(stream.launched().size(), std::size_t{2});
    }
}

TEST(lists_of_survivors) {
  for_random_cases(random_cases(), [](Random& random) {
    Case c = random_case(random, random.pick({150, 1500}));
    c.is_causal = true;
    if (c.K > 200) {
      c.B = c.Hk = 1;
      c.H = random.pick({1, 2});
      c.Q = random.integer(1, 300);
    }
    const std::int64_t window = random.integer(1, std::min<std::int64_t>(c.K, random.pick({8, 40, 400})));
    c.end = dynamic_end(random, {batch(random, c), heads(random, c), c.K}, window, c.Q, true);
    c.survivors = survivors_of(random, *c.end, window);
    const int kind = static_cast<int>(random.integer(0, 3));
    if (kind == 1) c.mask = boolean(random, {batch(random, c), heads(random, c), 1, c.K}, 0.7);
    if (kind == 2) c.mask = boolean(random, {batch(random, c), heads(random, c), c.Q, 1}, 0.7);
    EmulatedStream stream;
    check_plan(c, runs_of(c, static_cast<int>(random.pick({1, 8, 42, 64, 512}))),
               static_cast<int>(random.pick({1, 2, 64})), stream, window < c.K && kind != 2);
  });
}

/// Whatever survivors and ends hold, lists stay within their room and name keys that exist.
TEST(survivors_of_nonsense) {
  for_random_cases(random_cases() / 4, [](Random& random) {
    Case c;
    c.K = random.integer(20, 900);
    c.Q = random.integer(1, c.K);
    c.is_causal = true;
    const std::int64_t window = random.integer(1, 19), chunk = cuda::survivor_chunk(window);
    const double common = static_cast<double>(random.pick({c.K, random.integer(0, c.K)}));
    c.end =
        Tensor<3>(DType::int32, {1, 1, c.K}).fill([&] { return random.chance(0.95) ? common : random.normal() * 1e9; });
    c.survivors = Tensor<4>(DType::int32, {1, 1, (c.K + chunk - 1) / chunk, window}).fill([&] {
      return random.chance(0.5) ? random.normal() * 1e9 : static_cast<double>(random.integer(-2, 10));
    });
    const Problem problem = c.problem();
    EmulatedStream stream;
    const cuda::Shape shape = cuda::make_shape(problem, 64);
    const auto [plan, longest] = cuda::make_plan(
        problem, shape, cuda::Runs::short_first(shape.query_len, static_cast<int>(random.pick({8, 64}))), stream);
    for (int r = 0; r < plan.runs.count; ++r) {
      const cuda::KeyList list = plan.list(shape, 0, 0, r);
      CHECK(list.full >= 0 && list.full <= list.count && list.count <= (longest + 127) / 128 * 128);
      for (int j = 0; j < list.count; ++j) CHECK(plan.key(list, j) >= 0 && plan.key(list, j) < c.K);
    }
  });
}

/// A mask with a value for each pair, and sometimes a dynamic one.
void draw_dense_mask(Random& random, Case& c) {
  c.Q = std::max<std::int64_t>(c.Q, 2);
  c.K = std::max<std::int64_t>(random.chance(0.5) ? c.K / 16 * 16 : c.K, 2);
  const Index<4> size{batch(random, c), heads(random, c), c.Q, c.K};
  const Index<4> order = random.chance(0.8) ? Index<4>{0, 1, 2, 3} : Index<4>{1, 3, 0, 2};
  Tensor<4> mask(DType::boolean, size, order, random.pick({0, 0, 16, 5}));
  const double density = random.pick({0.0, 0.02, 0.5, 0.98, 1.0});
  const std::int64_t block = random.pick({1, 40});  // full and empty parts, too
  mask.for_each([&](const Index<4>& i) {
    const bool first = i[2] % block == 0 && i[3] % block == 0;
    mask.set(i, first ? random.chance(density) : mask.at({i[0], i[1], i[2] - i[2] % block, i[3] - i[3] % block}));
    // Any byte but 0 is true.
    if (mask.at(i) != 0 && random.chance(0.5)) *mask.element(i) = static_cast<std::byte>(random.integer(1, 255));
  });
  c.mask = mask;
  if (random.chance(0.4))
    c.end = dynamic_end(random, {batch(random, c), heads(random, c), c.K}, random.integer(1, c.K + 1), c.Q,
                        random.chance(0.6));
}

Case random_dense_case(Random& random) {
  Case c = random_case(random, random.pick({20, 150, 1300}));
  if (c.K > 150) {
    c.B = c.Hk = 1;
    c.H = random.pick({1, 2});
    c.Q = random.integer(2, 100);
  }
  draw_dense_mask(random, c);
  return c;
}

TEST(bits_of_dense_masks) {
  for_random_cases(random_cases() / 2, [](Random& random) {
    Case c = random_dense_case(random);
    EmulatedStream stream;
    check_plan(c, runs_of(c, static_cast<int>(random.pick({1, 8, 42, 64, 128, 512, 1000}))),
               static_cast<int>(random.pick({1, 2, 64})), stream, true);
  });
}

/// Lists of one pass's runs, and of other runs from what the first left.
TEST(bits_saved_for_another_pass) {
  for_random_cases(random_cases(), [](Random& random) {
    Case c = random_dense_case(random);
    if (random.chance(0.3)) {  // runs of many words
      c = Case{.K = random.integer(2, 300), .H = random.pick({1, 2}), .is_causal = random.chance(0.7)};
      c.Q = random.integer(1, 1500);
      draw_dense_mask(random, c);
    }
    const Index<4> kept = c.mask->size;
    if (random.chance(0.3))
      for (const int i : {0, 1})
        if (c.mask->size[i] == 1) c.mask = c.mask->expand(i, i == 0 ? c.B : c.H);
    const Index<4> size = cuda::mask_bits_size(c.problem());
    CHECK((size == Index<4>{kept[0], kept[1], (c.Q + 31) / 32, c.K}));
    Tensor<4> bits(DType::int32, size);
    const auto runs = [&] {
      return runs_of(c, static_cast<int>(random.pick({1, 8, 42, 64, 96, 128, 512, 1000, 1024})), random.chance(0.5));
    };
    const int rows = static_cast<int>(random.pick({1, 2, 64}));
    EmulatedStream stream;
    check_plan(c, runs(), rows, stream, true, {.to_save = bits});
    CHECK(!has_launched(stream, "PackSavedMask"));
    bits.for_each([&](const Index<4>& i) {
      for (std::int64_t q = 32 * i[2]; q < std::min(32 * i[2] + 32, c.Q); ++q) {
        const bool bit = static_cast<std::uint32_t>(static_cast<std::int32_t>(bits.at(i))) >> q % 32 & 1;
        const bool is_hidden = c.is_causal && i[3] > q + c.K - c.Q;
        CHECK(is_hidden || bit == (c.mask->at({i[0], i[1], q, i[3]}) != 0));
      }
    });
    EmulatedStream other;
    check_plan(c, runs(), rows, other, true, {.saved = bits});
    CHECK(has_launched(other, "PackSavedMask") && !has_launched(other, "PackMask"));
  });
}

/// Runs that begin inside a word and have more words than a thread reads at a time.
TEST(bits_saved_for_longer_runs) {
  for (const std::int64_t K : {700, 701})
    for (const bool is_causal : {false, true}) {
      Random random(1);
      Case c{.Q = 700, .K = K, .is_causal = is_causal};
      c.mask = boolean(random, {1, 1, c.Q, c.K}, 0.5);
      const Tensor<4> bits(DType::int32, cuda::mask_bits_size(c.problem()));
      EmulatedStream stream;
      check_plan(c, runs_of(c, 48, true), 64, stream, true, {.to_save = bits});
      check_plan(c, runs_of(c, 330, false), 64, stream, true, {.saved = bits});
      check_plan(c, runs_of(c, 512, true), 64, stream, true, {.saved = bits});
    }
}

TEST(bits_of_more_lists_than_are_made_at_a_time) {
  Random random(1);
  Case c;
  c.Q = 520;
  c.K = 20;
  c.mask = boolean(random, {1, 1, c.Q, c.K}, 0.5);
  EmulatedStream stream;
  check_plan(c, runs_of(c, 1), 64, stream, true);
  CHECK_EQUAL(stream.launched().size(), std::size_t{4});
}

TEST(survivors_of_another_mask_are_refused) {
  Random random(1);
  Case c;
  c.K = c.Q = 64;
  c.is_causal = true;
  c.end = dynamic_end(random, {1, 1, c.K}, 8, c.Q, true);
  c.survivors = Tensor<4>(DType::int32, {1, 1, 60, 8});
  const Problem problem = c.problem();
  EmulatedStream stream;
  const auto runs = cuda::Runs::short_first(64, 8);
  CHECK_REFUSED(cuda::make_plan(problem, cuda::make_shape(problem, 64), runs, stream), "survivors", "64 keys");
}

TEST(empty_problems_have_plans) {
  for (const auto& [B, Q, K] : {std::array<std::int64_t, 3>{0, 4, 4}, {1, 0, 4}, {1, 4, 0}}) {
    Case c;
    c.B = B, c.Q = Q, c.K = K;
    c.mask = Tensor<4>(DType::boolean, {B, 1, Q, K});
    EmulatedStream stream;
    check_plan(c, runs_of(c, 8), 64, stream, true);
    CHECK(stream.launched().empty());
  }
}

TEST(rows_of_any_layout) {
  for_random_cases(random_cases(), [](Random& random) {
    const std::int64_t D = random.pick({8, 16, 24, 3, 65}), gap = random.pick({0, 8, 1});
    const Index<4> size{random.integer(1, 2), random.integer(1, 5), random.integer(1, 3), D};
    const Index<4> order = random.chance(0.5) ? Index<4>{0, 1, 2, 3} : Index<4>{0, 2, 1, 3};
    Tensor<4> in(DType::float16, size, order, gap);
    in.fill([&] { return random.normal(); });
    if (random.chance(0.3)) in.size[0] = 1, in = in.expand(0, size[0]);
    EmulatedStream stream;
    const std::int64_t padded = cuda::padded_dim(D);
    const auto bits = [](const void* p) { return *static_cast<const std::uint16_t*>(p); };
    const cuda::Rows rows = cuda::aligned_input(in, stream);
    CHECK(reinterpret_cast<std::uintptr_t>(rows.data) % 16 == 0 && rows.position % 8 == 0 && rows.head % 8 == 0);
    in.for_each([&](const Index<4>& i) {
      const auto* row = rows.at<std::uint16_t>(static_cast<int>(i[0]), static_cast<int>(i[1]), static_cast<int>(i[2]));
      CHECK_EQUAL(row[i[3]], bits(in.element(i)));
      for (std::int64_t d = D; d < padded; ++d) CHECK_EQUAL(row[d], 0);
    });
    Tensor<4> out(DType::float16, size, order, gap);
    const cuda::Rows written = cuda::aligned_output(out, stream);
    in.for_each([&](const Index<4>& i) {
      auto* row = written.at<std::uint16_t>(static_cast<int>(i[0]), static_cast<int>(i[1]), static_cast<int>(i[2]));
      row[i[3]] = bits(in.element(i));
    });
    cuda::write_back(written, out, stream);
    CHECK(difference(out, in) == 0);
  });
}

}  // namespace
}  // namespace flash_dmattn::test
