// AVX-512 as in Skylake servers and Zen 4.
#define FLASH_DMATTN_ISA avx512
#include "cpu/kernel/all.h"

const flash_dmattn::cpu::Kernels& flash_dmattn::cpu::avx512_kernels(DType dtype) { return avx512::kernels(dtype); }
