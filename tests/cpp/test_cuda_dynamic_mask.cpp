// The dynamic mask and the selection of keys on emulated GPUs, against the CPU engine, which has tests of its own.
#include <set>

#include "check.h"
#include "emulator.h"
#include "flash_dmattn/cuda.h"
#include "mask/dynamic_mask.cuh"
#include "mask/select.cuh"
#include "random_inputs.h"

namespace flash_dmattn::cuda {
namespace {

EMULATE(SortKeys<ScoreType::float16>);
EMULATE(SortKeys<ScoreType::bfloat16>);
EMULATE(SortKeys<ScoreType::float32>);
EMULATE(SortKeys<ScoreType::float64>);
EMULATE(FindEnds<ScoreType::float16>);
EMULATE(FindEnds<ScoreType::bfloat16>);
EMULATE(FindEnds<ScoreType::float32>);
EMULATE(FindEnds<ScoreType::float64>);
EMULATE(ScanLists<u32, true>);
EMULATE(ScanLists<u32, false>);
EMULATE(ScanLists<u64, true>);
EMULATE(ScanLists<u64, false>);
EMULATE(KeepBest<u32>);
EMULATE(KeepBest<u64>);
EMULATE(KeepAll);
EMULATE(SelectKeys<ScoreType::float16>);
EMULATE(SelectKeys<ScoreType::bfloat16>);
EMULATE(SelectKeys<ScoreType::float32>);
EMULATE(SelectKeys<ScoreType::float64>);

using namespace test;

const Threads kThreads{.count = 2, .run = {}};
constexpr std::initializer_list<DType> kDTypes = {DType::float16, DType::bfloat16, DType::float32, DType::float64};

/// `end` is the CPU's; the survivors are those keys before the chunk whose end is not before it.
void check_mask(const DynamicMask& mask, Stream& stream) {
  const auto [B, heads, K] = mask.score.size;
  Tensor<3> expected(DType::int32, mask.score.size), end(DType::int32, mask.score.size, {2, 0, 1});
  flash_dmattn::make_dynamic_mask(mask, expected, {}, kThreads);
  const std::int64_t chunk = survivor_chunk(mask.keep_window_size), chunks = (K + chunk - 1) / chunk,
                     slots = std::min(mask.keep_window_size, K);
  std::optional<Tensor<4>> survivors;
  if (mask.is_causal) survivors.emplace(DType::int32, Index<4>{B, heads, chunks, slots});
  make_dynamic_mask(mask, end, survivors, stream);
  expected.for_each([&](const Index<3>& i) { CHECK_EQUAL(end.at(i), expected.at(i)); });
  if (!survivors) return;
  for (std::int64_t b = 0; b < B; ++b)
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t c = 0; c < chunks; ++c) {
        std::set<std::int64_t> alive, listed;
        for (std::int64_t k = 0; k < c * chunk; ++k)
          if (expected.at({b, h, k}) >= static_cast<double>(c * chunk)) alive.insert(k);
        std::int64_t none = 0;
        for (std::int64_t i = 0; i < slots; ++i) {
          const auto k = static_cast<std::int64_t>(survivors->at({b, h, c, i}));
          if (k == -1)
            ++none;
          else
            listed.insert(k);
        }
        CHECK(listed == alive);
        CHECK_EQUAL(none + static_cast<std::int64_t>(listed.size()), slots);
      }
}

struct Case {
  Tensor<3> score;
  std::optional<Tensor<2>> key_padding_mask;

  DynamicMask mask(std::int64_t w, bool is_causal = true) const {
    return {score, key_padding_mask, w, score.size[2], is_causal};
  }
};

Case make_case(Random& random, DType dtype, Index<3> size, int kind, double padding = 0) {
  Case c{Tensor<3>(dtype, size, random.chance(0.5) ? Index<3>{0, 1, 2} : Index<3>{2, 1, 0}), {}};
  c.score.fill(scores(random, kind));
  if (padding > 0)
    c.key_padding_mask = Tensor<2>(DType::boolean, {random.pick({size[0], std::int64_t{1}}), size[2]}).fill([&] {
      return !random.chance(padding);
    });
  return c;
}

TEST(dynamic_mask_of_random_scores) {
  for (int seed = 0; seed < random_cases(); ++seed) {
    Random random(seed);
    const Index<3> size{random.integer(1, 2), random.integer(1, 2),
                        random.integer(1, random.pick({20, 700, 2100, 5000}))};
    const DType dtype = random.pick(kDTypes);
    const int kind = static_cast<int>(random.integer(0, kScoreKinds - 1));
    const double padding = random.pick({0.0, 0.0, 0.1, 1.0});
    const std::int64_t w = random.integer(1, random.chance(0.2) ? size[2] + 1 : random.pick({3, 100, 1000, 3000}));
    const Case c = make_case(random, dtype, size, kind, padding);
    DynamicMask mask = c.mask(w, random.chance(0.8));
    mask.query_len = random.integer(0, 2 * size[2]);
    std::ostringstream text;
    text << "case " << seed << ": " << name_of(dtype) << " (" << size[0] << ", " << size[1] << ", " << size[2] << ") w "
         << w << " causal " << mask.is_causal << " scores " << kind << " padding " << padding;
    Context context(text.str());
    EmulatedStream stream(random.pick({80, 86, 90}));
    stream.seed(static_cast<unsigned>(seed));
    check_mask(mask, stream);
  }
}

// 18 groups and more are a tree of two levels above the groups; a wide window passes through global memory, and its
// survivors are where they are whole: at the root, or below it.
TEST(dynamic_mask_of_long_rows) {
  Random random(1);
  for (int kind : {0, 1, 3}) {
    const Case c = make_case(random, DType::bfloat16, {1, 1, 18 * 2048 + 100}, kind, kind == 1 ? 0.3 : 0);
    for (std::int64_t w : {1, 300, 1024, 2048, 2049, 5000, 20000}) {
      Context context("scores " + std::to_string(kind) + " w " + std::to_string(w));
      EmulatedStream stream(86);
      check_mask(c.mask(w), stream);
      check_mask(c.mask(w, false), stream);
    }
  }
  EmulatedStream stream;
  check_mask(make_case(random, DType::float64, {1, 1, 18 * 2048}, 1).mask(4000), stream);
}

TEST(dynamic_mask_of_nothing) {
  EmulatedStream stream;
  for (Index<3> size : {Index<3>{0, 2, 5}, Index<3>{2, 2, 0}, Index<3>{2, 0, 5}}) {
    const Tensor<3> score(DType::float32, size), end(DType::int32, size);
    for (bool is_causal : {false, true}) make_dynamic_mask({score, {}, 3, 5, is_causal}, end, {}, stream);
  }
}

TEST(dynamic_mask_refuses) {
  EmulatedStream stream;
  const Tensor<3> score(DType::float32, {1, 2, 600}), end(DType::int32, {1, 2, 600});
  const Tensor<4> survivors(DType::int32, {1, 2, 2, 10}), short_survivors(DType::int32, {1, 2, 1, 10});
  CHECK_EQUAL(survivor_chunk(10), 512);
  CHECK_REFUSED(make_dynamic_mask({score, {}, 0, 600, true}, end, {}, stream), "keep_window_size", "at least 1");
  CHECK_REFUSED(make_dynamic_mask({score, {}, 10, 600, true}, end, short_survivors, stream), "survivors", "(1, 2, 2");
  CHECK_REFUSED(make_dynamic_mask({score, {}, 10, 600, false}, end, survivors, stream), "survivors", "causal");
}

TEST(survivors_are_few) {
  for (std::int64_t w : {1, 500, 512, 1024, 1025, 2048, 2049, 100000, 1 << 30}) {
    CHECK(survivor_chunk(w) >= 512);
    CHECK(2 * survivor_chunk(w) >= w);
  }
}

TEST(select_keys_as_the_cpu) {
  for (int seed = 0; seed < random_cases(); ++seed) {
    Random random(seed);
    const std::int64_t B = random.integer(1, 2), heads = random.integer(1, 3), Q = random.integer(1, 10),
                       K = random.integer(1, random.pick({40, 700})), w = random.integer(1, K + 1);
    const bool is_causal = random.chance(0.5);
    const auto size = [&] {
      const auto or_one = [&](std::int64_t n) { return random.pick({n, std::int64_t{1}}); };
      return Index<4>{or_one(B), or_one(heads), or_one(Q), random.chance(0.9) ? K : 1};
    };
    const auto order = [&] { return random.pick({Index<4>{0, 1, 2, 3}, Index<4>{3, 1, 0, 2}}); };
    const DType dtype = random.pick(kDTypes);
    Tensor<4> score(dtype, size(), order());
    score.fill(scores(random, static_cast<int>(random.integer(0, kScoreKinds - 1))));
    std::optional<Tensor<4>> visible;
    const double kept = random.pick({0.0, 0.6, 1.0});
    if (random.chance(0.6))
      visible = Tensor<4>(DType::boolean, size(), order()).fill([&] { return random.chance(kept); });
    const Tensor<4> expected(DType::boolean, {B, heads, Q, K}), selected(DType::boolean, {B, heads, Q, K}, order());
    flash_dmattn::select_keys(score, visible, w, is_causal, expected, kThreads);
    Context context("case " + std::to_string(seed) + ": " + name_of(dtype));
    EmulatedStream stream;
    select_keys(score, visible, w, is_causal, selected, stream);
    selected.for_each([&](const Index<4>& i) { CHECK_EQUAL(selected.at(i), expected.at(i)); });
  }
}

TEST(select_keys_of_rows_longer_than_shared_memory) {
  Random random(2);
  const Index<4> size{1, 1, 2, 30000};
  for (int kind : {0, 1, 2}) {
    Tensor<4> score(DType::float32, size), expected(DType::boolean, size), selected(DType::boolean, size);
    score.fill(scores(random, kind));
    EmulatedStream stream(86);
    for (std::int64_t w : {1, 7000, 29999}) {
      flash_dmattn::select_keys(score, {}, w, true, expected, kThreads);
      select_keys(score, {}, w, true, selected, stream);
      CHECK(same_bits(selected, expected));
    }
  }
}

}  // namespace
}  // namespace flash_dmattn::cuda
