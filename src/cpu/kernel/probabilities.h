// The attention probabilities themselves, for those who ask to see them: exp(logit - lse), 0 where a row does not see a
// key.
#pragma once
#include "cpu/kernel/arithmetic.h"

namespace flash_dmattn::cpu::FLASH_DMATTN_ISA {

template <class T>
class Probabilities {
 public:
  static std::size_t scratch(const Chunk& largest) {
    Scratch size(nullptr);
    Probabilities(size, largest);
    return size.size();
  }

  static void run(const ProbabilitiesTask& task, void* memory) {
    Scratch scratch(memory);
    Probabilities(scratch, task.chunk).write(task);
  }

 private:
  Probabilities(Scratch& scratch, const Chunk& chunk)
      : tiles_(chunk, Plain<T>::kRows),
        logit_(chunk.scale, chunk.softcap),
        query_key_(scratch, chunk),
        positions_(scratch, chunk),
        bias_(scratch, chunk, tiles_.most_rows()),
        scores_(scratch.take<T>(tiles_.most_rows() * kScoreRow)) {}

  /// The output holds zeros when this begins.
  void write(const ProbabilitiesTask& task) {
    const Chunk& chunk = task.chunk;
    query_key_.load_query(chunk, chunk.query);
    positions_.read(chunk);
    for (std::int64_t first = 0; first < chunk.keys.count; first += kBlock) {
      block_.read(chunk, first, chunk.keys.count);
      bias_.read(chunk, block_);
      query_key_.load_keys(chunk, chunk.key, block_);
      for (std::int64_t t = 0; t < tiles_.count(); ++t) {
        const Tile tile = tiles_[t];
        const Tests tests = positions_.tests(block_, tile);
        if (tests.empty()) continue;
        bias_.read(chunk, block_, tile);
        query_key_.multiply(tile, tests, scores_);
        for (std::int64_t i = 0; i < tile.queries; ++i)
          for (std::int64_t g = 0; g < chunk.pack; ++g)
            write_row(task, tests, tile.first_query + i, g, i * chunk.pack + g);
      }
    }
  }

  void write_row(const ProbabilitiesTask& task, const Tests& tests, std::int64_t query, std::int64_t head,
                 std::int64_t r) const {
    T lse = *reinterpret_cast<const T*>(task.lse + query * task.lse_query + head * task.lse_head);
    lse = lse == -kInfinity ? 0 : lse * static_cast<T>(kLog2E);
    const T* bias = bias_.row(r, head);
    char* out = task.probabilities.data + query * task.probabilities.query + head * task.probabilities.head;
    for (const Tests::Run& run : tests)
      for (std::int64_t p = run.first; p < run.last; ++p) {
        const std::uint64_t word = tests.of[p] == Test::bits ? positions_.word(block_, query, p) : 0;
        for (std::int64_t j = p * kPanel; j < (p + 1) * kPanel; j += kLanes<T>) {
          const Vec<T> product = load(scores_ + r * kScoreRow + j), b = load(bias + j);
          const Vec<T> logit = logit_.cap > 0 ? logit_.template operator()<true>(product, b)
                                              : logit_.template operator()<false>(product, b);
          T probability[kLanes<T>];
          store(probability, exp2<T>(masked<T>(logit, tests.of[p], block_, p, static_cast<int>(j - p * kPanel),
                                               positions_.of[query], word) -
                                     lse));
          for (int lane = 0; lane < kLanes<T> && j + lane < block_.count; ++lane)
            store_row<T>(task.probabilities.dtype, probability + lane, 1, 1,
                         out + block_.key[j + lane] * task.probabilities.key);
        }
      }
  }

  Tiles tiles_;
  Logit<T> logit_;
  typename Plain<T>::Scores query_key_;
  Positions<T> positions_;
  BiasRows<T> bias_;
  Block<T> block_;
  T* scores_;  // tile rows x kScoreRow
};

}  // namespace flash_dmattn::cpu::FLASH_DMATTN_ISA
