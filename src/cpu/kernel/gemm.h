// Matrix products of small tiles: C (M x N) += A (M x K) . B (K x N), with B's rows N lanes wide.
//
// A step of the inner loop multiplies one element of A, broadcast, with a vector of B. What an element is depends on
// the operands: a number, or a pair of bfloat16 that are neighbours along K.
#pragma once
#include "cpu/kernel/vector.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace flash_dmattn::cpu::FLASH_DMATTN_ISA {

/// T += T * T
template <class T>
struct Fma {
  using Element = T;
  using Sum = T;
  static FLASH_DMATTN_INLINE Vec<T> step(Vec<T> sum, T a, Vec<T> b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
/// float += bfloat16 * bfloat16 + bfloat16 * bfloat16: an element is two neighbours along K.
struct DotBf16 {
  using Element = std::int32_t;
  using Sum = float;
  static FLASH_DMATTN_INLINE Vec<float> step(Vec<float> sum, std::int32_t a, Vec<std::int32_t> b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)(_mm512_set1_epi32(a)), (__m512bh)(b));
  }
};
#endif

/// What the register file holds: kTileRows x kTileVectors sums, the vectors of one row of B, and one element of A.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 4;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif

/// One operand: the address of its first element, and the steps from row to row and along K (elements).
template <class E>
struct RowMajor {
  const E* data;
  std::int64_t row;
  FLASH_DMATTN_INLINE E operator()(std::int64_t i, std::int64_t k) const { return data[i * row + k]; }
  FLASH_DMATTN_INLINE RowMajor from(std::int64_t i, std::int64_t k) const { return {data + i * row + k, row}; }
};
template <class E>
struct Transposed {
  const E* data;
  std::int64_t row;
  FLASH_DMATTN_INLINE E operator()(std::int64_t i, std::int64_t k) const { return data[k * row + i]; }
  FLASH_DMATTN_INLINE Transposed from(std::int64_t i, std::int64_t k) const { return {data + k * row + i, row}; }
};

template <class Dot, int rows, int vectors, class A>
FLASH_DMATTN_INLINE void gemm_registers(A a, const typename Dot::Element* b, std::int64_t b_row, typename Dot::Sum* c,
                                        std::int64_t c_row, std::int64_t k_count, bool accumulate) {
  using Sum = typename Dot::Sum;
  constexpr int lanes = kLanes<Sum>;
  Vec<Sum> sum[rows][vectors];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) sum[i][j] = accumulate ? load(c + i * c_row + j * lanes) : Vec<Sum>{};
  for (std::int64_t k = 0; k < k_count; ++k) {
    Vec<typename Dot::Element> row_of_b[vectors];
    for (int j = 0; j < vectors; ++j) row_of_b[j] = load(b + k * b_row + j * lanes);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < vectors; ++j) sum[i][j] = Dot::step(sum[i][j], a(i, k), row_of_b[j]);
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) store(c + i * c_row + j * lanes, sum[i][j]);
}

template <class Dot, int vectors, class A>
void gemm_rows(A a, const typename Dot::Element* b, std::int64_t b_row, typename Dot::Sum* c, std::int64_t c_row,
               std::int64_t m, std::int64_t k_count, bool accumulate) {
  std::int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows)
    gemm_registers<Dot, kTileRows, vectors>(a.from(i, 0), b, b_row, c + i * c_row, c_row, k_count, accumulate);
  a = a.from(i, 0);
  c += i * c_row;
  switch (m - i) {
    case 1:
      return gemm_registers<Dot, 1, vectors>(a, b, b_row, c, c_row, k_count, accumulate);
    case 2:
      return gemm_registers<Dot, 2, vectors>(a, b, b_row, c, c_row, k_count, accumulate);
    case 3:
      return gemm_registers<Dot, 3, vectors>(a, b, b_row, c, c_row, k_count, accumulate);
    case 4:
      return gemm_registers<Dot, 4, vectors>(a, b, b_row, c, c_row, k_count, accumulate);
    case 5:
      return gemm_registers<Dot, 5, vectors>(a, b, b_row, c, c_row, k_count, accumulate);
    default:
      return;
  }
}

/// Long sums are cut into runs of K that leave B's part in the first-level cache while the rows of A pass by.
constexpr std::int64_t kRunOfK = 128;

/// n is a multiple of the lanes. k_count counts elements.
template <class Dot, class A>
void gemm(A a, const typename Dot::Element* b, std::int64_t b_row, typename Dot::Sum* c, std::int64_t c_row,
          std::int64_t m, std::int64_t n, std::int64_t k_count, bool accumulate) {
  constexpr int lanes = kLanes<typename Dot::Sum>;
  for (std::int64_t k = 0; k < k_count; k += kRunOfK) {
    const std::int64_t run = k_count - k < kRunOfK ? k_count - k : kRunOfK;
    const A part = a.from(0, k);
    const typename Dot::Element* b_part = b + k * b_row;
    const bool add = accumulate || k > 0;
    std::int64_t j = 0;
    for (; j + kTileVectors * lanes <= n; j += kTileVectors * lanes)
      gemm_rows<Dot, kTileVectors>(part, b_part + j, b_row, c + j, c_row, m, run, add);
    if constexpr (kTileVectors == 4) {
      if (n - j >= 2 * lanes) {
        gemm_rows<Dot, 2>(part, b_part + j, b_row, c + j, c_row, m, run, add);
        j += 2 * lanes;
      }
    }
    if (j < n) gemm_rows<Dot, 1>(part, b_part + j, b_row, c + j, c_row, m, run, add);
  }
}

}  // namespace flash_dmattn::cpu::FLASH_DMATTN_ISA
