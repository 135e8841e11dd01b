// Which kernels the passes take: those for one architecture, or those that run on all.
#pragma once
#include "flash_dmattn/cuda_kernels.h"

namespace flash_dmattn::cuda {

/// What set_family says, else $FLASH_DMATTN_CUDA_FAMILY.
Family family();

}  // namespace flash_dmattn::cuda
