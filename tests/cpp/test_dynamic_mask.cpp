#include "check.h"
#include "flash_dmattn/dynamic_mask.h"
#include "random_inputs.h"

namespace flash_dmattn::test {
namespace {

const Threads kThreads{.count = 2, .run = {}};

struct Case {
  Tensor<3> score;
  std::optional<Tensor<2>> key_padding_mask;
  std::int64_t keep_window_size = 1, query_len = 0;
  bool is_causal = true;

  DynamicMask mask() const { return {score, key_padding_mask, keep_window_size, query_len, is_causal}; }
  bool selects(std::int64_t b, std::int64_t h, std::int64_t position, std::int64_t key) const {
    return test::selects(score, key_padding_mask, keep_window_size, is_causal, b, h, position, key);
  }
};

Case random_case(Random& random, std::string& description) {
  Case c;
  const std::int64_t B = random.integer(1, 2), heads = random.integer(1, 3),
                     K = random.integer(1, random.pick({6, 60, 130}));
  const DType dtype = random.pick({DType::float32, DType::float64, DType::bfloat16, DType::float16});
  c.keep_window_size =
      random.chance(0.1) ? K + random.integer(0, 2) : random.integer(1, std::max<std::int64_t>(1, K / 2));
  c.query_len = random.chance(0.5) ? K : random.integer(0, 2 * K);
  c.is_causal = random.chance(0.8);
  const int kind = static_cast<int>(random.integer(0, kScoreKinds - 1));
  c.score = Tensor<3>(dtype, {B, heads, K}, random.chance(0.5) ? Index<3>{0, 1, 2} : Index<3>{2, 1, 0});
  c.score.fill(scores(random, kind));
  if (random.chance(0.4)) {
    const double kept = random.pick({0.0, 0.5, 0.9});
    c.key_padding_mask.emplace(DType::boolean, Index<2>{random.pick({B, std::int64_t{1}}), K});
    c.key_padding_mask->fill([&] { return random.chance(kept); });
  }
  std::ostringstream text;
  text << name_of(dtype) << " B " << B << " heads " << heads << " K " << K << " Q " << c.query_len << " w "
       << c.keep_window_size << " causal " << c.is_causal << " scores " << kind << " padding "
       << c.key_padding_mask.has_value();
  description = text.str();
  return c;
}

template <class Visit>
void for_random_cases(Visit visit) {
  for (int seed = 0; seed < random_cases(); ++seed) {
    Random random(seed);
    std::string description;
    const Case c = random_case(random, description);
    Context context("case " + std::to_string(seed) + ": " + description);
    visit(c);
  }
}

TEST(end_says_what_every_query_sees) {
  for_random_cases([](const Case& c) {
    const std::int64_t K = c.score.size[2], first = K - c.query_len;
    Tensor<3> end(DType::int32, c.score.size);
    make_dynamic_mask(c.mask(), end, {}, kThreads);
    end.for_each([&](const Index<3>& i) {
      const auto [b, h, k] = i;
      const auto e = static_cast<std::int64_t>(end.at(i));
      bool ever = false;
      for (std::int64_t p = first; p < K; ++p) {
        const bool sees = (!c.is_causal || k <= p) && p < e;
        const bool selected = c.selects(b, h, p, k);
        ever = ever || selected;
        CHECK_EQUAL(sees, selected);
      }
      if (c.is_causal) CHECK(e >= k && e <= K);
      if (c.is_causal && c.query_len >= K && !ever) CHECK_EQUAL(e, k);
      if (!c.is_causal && c.query_len > 0) CHECK_EQUAL(e, ever ? K : std::min<std::int64_t>(0, first));
    });
  });
}

TEST(threshold_is_the_wth_best_key_of_every_prefix) {
  for_random_cases([](Case c) {
    c.is_causal = true;
    Tensor<3> end(DType::int32, c.score.size), threshold(DType::int32, c.score.size);
    make_dynamic_mask(c.mask(), end, threshold, kThreads);
    threshold.for_each([&](const Index<3>& i) {
      const std::int64_t b = i[0], h = i[1], p = i[2];
      std::vector<std::int64_t> keys;
      for (std::int64_t k = 0; k <= p; ++k)
        if (!c.key_padding_mask || c.key_padding_mask->at({b, k}) != 0) keys.push_back(k);
      std::sort(keys.begin(), keys.end(), [&](std::int64_t j, std::int64_t k) {
        return beats(c.score.at({b, h, j}), j, c.score.at({b, h, k}), k);
      });
      const bool full = static_cast<std::int64_t>(keys.size()) >= c.keep_window_size;
      CHECK_EQUAL(static_cast<std::int64_t>(threshold.at(i)), full ? keys[c.keep_window_size - 1] : -1);
    });
  });
}

TEST(select_keys_takes_the_best_of_each_row) {
  for (int seed = 0; seed < random_cases(); ++seed) {
    Random random(seed);
    const std::int64_t B = random.integer(1, 2), heads = random.integer(1, 3), Q = random.integer(1, 30),
                       K = random.integer(1, 50), w = random.integer(1, K + 1);
    const bool is_causal = random.chance(0.5);
    const auto size = [&] {
      return Index<4>{random.pick({B, std::int64_t{1}}), random.pick({heads, std::int64_t{1}}),
                      random.pick({Q, std::int64_t{1}}), K};
    };
    Tensor<4> score(random.pick({DType::float32, DType::bfloat16, DType::float64}), size());
    score.fill([&] { return random.chance(0.02) ? kNaN : std::round(2 * random.normal()); });
    std::optional<Tensor<4>> visible;
    if (random.chance(0.6)) visible = Tensor<4>(DType::boolean, size()).fill([&] { return random.chance(0.6); });
    Tensor<4> selected(DType::boolean, {B, heads, Q, K});
    select_keys(score, visible, w, is_causal, selected, kThreads);
    Context context("case " + std::to_string(seed));
    selected.for_each([&](const Index<4>& i) {
      const auto may_see = [&](std::int64_t k) {
        return (!is_causal || k <= i[2] + K - Q) && (!visible || visible->at({i[0], i[1], i[2], k}) != 0);
      };
      std::int64_t better = 0;
      for (std::int64_t j = 0; j < K; ++j)
        better += may_see(j) && beats(score.at({i[0], i[1], i[2], j}), j, score.at(i), i[3]);
      CHECK_EQUAL(selected.at(i) != 0, may_see(i[3]) && better < w);
    });
  }
}

TEST(equal_scores_are_a_sliding_window) {
  Tensor<3> score(DType::bfloat16, {1, 1, 1000}), end(DType::int32, {1, 1, 1000});
  score.fill([] { return 0.5; });
  make_dynamic_mask({score, {}, 100, 1000, true}, end, {}, kThreads);
  end.for_each([&](const Index<3>& i) { CHECK_EQUAL(end.at(i), std::min<double>(i[2] + 100, 1000)); });
}

TEST(the_same_for_any_threads) {
  Random random(9);
  Tensor<3> score(DType::float32, {2, 3, 5000}), expected(DType::int32, score.size);
  score.fill([&] { return random.normal(); });
  make_dynamic_mask({score, {}, 300, 5000, true}, expected, {}, {.count = 1, .run = {}});
  for (int count : {2, 3, 16}) {
    Tensor<3> end(DType::int32, score.size);
    make_dynamic_mask({score, {}, 300, 5000, true}, end, {}, {.count = count, .run = {}});
    CHECK(same_bits(end, expected));
  }
}

TEST(no_keys_and_no_batches) {
  for (Index<3> size : {Index<3>{0, 2, 5}, Index<3>{2, 2, 0}, Index<3>{2, 0, 5}}) {
    Tensor<3> score(DType::float32, size), end(DType::int32, size);
    make_dynamic_mask({score, {}, 3, 5, true}, end, {}, kThreads);
    make_dynamic_mask({score, {}, 3, 5, false}, end, {}, kThreads);
  }
}

}  // namespace
}  // namespace flash_dmattn::test
