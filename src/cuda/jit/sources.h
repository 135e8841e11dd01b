// The sources of the kernels, src/cuda/kernels/**/*.cuh; the build embeds them (cmake/embed.cmake).
#pragma once
#include <span>

namespace flash_dmattn::cuda {

struct Source {
  const char* name;  ///< what other sources include: "sm80/forward.cuh"
  const char* text;
};

std::span<const Source> sources();

}  // namespace flash_dmattn::cuda
