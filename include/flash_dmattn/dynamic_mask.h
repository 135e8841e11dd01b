// The dynamic mask: which keys are among the w best that a query may see. docs/design.md has the theorem behind it.
#pragma once
#include <cstdint>
#include <optional>

#include "flash_dmattn/tensor.h"
#include "flash_dmattn/threads.h"

namespace flash_dmattn {

/// Key j beats key k when its score is larger, or equal and j > k: among equals the newer key wins. NaN ranks lowest.
/// A causal query at absolute position p = q + K - Q selects among the keys 0..p, any other among all keys.
struct DynamicMask {
  View<3> score;                                 ///< (B, heads, K), any floating dtype
  std::optional<View<2>> key_padding_mask = {};  ///< (B | 1, K) boolean: false is padding, never visible, beats nobody
  std::int64_t keep_window_size = 0;             ///< w, at least 1
  std::int64_t query_len = 0;                    ///< Q
  bool is_causal = true;
};

/// Writes the whole mask as O(K) numbers: `end` (B, heads, K) int32, the first absolute position that no longer sees
/// the key. Causal: key k is visible to the positions [k, end[k]), and end[k] == k where no query ever sees it. Not
/// causal: end[k] is K where every query sees the key, and the first query's position, min(0, K - Q), where none does.
/// `threshold`, when given (causal only), is (B, heads, K) int32: the position of the w-th best key of the prefix 0..p,
/// or -1 while the prefix holds fewer than w keys. O(K log w) time, O(w) memory beyond the outputs. Throws
/// InvalidArgument.
void make_dynamic_mask(const DynamicMask& mask, const View<3>& end, const std::optional<View<3>>& threshold,
                       const Threads& threads);

/// The same selection where each query has scores or visible keys of its own: `score` broadcasts to (B, heads, Q, K),
/// and so does the boolean `visible`, when given. Writes boolean `selected` (B, heads, Q, K): the w best visible keys
/// of every row. O(Q K) time. Throws InvalidArgument.
void select_keys(const View<4>& score, const std::optional<View<4>>& visible, std::int64_t keep_window_size,
                 bool is_causal, const View<4>& selected, const Threads& threads);

}  // namespace flash_dmattn
