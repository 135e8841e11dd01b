// AVX2 with fused multiply-add.
#define FLASH_DMATTN_ISA avx2
#include "cpu/kernel/all.h"

const flash_dmattn::cpu::Kernels& flash_dmattn::cpu::avx2_kernels(DType dtype) { return avx2::kernels(dtype); }
