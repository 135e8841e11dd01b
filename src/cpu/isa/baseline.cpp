// Whatever the compiler takes the machine to have: SSE2 on x86-64, NEON on 64-bit ARM.
#define FLASH_DMATTN_ISA baseline
#include "cpu/kernel/all.h"

const flash_dmattn::cpu::Kernels& flash_dmattn::cpu::baseline_kernels(DType dtype) { return baseline::kernels(dtype); }
