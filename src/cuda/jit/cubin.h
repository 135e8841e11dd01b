// Reads from a compiled kernel what it takes.
#pragma once
#include <string_view>

#include "flash_dmattn/cuda_kernels.h"

namespace flash_dmattn::cuda {

/// Of a cubin (an ELF file); the maximum where it has several functions. Throws Error if it is none.
Resources resources(std::string_view cubin);

}  // namespace flash_dmattn::cuda
