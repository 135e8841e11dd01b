// The forward pass of one chunk: for every block of its keys, for every tile of its rows: scores, online softmax,
// values.
#pragma once
#include "cpu/kernel/arithmetic.h"

namespace flash_dmattn::cpu::FLASH_DMATTN_ISA {

template <class Arithmetic>
class Forward {
  using T = typename Arithmetic::Sum;

 public:
  static std::size_t scratch(const Chunk& largest) {
    Scratch size(nullptr);
    Forward(size, largest);
    return size.size();
  }

  static void run(const ForwardTask& task, void* memory) {
    Scratch scratch(memory);
    Forward forward(scratch, task.chunk);
    forward.attend(task);
    if (task.out.data != nullptr)
      forward.write(task);
    else
      forward.write_partial(task);
  }

  static void combine(const ForwardTask& task, const void* partials, std::int64_t count, std::size_t stride);

 private:
  Forward(Scratch& scratch, const Chunk& chunk)
      : tiles_(chunk, Arithmetic::kRows),
        logit_(chunk.scale, chunk.softcap),
        query_key_(scratch, chunk),
        values_(scratch, chunk, tiles_),
        positions_(scratch, chunk),
        bias_(scratch, chunk, tiles_.most_rows()),
        scores_(scratch.take<T>(tiles_.most_rows() * kScoreRow)),
        sum_(scratch.take<T>(chunk.queries * chunk.pack * values_.width)),
        row_base_(scratch.take<T>(chunk.queries * chunk.pack)),
        row_sum_(scratch.take<T>(chunk.queries * chunk.pack * kLanes<T>)) {}

  void attend(const ForwardTask& task) {
    const Chunk& chunk = task.chunk;
    begin(chunk);
    Arithmetic::begin();
    query_key_.load_query(chunk, chunk.query);
    positions_.read(chunk);
    for (std::int64_t first = task.first_key; first < task.last_key; first += kBlock) {
      block_.read(chunk, first, task.last_key);
      bias_.read(chunk, block_);
      bool loaded = false;
      for (std::int64_t t = 0; t < tiles_.count(); ++t) {
        const Tile tile = tiles_[t];
        const Tests tests = positions_.tests(block_, tile);
        if (tests.empty()) continue;
        if (!loaded) {
          query_key_.load_keys(chunk, chunk.key, block_);
          values_.load(chunk, chunk.value, block_);
          loaded = true;
        }
        bias_.read(chunk, block_, tile);
        query_key_.multiply(tile, tests, scores_);
        softmax(chunk, tile, tests);
        values_.add(tile, tests, scores_, sum_ + tile.first_row * values_.width);
      }
    }
    Arithmetic::end();
  }

  void begin(const Chunk& chunk) {
    for (std::int64_t r = 0; r < chunk.queries * chunk.pack; ++r) {
      row_base_[r] = -kInfinity;
      store(row_sum_ + r * kLanes<T>, Vec<T>{});
    }
    for (std::int64_t i = 0; i < chunk.queries * chunk.pack * values_.width; ++i) sum_[i] = 0;
  }

  void softmax(const Chunk& chunk, const Tile& tile, const Tests& tests) {
    for (std::int64_t i = 0; i < tile.queries; ++i)
      for (std::int64_t g = 0; g < chunk.pack; ++g) {
        const std::int64_t r = i * chunk.pack + g;
        const T* bias = bias_.row(r, g);
        if (logit_.cap > 0)
          softmax_row<true>(tile, tests, tile.first_query + i, r, bias);
        else
          softmax_row<false>(tile, tests, tile.first_query + i, r, bias);
      }
  }

  /// One row's scores become probabilities relative to a base that no logit so far is above.
  template <bool capped>
  FLASH_DMATTN_INLINE void softmax_row(const Tile& tile, const Tests& tests, std::int64_t query, std::int64_t r,
                                       const T* bias) {
    constexpr int lanes = kLanes<T>, vectors = kPanel / lanes;
    T* row = scores_ + r * kScoreRow;
    const auto position = positions_.of[query];
    Vec<T> largest[vectors];  // side by side, as the sums below: one alone would wait for itself
    for (Vec<T>& l : largest) l = broadcast<T>(-kInfinity);
    for (const Tests::Run& run : tests)
      for (std::int64_t p = run.first; p < run.last; ++p) {
        T* panel = row + p * kPanel;
        const auto logits = [&](auto test) __attribute__((always_inline)) {
          for (int v = 0; v < vectors; ++v) {
            const int j = v * lanes;
            const Vec<T> x = test(logit_.template operator()<capped>(load(panel + j), load(bias + p * kPanel + j)), j);
            store(panel + j, x);
            largest[v] = max<T>(largest[v], x);
          }
        };
        if (tests.of[p] == Test::none) {
          logits([](Vec<T> x, int) __attribute__((always_inline)) { return x; });
        } else {
          const std::uint64_t word = tests.of[p] == Test::bits ? positions_.word(block_, query, p) : 0;
          logits([&](Vec<T> x, int j) __attribute__((always_inline)) {
            return masked<T>(x, tests.of[p], block_, p, j, position, word);
          });
        }
      }
    for (int v = 1; v < vectors; ++v) largest[0] = max<T>(largest[0], largest[v]);
    const std::int64_t row_of_chunk = tile.first_row + r;
    T* row_sum = row_sum_ + row_of_chunk * lanes;
    if (any_greater<T>(largest[0], row_base_[row_of_chunk])) raise_base(row_of_chunk, max_of_lanes<T>(largest[0]));
    const T base = row_base_[row_of_chunk] == -kInfinity ? 0 : row_base_[row_of_chunk];  // a row that sees nothing yet
    const auto probabilities = values_.probability_row(scores_, r);
    Vec<T> total[vectors] = {};
    for (const Tests::Run& run : tests)
      for (std::int64_t j = run.first_key(); j < run.last * kPanel; j += kPanel) {
        Vec<T> probability[vectors];
        for (int v = 0; v < vectors; ++v) {
          probability[v] = exp2<T, typename Arithmetic::Exponential>(load(row + j + v * lanes), base);
          total[v] += probability[v];
        }
        Arithmetic::Values::store_probabilities(probabilities + j, probability);
      }
    for (int v = 1; v < vectors; ++v) total[0] += total[v];
    store(row_sum, load(row_sum) + total[0]);
  }

  /// The sums so far become relative to a larger base: an integer, so that they shrink without a rounding error.
  void raise_base(std::int64_t row, T largest) {
    const T base = ceil(largest), shrink = row_base_[row] == -kInfinity ? 0 : exp2<T>(row_base_[row] - base);
    row_base_[row] = base;
    const auto scale = [shrink](T* sum, std::int64_t n) {
      for (std::int64_t d = 0; d < n; d += kLanes<T>) store(sum + d, load(sum + d) * shrink);
    };
    scale(row_sum_ + row * kLanes<T>, kLanes<T>);
    scale(sum_ + row * values_.width, values_.width);
  }

  static void write_row(const ForwardTask& task, std::int64_t query, std::int64_t head, const T* sum, T base, T total) {
    store_row<T>(task.out.dtype, sum, total > 0 ? 1 / total : 0, task.chunk.head_dim, row_of(task.out, query, head));
    *reinterpret_cast<T*>(task.lse + query * task.lse_query + head * task.lse_head) =
        total > 0 ? (base + log2(total)) * static_cast<T>(kLn2) : static_cast<T>(-kInfinity);
  }
  T row_total(std::int64_t row) const { return sum_of_lanes<T>(load(row_sum_ + row * kLanes<T>)); }

  void write(const ForwardTask& task) const {
    for (std::int64_t i = 0; i < task.chunk.queries; ++i)
      for (std::int64_t g = 0; g < task.chunk.pack; ++g) {
        const std::int64_t r = i * task.chunk.pack + g;
        write_row(task, i, g, sum_ + r * values_.width, row_base_[r], row_total(r));
      }
  }
  void write_partial(const ForwardTask& task) const {
    const std::int64_t head_dim = task.chunk.head_dim;
    T* out = static_cast<T*>(task.partial);
    for (std::int64_t r = 0; r < task.chunk.queries * task.chunk.pack; ++r, out += head_dim + 2) {
      for (std::int64_t d = 0; d < head_dim; ++d) out[d] = sum_[r * values_.width + d];
      out[head_dim] = row_base_[r];
      out[head_dim + 1] = row_total(r);
    }
  }

  Tiles tiles_;
  Logit<T> logit_;
  typename Arithmetic::Scores query_key_;
  typename Arithmetic::Values values_;
  Positions<T> positions_;
  BiasRows<T> bias_;
  Block<T> block_;
  T* scores_;    // tile rows x kScoreRow: products, then logits, then (in place, if the product wants) probabilities
  T* sum_;       // rows x width: of probability * value
  T* row_base_;  // by row: an integer that no logit so far, in base 2, is above; -inf at first
  T* row_sum_;   // rows x lanes: of probabilities
};

template <class Arithmetic>
void Forward<Arithmetic>::combine(const ForwardTask& task, const void* partials, std::int64_t count,
                                  std::size_t stride) {
  const Chunk& chunk = task.chunk;
  const std::int64_t head_dim = chunk.head_dim;
  T sum[256];
  for (std::int64_t i = 0; i < chunk.queries; ++i)
    for (std::int64_t g = 0; g < chunk.pack; ++g) {
      const std::int64_t r = i * chunk.pack + g;
      const auto part = [&](std::int64_t s) {
        return reinterpret_cast<const T*>(static_cast<const char*>(partials) + static_cast<std::size_t>(s) * stride) +
               r * (head_dim + 2);
      };
      T largest = -kInfinity, total = 0;
      for (std::int64_t s = 0; s < count; ++s) largest = part(s)[head_dim] > largest ? part(s)[head_dim] : largest;
      for (std::int64_t d = 0; d < head_dim; ++d) sum[d] = 0;
      for (std::int64_t s = 0; s < count && largest > -kInfinity; ++s) {
        const T share = part(s)[head_dim] == -kInfinity ? 0 : exp2<T>(part(s)[head_dim] - largest);
        total += part(s)[head_dim + 1] * share;
        for (std::int64_t d = 0; d < head_dim; ++d) sum[d] += part(s)[d] * share;
      }
      write_row(task, i, g, sum, largest, total);
    }
}

}  // namespace flash_dmattn::cpu::FLASH_DMATTN_ISA
