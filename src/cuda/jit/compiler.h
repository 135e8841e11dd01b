// Kernels into images, which the driver loads: from the cache, or compiled.
#pragma once
#include <memory>
#include <string>

#include "flash_dmattn/cuda.h"

namespace flash_dmattn::cuda {

/// The oldest compute capability that kernels are written for.
constexpr int kOldestArch = 80;

/// What a kernel is called in its image, and in profiles: "flash_dmattn_Forward".
std::string entry_name(const Kernel& kernel);

/// A cubin or PTX.
using Image = std::shared_ptr<const std::string>;

/// `arch` is what NVRTC calls it: "sm_90a", or "compute_120" for PTX. Threads that ask for the same kernel compile it
/// once, those that ask for others in parallel.
Image image_of(const Kernel& kernel, const std::string& arch);

/// The number in "sm_90a". Throws InvalidArgument.
int arch_number(const std::string& arch);
/// What to compile with the installed NVRTC for GPUs of compute capability `arch`: "sm_90a". A GPU that NVRTC does not
/// know gets what an older one of its generation gets, or PTX. Throws Error where NVRTC is too old.
std::string nvrtc_arch(int arch);

}  // namespace flash_dmattn::cuda
