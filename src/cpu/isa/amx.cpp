// AVX-512 with bfloat16 dot products, and Intel's tile registers for bfloat16.
#define FLASH_DMATTN_ISA amx
#include "cpu/kernel/all.h"

const flash_dmattn::cpu::Kernels& flash_dmattn::cpu::amx_kernels(DType dtype) { return amx::kernels(dtype); }
