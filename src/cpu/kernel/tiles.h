// How a chunk is cut: blocks of keys, each of a few panels, against tiles of rows. A row is a (query, head) pair; the
// heads of one query are neighbours.
#pragma once
#include "cpu/kernel/convert.h"
#include "cpu/kernel/math.h"
#include "cpu/kernel/scratch.h"
#include "cpu/kernels.h"

namespace flash_dmattn::cpu::FLASH_DMATTN_ISA {

constexpr std::int64_t kPanel = 64;   // keys that one word of bits covers
constexpr std::int64_t kBlock = 512;  // keys packed at a time
constexpr std::int64_t kPanels = kBlock / kPanel;
constexpr std::int64_t kScoreRow = kBlock + 16;  // the pad keeps a column's elements out of one cache set

/// A run of queries of the chunk, with all their heads.
struct Tile {
  std::int64_t first_query, queries, first_row, rows;
};

struct Tiles {
  std::int64_t pack, queries, queries_per_tile;

  /// Tiles of at most `rows` rows, if one query's heads are no more. With bits they are squares of a panel's side at
  /// the most, so that a mask of square tiles is skipped where it is empty.
  Tiles(const Chunk& chunk, std::int64_t rows) : pack(chunk.pack), queries(chunk.queries) {
    if (chunk.keys.bits != nullptr && rows > kPanel) rows = kPanel;
    queries_per_tile = pack < rows ? rows / pack : 1;
    if (queries_per_tile > queries) queries_per_tile = queries;
  }
  std::int64_t count() const { return (queries + queries_per_tile - 1) / queries_per_tile; }
  std::int64_t most_rows() const { return queries_per_tile * pack; }
  Tile operator[](std::int64_t t) const {
    const std::int64_t first = t * queries_per_tile, left = queries - first;
    const std::int64_t n = left < queries_per_tile ? left : queries_per_tile;
    return {first, n, first * pack, n * pack};
  }
};

enum class Test : std::uint8_t { skip, none, interval, bits };

/// The tests of one block against one tile: runs of panels that some row sees something of.
struct Tests {
  struct Run {
    std::int64_t first, last;  // panels
    std::int64_t first_key() const { return first * kPanel; }
    std::int64_t keys() const { return (last - first) * kPanel; }
  };
  Test of[kPanels];
  Run run[(kPanels + 1) / 2];
  int runs = 0;

  const Run* begin() const { return run; }
  const Run* end() const { return run + runs; }
  bool empty() const { return runs == 0; }
};

/// A block of the chunk's key list: the intervals of positions that see its keys.
template <class T>
struct Block {
  using Int = typename Lane<T>::Int;
  static constexpr Int kNever = -0x7fffffff - 1, kForEver = 0x7fffffff;
  std::int64_t first_key, count, panels;  // in the list; keys; panels that hold them
  std::int64_t row_bytes;                 // of a key's row in the caller's memory
  std::int32_t key[kBlock];               // absolute positions
  alignas(64) Int start[kBlock];
  alignas(64) Int end[kBlock];
  struct {
    Int first_start, last_start, first_end, last_end;
  } range[kPanels];

  /// The keys from `first` of the list on, a block of them or as many as are left before `last`.
  void read(const Chunk& chunk, std::int64_t first, std::int64_t last) {
    first_key = first;
    count = last - first < kBlock ? last - first : kBlock;
    panels = (count + kPanel - 1) / kPanel;
    row_bytes = chunk.head_dim * (chunk.key.dtype == DType::float64 ? 8 : chunk.key.dtype == DType::float32 ? 4 : 2);
    std::int32_t starts[kBlock], ends[kBlock];
    read_intervals(chunk, first, count, key, starts, ends);
    for (std::int64_t p = 0; p < panels; ++p) {
      auto& r = range[p];
      r = {kForEver, kNever, kForEver, kNever};
      for (std::int64_t i = p * kPanel; i < (p + 1) * kPanel; ++i) {
        start[i] = i < count ? starts[i] : kForEver;  // beyond the list: no position sees it
        end[i] = i < count ? ends[i] : kNever;
        if (start[i] < r.first_start) r.first_start = start[i];
        if (start[i] > r.last_start) r.last_start = start[i];
        if (end[i] < r.first_end) r.first_end = end[i];
        if (end[i] > r.last_end) r.last_end = end[i];
      }
    }
  }
};

/// The rows of a chunk: where each stands, and which keys it sees where the plan has bits.
template <class T>
struct Positions {
  KeyList keys;
  std::int32_t* of;  // by query of the chunk

  Positions(Scratch& scratch, const Chunk& chunk) : keys(chunk.keys), of(scratch.take<std::int32_t>(chunk.queries)) {}

  void read(const Chunk& chunk) { read_positions(chunk, of); }
  FLASH_DMATTN_INLINE std::uint64_t word(const Block<T>& block, std::int64_t query, std::int64_t panel) const {
    return keys.bits[query * keys.words + block.first_key / kPanel + panel];
  }

  Tests tests(const Block<T>& block, const Tile& tile) const {
    Tests tests;
    std::int32_t first = of[tile.first_query], last = first;
    for (std::int64_t i = 1; i < tile.queries; ++i) {
      const std::int32_t p = of[tile.first_query + i];
      first = p < first ? p : first;
      last = p > last ? p : last;
    }
    for (std::int64_t p = 0; p < block.panels; ++p) {
      const auto& r = block.range[p];
      Test test = r.first_start > last || r.last_end <= first   ? Test::skip
                  : r.last_start <= first && r.first_end > last ? Test::none
                                                                : Test::interval;
      if (keys.bits != nullptr) {
        std::uint64_t any = 0, all = ~std::uint64_t{0};
        for (std::int64_t i = 0; i < tile.queries; ++i) {
          const std::uint64_t w = word(block, tile.first_query + i, p);
          any |= w;
          all &= w;
        }
        test = any == 0 ? Test::skip : all == ~std::uint64_t{0} ? Test::none : Test::bits;
      }
      tests.of[p] = test;
      if (test == Test::skip) continue;
      if (p == 0 || tests.of[p - 1] == Test::skip) tests.run[tests.runs++].first = p;
      tests.run[tests.runs - 1].last = p + 1;
    }
    return tests;
  }
};

template <class T>
struct LaneBits {
  IntVec<T> bit;
  FLASH_DMATTN_INLINE LaneBits() {
    for (int i = 0; i < kLanes<T>; ++i) bit[i] = typename Lane<T>::Int{1} << i;
  }
};

/// logits where the row sees the key, else -inf. `lane` counts from the panel's first key.
template <class T>
FLASH_DMATTN_INLINE Vec<T> masked(Vec<T> logits, Test test, const Block<T>& block, std::int64_t panel, int lane,
                                  typename Lane<T>::Int position, std::uint64_t word) {
  using Int = typename Lane<T>::Int;
  const Vec<T> hidden = broadcast<T>(-kInfinity);
  if (test == Test::none) return logits;
  if (test == Test::skip) return hidden;
  if (test == Test::bits)
    return (broadcast<Int>(static_cast<Int>(word >> lane & ((std::uint64_t{1} << kLanes<T>)-1))) & LaneBits<T>().bit) !=
                   0
               ? logits
               : hidden;
  const IntVec<T> start = load(block.start + panel * kPanel + lane), end = load(block.end + panel * kPanel + lane);
  return ((start <= position) & (position < end)) ? logits : hidden;
}

/// The bias in base 2 for a block of keys: one row for all the chunk, one for each head, or one for each row of a tile.
template <class T>
struct BiasRows {
  T* rows;
  bool per_query, per_head;

  BiasRows(Scratch& scratch, const Chunk& chunk, std::int64_t tile_rows)
      : rows(scratch.take<T>(kBlock * (chunk.bias.per_query  ? tile_rows
                                       : chunk.bias.per_head ? chunk.pack
                                                             : 1))),
        per_query(chunk.bias.per_query),
        per_head(chunk.bias.per_head) {}

  FLASH_DMATTN_INLINE const T* row(std::int64_t row_of_tile, std::int64_t head) const {
    return rows + (per_query ? row_of_tile : per_head ? head : 0) * kBlock;
  }

  /// What holds for a whole block.
  void read(const Chunk& chunk, const Block<T>& block) {
    if (chunk.bias.data == nullptr) {
      for (std::int64_t i = 0; i < kBlock; ++i) rows[i] = 0;
    } else if (!per_query) {
      for (std::int64_t g = 0; g < (per_head ? chunk.pack : 1); ++g) read_row(chunk, block, 0, g, rows + g * kBlock);
    }
  }
  /// What only holds for a tile.
  void read(const Chunk& chunk, const Block<T>& block, const Tile& tile) {
    if (!per_query) return;
    for (std::int64_t i = 0; i < tile.queries; ++i)
      for (std::int64_t g = 0; g < chunk.pack; ++g)
        read_row(chunk, block, tile.first_query + i, g, rows + (i * chunk.pack + g) * kBlock);
  }

 private:
  static void read_row(const Chunk& chunk, const Block<T>& block, std::int64_t query, std::int64_t head, T* out) {
    const Bias& bias = chunk.bias;
    const char* row = bias.data + query * bias.query + head * bias.head;
    with_storage(bias.dtype, [&](auto storage) __attribute__((always_inline)) {
      for (std::int64_t i = 0; i < block.count; ++i)
        out[i] = in_base_2(
            static_cast<T>(widen(*reinterpret_cast<const decltype(storage)*>(row + block.key[i] * bias.key))));
    });
    for (std::int64_t i = block.count; i < block.panels * kPanel; ++i) out[i] = 0;
  }
  /// A finite bias stays finite: the lowest float32, transformers' mask, is not -inf.
  static FLASH_DMATTN_INLINE T in_base_2(T bias) {
    constexpr T largest = sizeof(T) == 4 ? T(0x1.fffffep127) : T(0x1.fffffffffffffp1023);
    const T x = bias * static_cast<T>(kLog2E);
    if (bias < -largest || bias > largest) return x;
    return x < -largest ? -largest : x > largest ? largest : x;
  }
};

/// Rows x columns of `in` become columns x rows: out[c * out_row + r] = in[r * in_row + c]. Both are multiples of the
/// lanes.
template <class E>
void transpose(const E* in, std::int64_t in_row, std::int64_t rows, std::int64_t columns, E* out,
               std::int64_t out_row) {
  constexpr int side = kLanes<E>;
  for (std::int64_t c = 0; c < columns; c += side)
    for (std::int64_t r = 0; r < rows; r += side) {
      Vec<E> square[side];
      for (int i = 0; i < side; ++i) square[i] = load(in + (r + i) * in_row + c);
      transpose_square<E>(square);
      for (int i = 0; i < side; ++i) store(out + (c + i) * out_row + r, square[i]);
    }
}

FLASH_DMATTN_INLINE char* row_of(const Rows& rows, std::int64_t i, std::int64_t head = 0) {
  return rows.data + i * rows.row + head * rows.head;
}

/// A key's row is rarely where the machine expects the next one: it is asked for some rows ahead.
constexpr std::int64_t kRowsAhead = 8;
template <class T>
FLASH_DMATTN_INLINE void prefetch_row(const Rows& from, const Block<T>& block, std::int64_t i) {
  if (i >= block.count) return;
  const char* row = row_of(from, block.key[i]);
  for (std::int64_t line = 0; line < block.row_bytes; line += 64) __builtin_prefetch(row + line);
}

/// The rows of a block's keys or values, widened and padded with zeros: `width` numbers each, whole panels.
template <class T>
void load_block(const Chunk& chunk, const Rows& from, const Block<T>& block, std::int64_t width, T* out) {
  for (std::int64_t i = 0; i < block.panels * kPanel; ++i, out += width) {
    const std::int64_t filled = i < block.count ? chunk.head_dim : 0;
    prefetch_row(from, block, i + kRowsAhead);
    if (filled > 0) load_row(from.dtype, row_of(from, block.key[i]), filled, out);
    for (std::int64_t d = filled; d < width; ++d) out[d] = 0;
  }
}

/// The rows of a chunk's queries (or of something shaped like them), widened and padded with zeros: `width` numbers
/// each.
template <class T>
void load_queries(const Chunk& chunk, const Rows& from, std::int64_t width, T* out) {
  for (std::int64_t i = 0; i < chunk.queries; ++i)
    for (std::int64_t g = 0; g < chunk.pack; ++g, out += width) {
      load_row(from.dtype, row_of(from, i, g), chunk.head_dim, out);
      for (std::int64_t d = chunk.head_dim; d < width; ++d) out[d] = 0;
    }
}

}  // namespace flash_dmattn::cpu::FLASH_DMATTN_ISA
