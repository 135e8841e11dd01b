// The plan: for every chunk of query positions, the keys to load and how they are tested. Kernels read plans; they know
// nothing of where a mask came from.
//
// Without a dense mask every key has an interval of positions that see it: from its own position where the call is
// causal (else from the start), to its `end` where there is a dynamic mask (else for ever). A kernel compares a tile's
// positions with the intervals of a run of keys: nothing to do, nothing to test, or a test of each pair. With a dense
// mask every position has a bit for each listed key instead.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/key_list.h"
#include "core/shape.h"

namespace flash_dmattn {

struct Plan::Lists {
  /// The position of a query that the mask hides from every key: before every interval.
  static constexpr std::int32_t kSeesNothing = std::numeric_limits<std::int32_t>::min();
  static constexpr std::int32_t kFromTheStart = kSeesNothing + 1;
  static constexpr std::int32_t kForEver = std::numeric_limits<std::int32_t>::max();

  Lists(const Problem& problem, const Threads& threads);

  Shape shape;
  bool is_causal;
  std::int64_t pack;   ///< query heads that share a tile: H / Hk, or 1 where every query head has a mask of its own
  std::int64_t chunk;  ///< query positions per chunk

  std::int64_t units_of_heads() const { return shape.heads / pack; }
  std::int64_t chunks() const { return (shape.query_len + chunk - 1) / chunk; }
  std::int64_t first_query(std::int64_t c) const { return c * chunk; }
  std::int64_t queries(std::int64_t c) const { return std::min(chunk, shape.query_len - c * chunk); }

  /// The keys for chunk c of query heads [unit * pack, (unit + 1) * pack).
  const KeyList& keys(std::int64_t b, std::int64_t unit, std::int64_t c) const {
    return lists_[static_cast<std::size_t>(list_row(b, unit) * chunks() + c)];
  }
  std::int64_t longest_list() const;

  std::int32_t start(std::int32_t key) const { return is_causal ? key : kFromTheStart; }
  /// Where the intervals of one row of keys end.
  struct Ends {
    const std::int32_t* data;
    std::int64_t step;
    std::int32_t operator()(std::int64_t key) const { return data[key * step]; }
  };
  Ends ends(std::int64_t b, std::int64_t unit) const {
    if (!end_) return {&kForEver, 0};
    return {at<const std::int32_t>(*end_, end_->size[0] == 1 ? 0 : b, head_of(*end_, unit), 0), end_->stride[2]};
  }
  /// The position of a query, or kSeesNothing.
  std::int32_t position(std::int64_t b, std::int64_t unit, std::int64_t query) const {
    if (rows_ && *at<const std::uint8_t>(*rows_, rows_->size[0] == 1 ? 0 : b, head_of(*rows_, unit), query, 0) == 0)
      return kSeesNothing;
    return static_cast<std::int32_t>(query + shape.first_position());
  }

 private:
  template <int Rank>
  std::int64_t head_of(const View<Rank>& view, std::int64_t unit) const {
    return shape.broadcast_head(view.size[1], unit * pack);
  }
  std::int64_t list_row(std::int64_t b, std::int64_t unit) const {
    return (list_batch_ == 1 ? 0 : b) * list_heads_ + (list_heads_ == 1 ? 0 : unit);
  }
  void list_spans();
  void list_columns(const Threads& threads);
  void list_survivors(const Threads& threads);
  void list_bits(const Threads& threads);
  /// The last key that any position of chunk c may see, plus one.
  std::int64_t causal_limit(std::int64_t c) const {
    if (!is_causal) return shape.key_len;
    return std::clamp<std::int64_t>(first_query(c) + queries(c) + shape.first_position(), 0, shape.key_len);
  }
  bool sees_column(std::int64_t b, std::int64_t unit, std::int64_t k) const {
    return !columns_ || *at<const std::uint8_t>(*columns_, columns_->size[0] == 1 ? 0 : b, head_of(*columns_, unit), 0,
                                                columns_->size[3] == 1 ? 0 : k) != 0;
  }

  // The mask, as one of: a value for each key, for each query, for each pair.
  std::optional<View<4>> columns_, rows_, dense_;
  std::optional<View<3>> end_;
  std::int64_t list_batch_ = 1, list_heads_ = 1;  // what the lists are broadcast over
  std::vector<KeyList> lists_;
  std::vector<std::vector<std::int32_t>> positions_;  // what lists_ refers to
  std::vector<std::vector<std::uint64_t>> bits_;
};

}  // namespace flash_dmattn
