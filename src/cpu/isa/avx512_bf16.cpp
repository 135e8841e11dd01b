// AVX-512 with bfloat16 dot products.
#define FLASH_DMATTN_ISA avx512_bf16
#include "cpu/kernel/all.h"

const flash_dmattn::cpu::Kernels& flash_dmattn::cpu::avx512_bf16_kernels(DType dtype) {
  return avx512_bf16::kernels(dtype);
}
