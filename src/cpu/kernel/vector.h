// Vectors as wide as the instruction set that this translation unit is compiled for, in the compilers' own vector types
// (GCC and Clang): arithmetic, comparisons and a ? b : c work lane by lane, and a scalar operand is broadcast.
//
// Every header in this folder is compiled once per instruction set, inside the namespace FLASH_DMATTN_ISA, so that the
// linker never takes a function from one instruction set for another. For the same reason they use nothing of the
// standard library that could be emitted out of line.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef FLASH_DMATTN_ISA
#error "compile through a file in src/cpu/isa"
#endif
#define FLASH_DMATTN_INLINE inline __attribute__((always_inline))

namespace flash_dmattn::cpu::FLASH_DMATTN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Lane;
template <>
struct Lane<float> {
  using Int = std::int32_t;
  using Bits = std::uint32_t;
};
template <>
struct Lane<double> {
  using Int = std::int64_t;
  using Bits = std::uint64_t;
};

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::Type;
template <class T>
using IntVec = Vec<typename Lane<T>::Int>;

template <class T>
FLASH_DMATTN_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::Unaligned*>(p);
}
template <class T>
FLASH_DMATTN_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::Unaligned*>(p) = v;
}
template <class T>
FLASH_DMATTN_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}
template <class T>
FLASH_DMATTN_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T, int... lane>
struct Lanes {};
template <class T, int n = kLanes<T>, int... lane>
struct MakeLanes : MakeLanes<T, n - 1, n - 1, lane...> {};
template <class T, int... lane>
struct MakeLanes<T, 0, lane...> {
  using Type = Lanes<T, lane...>;
};

/// Lane i of the result is lane i ^ step of v.
template <int step, class T, int... lane>
FLASH_DMATTN_INLINE Vec<T> exchange(Vec<T> v, Lanes<T, lane...>) {
  return __builtin_shufflevector(v, v, (lane ^ step)...);
}
/// Combines all lanes in pairs, always in the same order; every lane of the result holds the total.
template <class T, int step = kLanes<T> / 2, class Combine>
FLASH_DMATTN_INLINE Vec<T> reduce(Vec<T> v, Combine combine) {
  if constexpr (step == 0) {
    return v;
  } else {
    return reduce<T, step / 2>(combine(v, exchange<step>(v, typename MakeLanes<T>::Type{})), combine);
  }
}
/// Rows i and i + step trade the quarters that a transposition moves between them.
template <int step, class T, int... lane>
FLASH_DMATTN_INLINE void trade(Vec<T>& a, Vec<T>& b, Lanes<T, lane...>) {
  constexpr int n = kLanes<T>;
  const Vec<T> first = __builtin_shufflevector(a, b, ((lane & step) ? n + (lane ^ step) : lane)...);
  b = __builtin_shufflevector(a, b, ((lane & step) ? n + lane : (lane ^ step))...);
  a = first;
}
/// As many rows as lanes become columns.
template <class T, int step = kLanes<T> / 2>
FLASH_DMATTN_INLINE void transpose_square(Vec<T> (&row)[kLanes<T>]) {
  if constexpr (step > 0) {
    for (int i = 0; i < kLanes<T>; ++i)
      if ((i & step) == 0) trade<step>(row[i], row[i + step], typename MakeLanes<T>::Type{});
    transpose_square<T, step / 2>(row);
  }
}
template <class T>
FLASH_DMATTN_INLINE bool any_greater(Vec<T> v, T limit) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_cmp_ps_mask((__m512)(v), (__m512)(broadcast<T>(limit)), _CMP_GT_OQ) != 0;
  else
    return _mm512_cmp_pd_mask((__m512d)(v), (__m512d)(broadcast<T>(limit)), _CMP_GT_OQ) != 0;
#else
  for (int i = 0; i < kLanes<T>; ++i)
    if (v[i] > limit) return true;
  return false;
#endif
}
template <class T>
FLASH_DMATTN_INLINE T max_of_lanes(Vec<T> v) {
  return reduce<T>(v, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return max<T>(a, b); })[0];
}
template <class T>
FLASH_DMATTN_INLINE T sum_of_lanes(Vec<T> v) {
  return reduce<T>(v, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a + b; })[0];
}

}  // namespace flash_dmattn::cpu::FLASH_DMATTN_ISA
