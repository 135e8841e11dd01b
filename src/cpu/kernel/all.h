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

template <class T, class Product>
const Kernels& kernels_of() {
  static constexpr Kernels kernels{sizeof(T) == 8 ? DType::float64 : DType::float32,
                                   Forward<Product>::scratch,
                                   Forward<Product>::run,
                                   Forward<Product>::combine,
                                   Backward<T>::scratch,
                                   Backward<T>::run,
                                   Backward<T>::add_key_sums,
                                   Probabilities<T>::scratch,
                                   Probabilities<T>::run,
                                   convert<T>};
  return kernels;
}

inline const Kernels& kernels(DType dtype) {
  if (dtype == DType::float64) return kernels_of<double, PlainProduct<double>>();
#if defined(__AVX512BF16__)
  if (dtype == DType::bfloat16) return kernels_of<float, PairProduct>();
#endif
  return kernels_of<float, PlainProduct<float>>();
}

}  // namespace flash_dmattn::cpu::FLASH_DMATTN_ISA
