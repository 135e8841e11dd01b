// The two products with keys and values, for each kind of arithmetic: how the operands are laid out, and what
// multiplies them. Scores: a row for each query . a row for each key. Values: probabilities . a row for each key.
#pragma once
#include "cpu/kernel/gemm.h"
#include "cpu/kernel/tiles.h"
#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace flash_dmattn::cpu::FLASH_DMATTN_ISA {

/// Operands and sums of the kernel's own type.
template <class T>
struct Plain {
  using Sum = T;
  using Exponential = Exp2<T>;
  static constexpr std::int64_t kRows = 96;  // of a tile: its scores stay in the second-level cache
  static void begin() {}
  static void end() {}

  /// Keys are transposed, panel by panel: width x 64.
  struct Scores {
    std::int64_t head_dim, width;  ///< width: head_dim, in whole vectors
    T *query, *keys, *panels;

    Scores(Scratch& scratch, const Chunk& chunk)
        : head_dim(chunk.head_dim),
          width(round_up(head_dim, kLanes<T>)),
          query(scratch.take<T>(chunk.queries * chunk.pack * width)),
          keys(scratch.take<T>(kBlock * width)),
          panels(scratch.take<T>(kBlock * width)) {}

    void load_query(const Chunk& chunk, const Rows& from) { load_queries(chunk, from, width, query); }
    void load_keys(const Chunk& chunk, const Rows& from, const Block<T>& block) {
      load_block(chunk, from, block, width, keys);
      for (std::int64_t p = 0; p < block.panels; ++p)
        transpose(keys + p * kPanel * width, width, kPanel, width, panels + p * kPanel * width, kPanel);
    }
    void multiply(const Tile& tile, const Tests& tests, T* out) const {
      for (const Tests::Run& run : tests)
        for (std::int64_t p = run.first; p < run.last; ++p)
          gemm<Fma<T>>(RowMajor<T>{query + tile.first_row * width, width}, panels + p * kPanel * width, kPanel,
                       out + p * kPanel, kScoreRow, tile.rows, kPanel, head_dim, false);
    }
  };
  /// Scores whose operands are wanted as rows, too: they are there.
  struct ScoresAndRows : Scores {
    using Scores::Scores;
    const T* query_rows() const { return this->query; }
    const T* key_rows() const { return this->keys; }
  };

  struct Values {
    std::int64_t width;
    T* values;

    Values(Scratch& scratch, const Chunk& chunk, const Tiles&)
        : width(round_up(chunk.head_dim, kLanes<T>)), values(scratch.take<T>(kBlock * width)) {}

    void load(const Chunk& chunk, const Rows& from, const Block<T>& block) {
      load_block(chunk, from, block, width, values);
    }
    /// Probabilities take the place of the scores.
    FLASH_DMATTN_INLINE T* probability_row(T* scores, std::int64_t row) const { return scores + row * kScoreRow; }
    static FLASH_DMATTN_INLINE void store_probabilities(T* out, const Vec<T> (&panel)[kPanel / kLanes<T>]) {
      for (int v = 0; v < kPanel / kLanes<T>; ++v) store(out + v * kLanes<T>, panel[v]);
    }
    void add(const Tile& tile, const Tests& tests, const T* scores, T* out) const {
      for (const Tests::Run& run : tests)
        gemm<Fma<T>>(RowMajor<T>{scores + run.first_key(), kScoreRow}, values + run.first_key() * width, width, out,
                     width, tile.rows, width, run.keys(), true);
    }
  };
};

#if defined(__AVX512BF16__)

#if defined(__AMX_BF16__)
/// C (m x n, float) += A (m x k pairs) . B (k pairs x n) on tiles of 16 x 16; m, n and k are multiples of 16.
inline void gemm_on_tiles(const std::int32_t* a, std::int64_t a_row, const std::int32_t* b, std::int64_t b_row,
                          float* c, std::int64_t c_row, std::int64_t m, std::int64_t n, std::int64_t k_count,
                          bool accumulate) {
  const std::int64_t a_bytes = a_row * 4, b_bytes = b_row * 4, c_bytes = c_row * 4;
  std::int64_t j = 0;
  for (; j + 32 <= n; j += 32) {
    std::int64_t i = 0;
    for (; i + 32 <= m; i += 32) {  // sums in tiles 0 to 3, two tiles of A, two of B
      float* out = c + i * c_row + j;
      if (accumulate) {
        _tile_loadd(0, out, c_bytes);
        _tile_loadd(1, out + 16, c_bytes);
        _tile_loadd(2, out + 16 * c_row, c_bytes);
        _tile_loadd(3, out + 16 * c_row + 16, c_bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (std::int64_t k = 0; k < k_count; k += 16) {
        _tile_loadd(4, a + i * a_row + k, a_bytes);
        _tile_loadd(6, b + k * b_row + j, b_bytes);
        _tile_loadd(7, b + k * b_row + j + 16, b_bytes);
        _tile_loadd(5, a + (i + 16) * a_row + k, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, out, c_bytes);
      _tile_stored(1, out + 16, c_bytes);
      _tile_stored(2, out + 16 * c_row, c_bytes);
      _tile_stored(3, out + 16 * c_row + 16, c_bytes);
    }
    for (; i < m; i += 16) {
      float* out = c + i * c_row + j;
      if (accumulate) {
        _tile_loadd(0, out, c_bytes);
        _tile_loadd(1, out + 16, c_bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
      }
      for (std::int64_t k = 0; k < k_count; k += 16) {
        _tile_loadd(4, a + i * a_row + k, a_bytes);
        _tile_loadd(6, b + k * b_row + j, b_bytes);
        _tile_loadd(7, b + k * b_row + j + 16, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, out, c_bytes);
      _tile_stored(1, out + 16, c_bytes);
    }
  }
  for (; j < n; j += 16)
    for (std::int64_t i = 0; i < m; i += 16) {
      float* out = c + i * c_row + j;
      if (accumulate)
        _tile_loadd(0, out, c_bytes);
      else
        _tile_zero(0);
      for (std::int64_t k = 0; k < k_count; k += 16) {
        _tile_loadd(4, a + i * a_row + k, a_bytes);
        _tile_loadd(6, b + k * b_row + j, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
      }
      _tile_stored(0, out, c_bytes);
    }
}
#endif

/// bfloat16 operands and float sums. An element is a pair of neighbours along the sum.
struct Pairs {
  using Sum = float;
  using Exponential = CoarseExp2;
  static constexpr std::int64_t kRows = 64;  // of a tile: its scores stay close, and are soon used
  static void begin() {
#if defined(__AMX_BF16__)
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
#endif
  }
  static void end() {
#if defined(__AMX_BF16__)
    _tile_release();
#endif
  }

  /// Pairs of the head dim, zeros included: whole tiles.
  static std::int64_t pairs_of(std::int64_t head_dim) { return round_up(head_dim, 32) / 2; }
  static void copy_row(const char* in, std::int64_t n, std::int64_t padded, BFloat16* out) {
    __builtin_memcpy(out, in, static_cast<std::size_t>(n) * sizeof(BFloat16));
    for (std::int64_t d = n; d < padded; ++d) out[d] = {0};
  }
  /// The rows of a block's keys or values, padded with zeros.
  static void copy_block(const Chunk& chunk, const Rows& from, const Block<float>& block, BFloat16* out) {
    const std::int64_t padded = pairs_of(chunk.head_dim) * 2;
    for (std::int64_t i = 0; i < block.panels * kPanel; ++i, out += padded) {
      prefetch_row(from, block, i + kRowsAhead);
      copy_row(row_of(from, i < block.count ? block.key[i] : 0), i < block.count ? chunk.head_dim : 0, padded, out);
    }
  }
  /// C (m x n) += A (m x 2k, rows) . B (k x n pairs)
  static void multiply(const BFloat16* a, std::int64_t a_row, const std::int32_t* b, std::int64_t b_row, float* c,
                       std::int64_t c_row, std::int64_t m, std::int64_t n, std::int64_t k, bool accumulate) {
    const auto* a_pairs = reinterpret_cast<const std::int32_t*>(a);
    std::int64_t done = 0;
#if defined(__AMX_BF16__)
    done = m / 16 * 16;
    gemm_on_tiles(a_pairs, a_row, b, b_row, c, c_row, done, n, k, accumulate);
#endif
    gemm<DotBf16>(RowMajor<std::int32_t>{a_pairs + done * a_row, a_row}, b, b_row, c + done * c_row, c_row, m - done, n,
                  k, accumulate);
  }

  /// Keys are transposed, panel by panel, in pairs of the head dim: pairs x 64.
  struct Scores {
    std::int64_t pairs;
    BFloat16 *query, *keys;
    std::int32_t* panels;

    Scores(Scratch& scratch, const Chunk& chunk)
        : pairs(pairs_of(chunk.head_dim)),
          query(scratch.take<BFloat16>(chunk.queries * chunk.pack * pairs * 2)),
          keys(scratch.take<BFloat16>(kBlock * pairs * 2)),
          panels(scratch.take<std::int32_t>(kBlock * pairs)) {}

    void load_query(const Chunk& chunk, const Rows& from) {
      BFloat16* out = query;
      for (std::int64_t i = 0; i < chunk.queries; ++i)
        for (std::int64_t g = 0; g < chunk.pack; ++g, out += pairs * 2)
          copy_row(row_of(from, i, g), chunk.head_dim, pairs * 2, out);
    }
    void load_keys(const Chunk& chunk, const Rows& from, const Block<float>& block) {
      copy_block(chunk, from, block, keys);
      for (std::int64_t p = 0; p < block.panels; ++p)
        transpose(reinterpret_cast<const std::int32_t*>(keys) + p * kPanel * pairs, pairs, kPanel, pairs,
                  panels + p * kPanel * pairs, kPanel);
    }
    void multiply(const Tile& tile, const Tests& tests, float* out) const {
      for (const Tests::Run& run : tests)
        for (std::int64_t p = run.first; p < run.last; ++p)
          Pairs::multiply(query + tile.first_row * pairs * 2, pairs, panels + p * kPanel * pairs, kPanel,
                          out + p * kPanel, kScoreRow, tile.rows, kPanel, pairs, false);
    }
  };
  /// Scores whose operands are wanted as float rows, too.
  struct ScoresAndRows : Scores {
    std::int64_t width;
    float *wide_query, *wide_keys;

    ScoresAndRows(Scratch& scratch, const Chunk& chunk)
        : Scores(scratch, chunk),
          width(round_up(chunk.head_dim, kLanes<float>)),
          wide_query(scratch.take<float>(chunk.queries * chunk.pack * width)),
          wide_keys(scratch.take<float>(kBlock * width)) {}

    void load_query(const Chunk& chunk, const Rows& from) {
      Scores::load_query(chunk, from);
      widen_rows(query, chunk.queries * chunk.pack, wide_query);
    }
    void load_keys(const Chunk& chunk, const Rows& from, const Block<float>& block) {
      Scores::load_keys(chunk, from, block);
      widen_rows(keys, block.panels * kPanel, wide_keys);
    }
    const float* query_rows() const { return wide_query; }
    const float* key_rows() const { return wide_keys; }

   private:
    void widen_rows(const BFloat16* in, std::int64_t rows, float* out) const {
      for (std::int64_t i = 0; i < rows; ++i, in += pairs * 2, out += width)
        for (std::int64_t d = 0; d < width; ++d) out[d] = widen(in[d]);
    }
  };

  /// Values are in pairs of keys: keys / 2 x width. Probabilities are rounded to bfloat16.
  struct Values {
    std::int64_t width;
    BFloat16 *rows, *probabilities;
    std::int32_t* values;

    Values(Scratch& scratch, const Chunk& chunk, const Tiles& tiles)
        : width(round_up(chunk.head_dim, kLanes<float>)),
          rows(scratch.take<BFloat16>(kBlock * pairs_of(chunk.head_dim) * 2)),
          probabilities(scratch.take<BFloat16>(tiles.most_rows() * kScoreRow)),
          values(scratch.take<std::int32_t>(kBlock / 2 * width)) {}

    void load(const Chunk& chunk, const Rows& from, const Block<float>& block) {
      copy_block(chunk, from, block, rows);
      const std::int64_t row = pairs_of(chunk.head_dim) * 2;
      for (std::int64_t i = 0; i < block.panels * kPanel; i += 2) {
        const BFloat16 *even = rows + i * row, *odd = even + row;
        std::int32_t* out = values + i / 2 * width;
        for (std::int64_t d = 0; d < width; ++d)
          out[d] = static_cast<std::int32_t>(even[d].bits | static_cast<std::uint32_t>(odd[d].bits) << 16);
      }
    }
    FLASH_DMATTN_INLINE BFloat16* probability_row(float*, std::int64_t row) const {
      return probabilities + row * kScoreRow;
    }
    static FLASH_DMATTN_INLINE void store_probabilities(BFloat16* out, const Vec<float> (&panel)[kPanel / 16]) {
      for (int v = 0; v < kPanel / 16; v += 2) {
        const __m512bh narrow = _mm512_cvtne2ps_pbh((__m512)(panel[v + 1]), (__m512)(panel[v]));
        __builtin_memcpy(out + v * 16, &narrow, sizeof(narrow));
      }
    }
    void add(const Tile& tile, const Tests& tests, const float*, float* out) const {
      for (const Tests::Run& run : tests)
        multiply(probabilities + run.first_key(), kScoreRow / 2, values + run.first_key() / 2 * width, width, out,
                 width, tile.rows, width, run.keys() / 2, true);
    }
  };
};

#endif

}  // namespace flash_dmattn::cpu::FLASH_DMATTN_ISA
