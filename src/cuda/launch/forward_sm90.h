// The forward pass on Hopper's own kernels.
#pragma once
#include "flash_dmattn/cuda.h"

namespace flash_dmattn::cuda {

/// Whether it is theirs to do a problem.
bool takes_hopper_forward(const Problem& problem, const Stream& stream);

/// A problem that was checked and is not empty.
void hopper_forward(const Problem& problem, const Output& output, Stream& stream);

}  // namespace flash_dmattn::cuda
