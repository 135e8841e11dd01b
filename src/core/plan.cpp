#include "core/plan.h"

#include <algorithm>
#include <bit>

#include "core/check.h"
#include "core/parallel.h"

namespace flash_dmattn {
namespace {

/// Rows (positions x heads) that one chunk aims for: enough to pay for packing its keys, and no more than leaves tasks
/// for many threads. It depends on the problem alone, so that results do not depend on the threads.
constexpr std::int64_t kMostRows = 1024, kFewestRows = 256, kEnoughTasks = 16;

std::int64_t choose_chunk(const Shape& s, std::int64_t pack) {
  std::int64_t rows = kMostRows;
  const auto tasks = [&] { return s.batch * s.heads * s.query_len / std::max<std::int64_t>(rows, pack); };
  while (rows > kFewestRows && tasks() < kEnoughTasks) rows /= 2;
  return std::max<std::int64_t>(1, rows / pack);
}

/// The bits of `word` where `chosen` has ones, moved together.
std::uint64_t compress_bit_by_bit(std::uint64_t word, std::uint64_t chosen) {
  std::uint64_t out = 0;
  for (int n = 0; chosen != 0; ++n, chosen &= chosen - 1) out |= (word >> std::countr_zero(chosen) & 1) << n;
  return out;
}

using Compress = std::uint64_t (*)(std::uint64_t word, std::uint64_t chosen);

#if defined(__x86_64__)
__attribute__((target("bmi2"))) std::uint64_t compress_at_once(std::uint64_t word, std::uint64_t chosen) {
  return __builtin_ia32_pext_di(word, chosen);
}
Compress best_compress() { return __builtin_cpu_supports("bmi2") ? compress_at_once : compress_bit_by_bit; }
#else
Compress best_compress() { return compress_bit_by_bit; }
#endif

}  // namespace

Plan::Plan(const Problem& problem, const Threads& threads) {
  check(problem);
  lists_ = std::make_unique<const Lists>(problem, threads);
}
Plan::~Plan() = default;
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;

Plan::Lists::Lists(const Problem& problem, const Threads& threads)
    : shape(problem), is_causal(problem.is_causal), pack(shape.group()), chunk(1) {
  if (problem.mask) {
    const View<4> mask = without_expand(*problem.mask);
    (mask.size[2] == 1 ? columns_ : mask.size[3] == 1 ? rows_ : dense_) = mask;
  }
  if (problem.end) {
    end_ = *problem.end;
    if (end_->size[0] == 1) end_->stride[0] = 0;
    if (end_->size[1] == 1) end_->stride[1] = 0;
  }
  bool per_head = false;
  const auto broadcast_over = [&](const auto& view) {
    if (view.size[0] != 1) list_batch_ = shape.batch;
    per_head |= view.size[1] != 1;
    if (view.size[1] == shape.heads && shape.heads != shape.kv_heads) pack = 1;
  };
  if (rows_ && rows_->size[1] == shape.heads && shape.heads != shape.kv_heads) pack = 1;
  if (columns_) broadcast_over(*columns_);
  if (dense_) broadcast_over(*dense_);
  if (end_) broadcast_over(*end_);
  if (per_head) list_heads_ = units_of_heads();
  chunk = choose_chunk(shape, pack);
  lists_.resize(static_cast<std::size_t>(list_batch_ * list_heads_ * chunks()));
  if (lists_.empty()) return;
  if (dense_)
    list_bits(threads);
  else if (end_ && is_causal)
    list_survivors(threads);
  else if (columns_ || end_)
    list_columns(threads);
  else
    list_spans();
}

std::int64_t Plan::Lists::longest_list() const {
  std::int64_t longest = 0;
  for (const KeyList& list : lists_) longest = std::max(longest, list.count);
  return longest;
}

/// Neither mask nor end: every chunk loads the keys from the first to the last that causality lets it see.
void Plan::Lists::list_spans() {
  for (std::int64_t c = 0; c < chunks(); ++c) lists_[static_cast<std::size_t>(c)].count = causal_limit(c);
}

/// A value for each key, the same for all queries: the keys that are visible at all, once for all chunks.
void Plan::Lists::list_columns(const Threads& threads) {
  positions_.resize(static_cast<std::size_t>(list_batch_ * list_heads_));
  const std::int64_t first = shape.first_position();
  run_tasks(list_batch_ * list_heads_, threads, [&](std::int64_t row, int) {
    const std::int64_t b = row / list_heads_, unit = row % list_heads_;
    const Ends end_of = ends(b, unit);
    std::vector<std::int32_t>& positions = positions_[static_cast<std::size_t>(row)];
    for (std::int64_t k = 0; k < shape.key_len; ++k)
      if (end_of(k) > first && sees_column(b, unit, k)) positions.push_back(static_cast<std::int32_t>(k));
    for (std::int64_t c = 0; c < chunks(); ++c) {
      const auto limit = std::lower_bound(positions.begin(), positions.end(), causal_limit(c));
      lists_[static_cast<std::size_t>(row * chunks() + c)] = {.count = limit - positions.begin(),
                                                              .positions = positions.data()};
    }
  });
}

/// Causal, with a dynamic mask. Statement 3 of the theorem: a chunk needs the keys that survive at its start, and its
/// own. The survivors come from those of the chunk before, so a whole row takes O(K (1 + w / chunk)) steps. Those that
/// die inside the chunk are ordered by their end, the last to die first, so that tile after tile sees less of them; the
/// chunk's own keys follow in the order in which they appear.
void Plan::Lists::list_survivors(const Threads& threads) {
  positions_.resize(lists_.size());
  run_tasks(list_batch_ * list_heads_, threads, [&](std::int64_t row, int) {
    const std::int64_t b = row / list_heads_, unit = row % list_heads_;
    const Ends end_of = ends(b, unit);
    std::vector<std::int32_t> alive;  // by position: the keys before `next` that a position from `next` on may see
    std::int64_t next = 0;
    for (std::int64_t c = 0; c < chunks(); ++c) {
      const std::int64_t start = std::clamp<std::int64_t>(first_query(c) + shape.first_position(), 0, shape.key_len);
      const std::int64_t stop = causal_limit(c);
      for (; next < start; ++next)
        if (end_of(next) > start && sees_column(b, unit, next)) alive.push_back(static_cast<std::int32_t>(next));
      std::erase_if(alive, [&](std::int32_t k) { return end_of(k) <= start; });
      std::vector<std::int32_t>& positions = positions_[static_cast<std::size_t>(row * chunks() + c)];
      positions.reserve(alive.size() + static_cast<std::size_t>(stop - start));
      const auto outlives = [&](std::int32_t k) { return end_of(k) >= stop; };
      std::copy_if(alive.begin(), alive.end(), std::back_inserter(positions), outlives);
      const auto dying = static_cast<std::ptrdiff_t>(positions.size());
      std::remove_copy_if(alive.begin(), alive.end(), std::back_inserter(positions), outlives);
      std::sort(positions.begin() + dying, positions.end(),
                [&](std::int32_t x, std::int32_t y) { return std::pair(end_of(y), y) < std::pair(end_of(x), x); });
      for (std::int64_t k = start; k < stop; ++k)
        if (end_of(k) > k && sees_column(b, unit, k)) positions.push_back(static_cast<std::int32_t>(k));
      lists_[static_cast<std::size_t>(row * chunks() + c)] = {.count = static_cast<std::int64_t>(positions.size()),
                                                              .positions = positions.data()};
    }
  });
}

/// A value for each pair: read once, packed to bits (causality and `end` among them). A chunk loads the keys that any
/// of its positions sees.
void Plan::Lists::list_bits(const Threads& threads) {
  positions_.resize(lists_.size());
  bits_.resize(lists_.size());
  const std::int64_t words = (shape.key_len + 63) / 64, first = shape.first_position();
  const Compress compress = best_compress();
  run_tasks(static_cast<std::int64_t>(lists_.size()), threads, [&](std::int64_t index, int) {
    const std::int64_t c = index % chunks(), unit = index / chunks() % list_heads_, b = index / chunks() / list_heads_;
    std::vector<std::uint64_t>& bits = bits_[static_cast<std::size_t>(index)];
    bits.assign(static_cast<std::size_t>(queries(c) * words), 0);
    std::vector<std::uint64_t> seen(static_cast<std::size_t>(words));
    const Ends end_of = ends(b, unit);
    for (std::int64_t i = 0; i < queries(c); ++i) {
      const std::int64_t query = first_query(c) + i, p = query + first;
      const std::uint8_t* row =
          at<const std::uint8_t>(*dense_, dense_->size[0] == 1 ? 0 : b, head_of(*dense_, unit), query, 0);
      const std::int64_t step = dense_->stride[3];
      const std::int64_t limit = is_causal ? std::clamp<std::int64_t>(p + 1, 0, shape.key_len) : shape.key_len;
      for (std::int64_t w = 0; w * 64 < limit; ++w) {
        const std::int64_t here = std::min<std::int64_t>(64, limit - w * 64);
        std::uint64_t word = 0;
        if (step == 1 && here == 64) {
          for (int byte = 0; byte < 8;
               ++byte) {  // eight booleans to eight bits: each product bit lands in the top byte
            std::uint64_t eight;
            __builtin_memcpy(&eight, row + w * 64 + byte * 8, 8);
            if constexpr (std::endian::native == std::endian::big) eight = __builtin_bswap64(eight);
            word |= (eight * 0x0102040810204080u >> 56) << (8 * byte);
          }
        } else {
          for (std::int64_t j = 0; j < here; ++j)
            word |= static_cast<std::uint64_t>(row[(w * 64 + j) * step] != 0) << j;
        }
        if (end_)
          for (std::uint64_t rest = word; rest != 0; rest &= rest - 1) {
            const int j = std::countr_zero(rest);
            if (end_of(w * 64 + j) <= p) word &= ~(std::uint64_t{1} << j);
          }
        bits[static_cast<std::size_t>(i * words + w)] = word;
        seen[static_cast<std::size_t>(w)] |= word;
      }
    }
    std::int64_t count = 0;
    for (std::uint64_t word : seen) count += std::popcount(word);
    KeyList& list = lists_[static_cast<std::size_t>(index)];
    std::int64_t used = words;  // without the empty words at the end
    while (used > 0 && seen[static_cast<std::size_t>(used - 1)] == 0) --used;
    // Gathering pays where it leaves out a good part of the span.
    if (count * 8 > used * 64 * 7) {
      list = {.count = std::min(used * 64, shape.key_len), .bits = bits.data(), .words = words};
      return;
    }
    std::vector<std::int32_t>& positions = positions_[static_cast<std::size_t>(index)];
    positions.reserve(static_cast<std::size_t>(count));
    for (std::int64_t w = 0; w < used; ++w)
      for (std::uint64_t rest = seen[static_cast<std::size_t>(w)]; rest != 0; rest &= rest - 1)
        positions.push_back(static_cast<std::int32_t>(w * 64 + std::countr_zero(rest)));
    const std::int64_t packed_words = (count + 63) / 64;
    for (std::int64_t i = 0; i < queries(c); ++i) {
      const std::uint64_t* from = bits.data() + i * words;
      std::uint64_t* to = bits.data() + i * packed_words;  // never ahead of `from`
      std::uint64_t word = 0;
      int filled = 0;
      for (std::int64_t w = 0; w < used; ++w) {
        const std::uint64_t chosen = seen[static_cast<std::size_t>(w)];
        if (chosen == 0) continue;
        const int n = std::popcount(chosen);
        const std::uint64_t part = chosen == ~std::uint64_t{0} ? from[w] : compress(from[w], chosen);
        word |= part << filled;
        if (filled + n >= 64) {
          *to++ = word;
          word = filled == 0 ? 0 : part >> (64 - filled);
          filled += n - 64;
        } else {
          filled += n;
        }
      }
      if (filled > 0) *to = word;
    }
    bits.resize(static_cast<std::size_t>(queries(c) * packed_words));
    bits.shrink_to_fit();
    list = {.count = count, .positions = positions.data(), .bits = bits.data(), .words = packed_words};
  });
}

}  // namespace flash_dmattn
