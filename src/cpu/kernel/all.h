// The table of kernels of one instruction set. A file in src/cpu/isa includes this once, after naming FLASH_DMATTN_ISA.
#pragma once
#include "cpu/kernel/backward.h"
#include "cpu/kernel/forward.h"
#include "cpu/kernel/probabilities.h"

namespace flash_dmattn::cpu::FLASH_DMATTN_ISA {

template <class T>
void convert(const void* in, std::int64_t count, DType dtype, void* out) {
  store_row<T>(dtype, static_cast<const T*>(in), 1, count, out);
}

template <class Arithmetic>
const Kernels& kernels_of() {
  using T = typename Arithmetic::Sum;
  static constexpr Kernels kernels{sizeof(T) == 8 ? DType::float64 : DType::float32,
                                   Forward<Arithmetic>::scratch,
                                   Forward<Arithmetic>::run,
                                   Forward<Arithmetic>::combine,
                                   Backward<Arithmetic>::scratch,
                                   Backward<Arithmetic>::run,
                                   Backward<Arithmetic>::add_key_sums,
                                   Probabilities<T>::scratch,
                                   Probabilities<T>::run,
                                   convert<T>};
  return kernels;
}

inline const Kernels& kernels(DType dtype) {
  if (dtype == DType::float64) return kernels_of<Plain<double>>();
#if defined(__AVX512BF16__)
  if (dtype == DType::bfloat16) return kernels_of<Pairs>();
#endif
  return kernels_of<Plain<float>>();
}

}  // namespace flash_dmattn::cpu::FLASH_DMATTN_ISA
