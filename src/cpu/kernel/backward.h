// The backward pass of one chunk. For every block of its keys, for every tile of its rows: the probabilities again,
// from the saved lse, and
//     dV += P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dBias += dS,  dK += dS^T Q,  dQ += dS K
// with delta = sum(out * dO) - dLse for each row. The softcap's derivative joins dS after the bias has had its share.
// The sums over keys stay in scratch until the chunk is done; add_key_sums hands them over.
#pragma once
#include "cpu/kernel/arithmetic.h"

namespace flash_dmattn::cpu::FLASH_DMATTN_ISA {

template <class Arithmetic>
class Backward {
  using T = typename Arithmetic::Sum;

 public:
  static std::size_t scratch(const Chunk& largest) {
    Scratch size(nullptr);
    Backward(size, largest);
    return size.size();
  }

  static void run(const BackwardTask& task, void* memory) {
    Scratch scratch(memory);
    Backward backward(scratch, task.chunk);
    backward.differentiate(task);
    backward.write_query_gradient(task);
  }

  static void add_key_sums(const BackwardTask& task, void* memory) {
    Scratch scratch(memory);
    Backward(scratch, task.chunk).add(task);
  }

 private:
  Backward(Scratch& scratch, const Chunk& chunk)
      : width_(round_up(chunk.head_dim, kLanes<T>)),
        bias_heads_(chunk.bias.per_query  ? 0
                    : chunk.bias.per_head ? chunk.pack
                                          : 1),
        list_(round_up(chunk.keys.count, kBlock)),
        key_sum_(scratch.take<T>(list_ * width_)),
        value_sum_(scratch.take<T>(list_ * width_)),
        bias_sum_(scratch.take<T>(list_ * bias_heads_)),
        tiles_(chunk, kRows),
        logit_(chunk.scale, chunk.softcap),
        positions_(scratch, chunk),
        bias_(scratch, chunk, tiles_.most_rows()),
        query_key_(scratch, chunk),
        grad_out_value_(scratch, chunk),
        grad_query_(scratch.take<T>(rows(chunk) * width_)),
        lse_(scratch.take<T>(rows(chunk))),
        delta_(scratch.take<T>(rows(chunk))),
        scores_(scratch.take<T>(tiles_.most_rows() * kScoreRow)),
        grad_scores_(scratch.take<T>(tiles_.most_rows() * kScoreRow)) {}

  static constexpr std::int64_t kRows = 96;  // of a tile

  static std::int64_t rows(const Chunk& chunk) { return chunk.queries * chunk.pack; }

  void differentiate(const BackwardTask& task) {
    const Chunk& chunk = task.chunk;
    Arithmetic::begin();
    begin(task);
    for (std::int64_t first = 0; first < chunk.keys.count; first += kBlock) {
      block_.read(chunk, first, chunk.keys.count);
      bias_.read(chunk, block_);
      bool loaded = false;
      for (std::int64_t t = 0; t < tiles_.count(); ++t) {
        const Tile tile = tiles_[t];
        const Tests tests = positions_.tests(block_, tile);
        if (tests.empty()) continue;
        if (!loaded) {
          query_key_.load_keys(chunk, chunk.key, block_);
          grad_out_value_.load_keys(chunk, chunk.value, block_);
          loaded = true;
        }
        bias_.read(chunk, block_, tile);
        query_key_.multiply(tile, tests, scores_);
        grad_out_value_.multiply(tile, tests, grad_scores_);
        grad_softmax(task, tile, tests);
        add_over_rows(scores_, grad_out_value_.query_rows(), tile, tests, value_sum_);
        add_over_rows(grad_scores_, query_key_.query_rows(), tile, tests, key_sum_);
        for (const Tests::Run& run : tests)
          gemm<Fma<T>>(RowMajor<T>{grad_scores_ + run.first_key(), kScoreRow},
                       query_key_.key_rows() + run.first_key() * width_, width_, grad_query_ + tile.first_row * width_,
                       width_, tile.rows, width_, run.keys(), true);
      }
    }
    Arithmetic::end();
  }

  void begin(const BackwardTask& task) {
    const Chunk& chunk = task.chunk;
    positions_.read(chunk);
    query_key_.load_query(chunk, chunk.query);
    grad_out_value_.load_query(chunk, task.grad_out);
    load_queries(chunk, task.out, width_, grad_query_);  // for delta; the sums begin after it
    for (std::int64_t i = 0; i < chunk.queries; ++i)
      for (std::int64_t g = 0; g < chunk.pack; ++g) {
        const std::int64_t r = i * chunk.pack + g;
        const T lse = *reinterpret_cast<const T*>(task.lse + i * task.lse_query + g * task.lse_head);
        lse_[r] =
            lse == -kInfinity ? 0 : lse * static_cast<T>(kLog2E);  // a row that sees nothing: its logits are all -inf
        Vec<T> total{};
        for (std::int64_t d = 0; d < width_; d += kLanes<T>)
          total += load(grad_query_ + r * width_ + d) * load(grad_out_value_.query_rows() + r * width_ + d);
        delta_[r] = sum_of_lanes<T>(total);
        if (task.grad_lse != nullptr)
          delta_[r] -= *reinterpret_cast<const T*>(task.grad_lse + i * task.grad_lse_query + g * task.grad_lse_head);
      }
    clear(grad_query_, rows(chunk) * width_);
    clear(key_sum_, list_ * width_);
    clear(value_sum_, list_ * width_);
    clear(bias_sum_, list_ * bias_heads_);
  }
  static void clear(T* array, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) array[i] = 0;
  }

  /// sum over the tile's rows of (a score for each key) x (a row of numbers)
  void add_over_rows(const T* scores, const T* rows, const Tile& tile, const Tests& tests, T* sum) const {
    for (const Tests::Run& run : tests)
      gemm<Fma<T>>(Transposed<T>{scores + run.first_key(), kScoreRow}, rows + tile.first_row * width_, width_,
                   sum + (block_.first_key + run.first_key()) * width_, width_, run.keys(), width_, tile.rows, true);
  }

  void grad_softmax(const BackwardTask& task, const Tile& tile, const Tests& tests) {
    const Chunk& chunk = task.chunk;
    for (std::int64_t i = 0; i < tile.queries; ++i)
      for (std::int64_t g = 0; g < chunk.pack; ++g) {
        const std::int64_t r = i * chunk.pack + g;
        T* bias_sum = bias_sum_ + (bias_heads_ > 1 ? g * list_ : 0) + block_.first_key;
        if (bias_heads_ == 0) clear(bias_sum = bias_row_, kBlock);
        const auto row = [&](auto capped, auto with_bias) __attribute__((always_inline)) {
          grad_softmax_row<capped.value, with_bias.value>(tile, tests, tile.first_query + i, r, bias_.row(r, g),
                                                          bias_sum);
        };
        const bool with_bias = task.bias_sum.data != nullptr;
        if (logit_.cap > 0)
          with_bias ? row(Yes{}, Yes{}) : row(Yes{}, No{});
        else
          with_bias ? row(No{}, Yes{}) : row(No{}, No{});
        if (with_bias && bias_heads_ == 0) add_bias_row(task, tile.first_query + i, g, tests);
      }
  }
  struct Yes {
    static constexpr bool value = true;
  };
  struct No {
    static constexpr bool value = false;
  };

  /// One row: products become probabilities, gradients of probabilities become gradients of the products before the
  /// scale.
  template <bool capped, bool with_bias>
  FLASH_DMATTN_INLINE void grad_softmax_row(const Tile& tile, const Tests& tests, std::int64_t query, std::int64_t r,
                                            const T* bias, T* bias_sum) {
    constexpr int lanes = kLanes<T>;
    T *row = scores_ + r * kScoreRow, *grad = grad_scores_ + r * kScoreRow;
    const std::int32_t position = positions_.of[query];
    const T lse = lse_[tile.first_row + r], delta = delta_[tile.first_row + r];
    for (const Tests::Run& run : tests)
      for (std::int64_t p = run.first; p < run.last; ++p) {
        const Test test = tests.of[p];
        const std::uint64_t word = test == Test::bits ? positions_.word(block_, query, p) : 0;
        const auto panel = [&](auto tested) __attribute__((always_inline)) {
          for (std::int64_t j = p * kPanel; j < (p + 1) * kPanel; j += lanes) {
            const Vec<T> product = load(row + j);
            Vec<T> logit, factor;
            if constexpr (capped) {
              const Vec<T> tanh = logit_.tanh(product);
              logit = tanh * logit_.cap + load(bias + j);
              factor = T(1) - tanh * tanh;
            } else {
              logit = logit_.template operator()<false>(product, load(bias + j));
            }
            if constexpr (tested.value)
              logit = masked<T>(logit, test, block_, p, static_cast<int>(j - p * kPanel), position, word);
            const Vec<T> probability = exp2<T>(logit - lse);
            Vec<T> d = probability * (load(grad + j) - delta);
            store(row + j, probability);
            if constexpr (with_bias) store(bias_sum + j, load(bias_sum + j) + d);
            if constexpr (capped) d *= factor;
            store(grad + j, d);
          }
        };
        test == Test::none ? panel(No{}) : panel(Yes{});
      }
  }

  /// The gradient of a bias with a value for each query goes where it belongs at once.
  void add_bias_row(const BackwardTask& task, std::int64_t query, std::int64_t head, const Tests& tests) const {
    char* row = task.bias_sum.data + query * task.bias_sum.query + head * task.bias_sum.head;
    for (const Tests::Run& run : tests)
      for (std::int64_t i = run.first_key(); i < run.last * kPanel && i < block_.count; ++i)
        *reinterpret_cast<T*>(row + block_.key[i] * task.bias_sum.key) += bias_row_[i];
  }

  void write_query_gradient(const BackwardTask& task) const {
    const Chunk& chunk = task.chunk;
    for (std::int64_t i = 0; i < chunk.queries; ++i)
      for (std::int64_t g = 0; g < chunk.pack; ++g)
        store_row<T>(task.grad_query.dtype, grad_query_ + (i * chunk.pack + g) * width_, static_cast<T>(chunk.scale),
                     chunk.head_dim, row_of(task.grad_query, i, g));
  }

  void add(const BackwardTask& task) {
    const Chunk& chunk = task.chunk;
    const T scale = static_cast<T>(chunk.scale);
    for (std::int64_t first = 0; first < chunk.keys.count; first += kBlock) {
      block_.read(chunk, first, chunk.keys.count);
      for (std::int64_t i = 0; i < block_.count; ++i) {
        T* key = reinterpret_cast<T*>(row_of(task.key_sum, block_.key[i]));
        T* value = reinterpret_cast<T*>(row_of(task.value_sum, block_.key[i]));
        for (std::int64_t d = 0; d < chunk.head_dim; ++d) key[d] += key_sum_[(first + i) * width_ + d] * scale;
        for (std::int64_t d = 0; d < chunk.head_dim; ++d) value[d] += value_sum_[(first + i) * width_ + d];
        if (task.bias_sum.data == nullptr) continue;
        for (std::int64_t h = 0; h < bias_heads_; ++h)
          *reinterpret_cast<T*>(task.bias_sum.data + h * task.bias_sum.head + block_.key[i] * task.bias_sum.key) +=
              bias_sum_[h * list_ + first + i];
      }
    }
  }

  std::int64_t width_;       // head_dim, in whole vectors
  std::int64_t bias_heads_;  // rows of a per-key bias's gradient; 0 where every query has a bias of its own
  std::int64_t list_;        // keys of the chunk, in whole blocks
  T *key_sum_, *value_sum_;  // list x width
  T* bias_sum_;              // bias heads x list
  Tiles tiles_;
  Logit<T> logit_;
  Positions<T> positions_;
  BiasRows<T> bias_;
  Block<T> block_;
  typename Arithmetic::ScoresAndRows query_key_, grad_out_value_;  // grad_out . value: gradients of probabilities
  T* grad_query_;                                                  // rows x width
  T *lse_, *delta_;                                                // by row; lse in base 2
  T *scores_, *grad_scores_;                                       // tile rows x kScoreRow
  T bias_row_[kBlock];
};

}  // namespace flash_dmattn::cpu::FLASH_DMATTN_ISA
