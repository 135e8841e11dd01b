// Elementary functions on vectors.
#pragma once
#include "cpu/kernel/vector.h"

namespace flash_dmattn::cpu::FLASH_DMATTN_ISA {

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
constexpr float kInfinity = __builtin_inff();

template <class T>
struct Exp2;

/// 2^f on [-1/2, 1/2] by the polynomial of least relative error (Remez): 1.9e-9 for float, 3.1e-18 for double.
template <>
struct Exp2<float> {
  static constexpr float rounder = 0x1.8p23f, smallest = -126.0f;
  static constexpr int fraction_bits = 23;
  static constexpr float coefficient[] = {
      0.0001534581216f, 0.001339993118f, 0.009618488956f, 0.05550328777f, 0.2402264689f, 0.6931472057f, 1.0f};
};
template <>
struct Exp2<double> {
  static constexpr double rounder = 0x1.8p52, smallest = -1022.0;
  static constexpr int fraction_bits = 52;
  static constexpr double coefficient[] = {4.43528270695727715e-10, 7.0741056135081428e-9,  1.01781980216719308e-7,
                                           1.32154330896763992e-6,  0.0000152527334899885,  0.000154035304625144321,
                                           0.00133335581467899217,  0.00961812910758833524, 0.0555041086648199216,
                                           0.240226506959101562,    0.69314718055994533,    1.0};
};

/// Good for a result that is rounded to bfloat16: a relative error of 2.8e-06.
struct CoarseExp2 : Exp2<float> {
  static constexpr float coefficient[] = {0.00958284338f, 0.05590642563f, 0.2402409878f, 0.6931241934f, 1.0f};
};

/// 2^(x - base) for an integer base and results up to the exponent's range; 0 where the result would not be a normal
/// number, and so for x of -inf. The base costs nothing: it joins the number that rounds x.
template <class T, class C = Exp2<T>>
FLASH_DMATTN_INLINE Vec<T> exp2(Vec<T> x, T base = 0) {
  const T rounder = C::rounder - base;
  const Vec<T> shifted = x + rounder;  // the integer nearest to x - base, in the low bits
  const Vec<T> f = x - (shifted - rounder);
  Vec<T> p = broadcast<T>(C::coefficient[0]);
  for (int i = 1; i < static_cast<int>(sizeof(C::coefficient) / sizeof(T)); ++i) p = p * f + C::coefficient[i];
  using Bits = Vec<typename Lane<T>::Bits>;  // they wrap around where x is out of range
  const Vec<T> scaled = (Vec<T>)((Bits)p + ((Bits)shifted << C::fraction_bits));
  return x >= C::smallest + base ? scaled : Vec<T>{};
}

template <class T>
FLASH_DMATTN_INLINE T exp2(T x) {
  return exp2<T>(broadcast<T>(x))[0];
}

/// log2 of a positive normal number, by the compiler's library.
FLASH_DMATTN_INLINE float log2(float x) { return __builtin_log2f(x); }
FLASH_DMATTN_INLINE double log2(double x) { return __builtin_log2(x); }

FLASH_DMATTN_INLINE float ceil(float x) { return __builtin_ceilf(x); }
FLASH_DMATTN_INLINE double ceil(double x) { return __builtin_ceil(x); }

/// From products to logits in base 2: scale, softcap, bias. Base 2 because exp2 is the cheaper exponential.
template <class T>
struct Logit {
  T scale;  ///< times log2(e); with a softcap: what makes exp2 of it exp(2 s / softcap)
  T cap;    ///< softcap times log2(e); 0: none

  FLASH_DMATTN_INLINE Logit(double scale_, double softcap)
      : scale(static_cast<T>(softcap > 0 ? 2 * kLog2E * scale_ / softcap : kLog2E * scale_)),
        cap(static_cast<T>(softcap * kLog2E)) {}

  /// tanh(s / softcap) = 1 - 2 / (exp(2 s / softcap) + 1)
  FLASH_DMATTN_INLINE Vec<T> tanh(Vec<T> product) const {
    const Vec<T> x = product * scale;
    const T largest = -Exp2<T>::smallest;
    return T(1) - T(2) / (exp2<T>(x < largest ? x : broadcast<T>(largest)) + T(1));
  }
  template <bool capped>
  FLASH_DMATTN_INLINE Vec<T> operator()(Vec<T> product, Vec<T> bias) const {
    if constexpr (capped)
      return tanh(product) * cap + bias;
    else
      return product * scale + bias;
  }
};

}  // namespace flash_dmattn::cpu::FLASH_DMATTN_ISA
