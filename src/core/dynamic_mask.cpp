#include "flash_dmattn/dynamic_mask.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/check.h"
#include "core/number.h"
#include "core/parallel.h"
#include "core/shape.h"

namespace flash_dmattn {
namespace {

/// A key's rank as one integer, larger is better: the score's order-preserving bits above the position, so that among
/// equal scores the newer key wins. 64 bits hold any float32 score; float64 scores take 128.
template <class Number>
struct Rank {
  __extension__ typedef unsigned __int128 Wide;
  using Bits = std::conditional_t<sizeof(Number) == 8, std::uint64_t, std::uint32_t>;
  using Type = std::conditional_t<sizeof(Number) == 8, Wide, std::uint64_t>;
  static Type of(Number score, std::int64_t position) {
    return static_cast<Type>(ordered(score)) << 32 | static_cast<std::uint32_t>(position);
  }
  static std::int64_t position(Type rank) { return static_cast<std::int64_t>(static_cast<std::uint32_t>(rank)); }

 private:
  static Bits ordered(Number score) {
    constexpr Bits sign = Bits{1} << (8 * sizeof(Bits) - 1);
    if (score != score) return 0;                              // NaN ranks lowest
    const Bits bits = std::bit_cast<Bits>(score + Number{0});  // -0 becomes +0
    return bits & sign ? ~bits : bits | sign;
  }
};

/// The best `capacity` ranks seen so far; the worst of them on top.
template <class RankType>
class BestRanks {
 public:
  explicit BestRanks(std::int64_t capacity) : capacity_(static_cast<std::size_t>(capacity)) {}

  void clear() { heap_.clear(); }
  bool full() const { return heap_.size() == capacity_; }
  RankType worst() const { return heap_.front(); }

  void add(RankType rank) {
    heap_.push_back(rank);
    std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
  }
  void replace_worst(RankType rank) {
    const std::size_t n = heap_.size();
    std::size_t hole = 0;
    for (std::size_t child = 1; child < n; child = 2 * hole + 1) {
      child += child + 1 < n && heap_[child + 1] < heap_[child];
      if (rank <= heap_[child]) break;
      heap_[hole] = heap_[child];
      hole = child;
    }
    heap_[hole] = rank;
  }

 private:
  std::size_t capacity_;
  std::vector<RankType> heap_;
};

/// One (batch, head) row of keys: reads scores and padding, whatever their strides.
template <class Number>
struct Keys {
  const char* score;
  std::int64_t score_step;
  DType dtype;
  const std::uint8_t* padding;
  std::int64_t padding_step;

  bool is_padding(std::int64_t k) const { return padding != nullptr && padding[k * padding_step] == 0; }
  typename Rank<Number>::Type rank(std::int64_t k) const {
    const char* p = score + k * score_step;
    Number number;
    if constexpr (sizeof(Number) == 8)
      number = *reinterpret_cast<const Number*>(p);
    else
      number = dtype == DType::float32 ? *reinterpret_cast<const float*>(p) : static_cast<float>(read_number(p, dtype));
    return Rank<Number>::of(number, k);
  }
};

template <class Number>
Keys<Number> keys_of(const DynamicMask& mask, std::int64_t b, std::int64_t h) {
  Keys<Number> keys{address(mask.score, b, h, 0),
                    mask.score.stride[2] * static_cast<std::int64_t>(size_of(mask.score.dtype)), mask.score.dtype,
                    nullptr, 0};
  if (mask.key_padding_mask) {
    const View<2>& padding = *mask.key_padding_mask;
    keys.padding = at<std::uint8_t>(padding, padding.size[0] == 1 ? 0 : b, 0);
    keys.padding_step = padding.stride[1];
  }
  return keys;
}

/// Statements 1 and 2 of the theorem, as the query moves right: a key's interval ends where w better ones have come.
template <class Number>
void causal_row(const Keys<Number>& keys, std::int64_t key_len, BestRanks<typename Rank<Number>::Type>& best,
                std::int32_t* end, std::int64_t end_step, std::int32_t* threshold, std::int64_t threshold_step) {
  best.clear();
  for (std::int64_t k = 0; k < key_len; ++k) {
    const std::int32_t now = static_cast<std::int32_t>(k);
    if (keys.is_padding(k)) {
      end[k * end_step] = now;
    } else {
      const auto rank = keys.rank(k);
      end[k * end_step] = static_cast<std::int32_t>(key_len);
      if (!best.full()) {
        best.add(rank);
      } else if (rank > best.worst()) {
        end[Rank<Number>::position(best.worst()) * end_step] = now;
        best.replace_worst(rank);
      } else {
        end[k * end_step] = now;
      }
    }
    if (threshold != nullptr)
      threshold[k * threshold_step] =
          best.full() ? static_cast<std::int32_t>(Rank<Number>::position(best.worst())) : -1;
  }
}

/// Moves the w best ranks to the front; returns how many there are.
template <class RankType>
std::int64_t keep_best(std::vector<RankType>& ranks, std::int64_t w) {
  if (static_cast<std::int64_t>(ranks.size()) <= w) return static_cast<std::int64_t>(ranks.size());
  std::nth_element(ranks.begin(), ranks.begin() + w, ranks.end(), std::greater<>());
  return w;
}

template <class Number>
void make_rows(const DynamicMask& mask, const View<3>& end, const std::optional<View<3>>& threshold,
               const Threads& threads) {
  using RankType = typename Rank<Number>::Type;
  const auto [batch, heads, key_len] = mask.score.size;
  const std::int64_t w = std::min(mask.keep_window_size, key_len + 1);  // key_len + 1: never full
  run_tasks(batch * heads, threads, [&, heads = heads, key_len = key_len](std::int64_t row, int) {
    const std::int64_t b = row / heads, h = row % heads;
    const Keys<Number> keys = keys_of<Number>(mask, b, h);
    std::int32_t* end_row = at<std::int32_t>(end, b, h, 0);
    const std::int64_t step = end.stride[2];
    if (mask.is_causal) {
      BestRanks<RankType> best(w);
      causal_row<Number>(keys, key_len, best, end_row, step,
                         threshold ? at<std::int32_t>(*threshold, b, h, 0) : nullptr,
                         threshold ? threshold->stride[2] : 0);
      return;
    }
    std::vector<RankType> ranks;
    ranks.reserve(static_cast<std::size_t>(key_len));
    for (std::int64_t k = 0; k < key_len; ++k) {
      end_row[k * step] = static_cast<std::int32_t>(std::min<std::int64_t>(0, key_len - mask.query_len));
      if (!keys.is_padding(k)) ranks.push_back(keys.rank(k));
    }
    const std::int64_t kept = keep_best(ranks, w);
    for (std::int64_t i = 0; i < kept; ++i)
      end_row[Rank<Number>::position(ranks[static_cast<std::size_t>(i)]) * step] = static_cast<std::int32_t>(key_len);
  });
}

template <class Number>
void select_rows(const View<4>& score, const std::optional<View<4>>& visible, std::int64_t w, bool is_causal,
                 const View<4>& selected, const Threads& threads) {
  using RankType = typename Rank<Number>::Type;
  const auto [batch, heads, query_len, key_len] = selected.size;
  const auto step = [](const View<4>& v, int i) { return v.size[i] == 1 ? 0 : v.stride[i]; };
  std::vector<std::vector<RankType>> ranks_of_worker(
      static_cast<std::size_t>(workers_for(batch * heads * query_len, threads)));
  run_tasks(batch * heads * query_len, threads,
            [&, heads = heads, query_len = query_len, key_len = key_len](std::int64_t row, int worker) {
              const std::int64_t q = row % query_len, h = row / query_len % heads, b = row / query_len / heads;
              const std::int64_t bytes = static_cast<std::int64_t>(size_of(score.dtype));
              const Keys<Number> keys{static_cast<const char*>(score.data) +
                                          (b * step(score, 0) + h * step(score, 1) + q * step(score, 2)) * bytes,
                                      step(score, 3) * bytes, score.dtype,
                                      visible
                                          ? static_cast<const std::uint8_t*>(visible->data) + b * step(*visible, 0) +
                                                h * step(*visible, 1) + q * step(*visible, 2)
                                          : nullptr,
                                      visible ? step(*visible, 3) : 0};
              std::uint8_t* out = at<std::uint8_t>(selected, b, h, q, 0);
              for (std::int64_t k = 0; k < key_len; ++k) out[k * selected.stride[3]] = 0;
              std::vector<RankType>& ranks = ranks_of_worker[static_cast<std::size_t>(worker)];
              ranks.clear();
              const std::int64_t seen =
                  is_causal ? std::clamp<std::int64_t>(q + key_len - query_len + 1, 0, key_len) : key_len;
              for (std::int64_t k = 0; k < seen; ++k)
                if (!keys.is_padding(k)) ranks.push_back(keys.rank(k));
              const std::int64_t kept = keep_best(ranks, w);
              for (std::int64_t i = 0; i < kept; ++i)
                out[Rank<Number>::position(ranks[static_cast<std::size_t>(i)]) * selected.stride[3]] = 1;
            });
}

}  // namespace

void make_dynamic_mask(const DynamicMask& mask, const View<3>& end, const std::optional<View<3>>& threshold,
                       const Threads& threads) {
  check(mask, end, threshold);
  if (mask.score.dtype == DType::float64)
    make_rows<double>(mask, end, threshold, threads);
  else
    make_rows<float>(mask, end, threshold, threads);
}

void select_keys(const View<4>& score, const std::optional<View<4>>& visible, std::int64_t keep_window_size,
                 bool is_causal, const View<4>& selected, const Threads& threads) {
  check_selection(score, visible, keep_window_size, selected);
  if (score.dtype == DType::float64)
    select_rows<double>(score, visible, keep_window_size, is_causal, selected, threads);
  else
    select_rows<float>(score, visible, keep_window_size, is_causal, selected, threads);
}

}  // namespace flash_dmattn
