// The CUDA kernels as PyTorch operators: what is missing, where they are kept, compiling them ahead of time.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "flash_dmattn/cuda_kernels.h"

namespace flash_dmattn::cuda {
namespace {

// A function that takes text, as its address: operators take no functions.
void send_warnings_to(std::int64_t address) {
  set_warning_handler(
      [handler = reinterpret_cast<void (*)(const char*)>(address)](const std::string& text) { handler(text.c_str()); });
}

std::string missing_on(std::int64_t device) { return missing(static_cast<int>(device)); }

/// Of each kernel its arch, header and name, one after the other.
std::vector<std::string> kernels_of(const std::vector<std::string>& archs, const std::vector<std::string>& dtypes,
                                    const std::vector<std::int64_t>& head_dims, bool covering) {
  std::vector<DType> numbers;
  for (const std::string& dtype : dtypes) {
    if (dtype != "float16" && dtype != "bfloat16")
      throw InvalidArgument("dtypes: has " + dtype + ", takes float16 and bfloat16");
    numbers.push_back(dtype == "float16" ? DType::float16 : DType::bfloat16);
  }
  std::vector<std::string> texts;
  for (const Target& target : kernels(archs, numbers, head_dims, covering))
    texts.insert(texts.end(), {target.arch, target.kernel.header, target.kernel.name});
  return texts;
}

std::vector<std::int64_t> compile_one(std::string arch, std::string header, std::string name) {
  const Resources resources = compile({std::move(arch), {std::move(header), std::move(name)}});
  return {resources.registers, resources.local_bytes};
}

}  // namespace
}  // namespace flash_dmattn::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(flash_dmattn, library) {
  library.def("cuda_missing(int device) -> str");
  library.def("cuda_set_nvrtc_path(str[] paths) -> ()");
  library.def("cuda_set_warning_handler(int address) -> ()");
  library.def("cuda_compiler() -> str");
  library.def("cuda_cache_directory() -> str");
  library.def("cuda_kernels(str[] archs, str[] dtypes, int[] head_dims, bool covering) -> str[]");
  library.def("cuda_compile(str arch, str header, str name) -> int[]");
}

// Take no tensor, so no device picks their kernel.
STABLE_TORCH_LIBRARY_IMPL(flash_dmattn, CompositeExplicitAutograd, library) {
  namespace cuda = flash_dmattn::cuda;
  library.impl("cuda_missing", TORCH_BOX(&cuda::missing_on));
  library.impl("cuda_set_nvrtc_path", TORCH_BOX(&cuda::set_nvrtc_path));
  library.impl("cuda_set_warning_handler", TORCH_BOX(&cuda::send_warnings_to));
  library.impl("cuda_compiler", TORCH_BOX(&cuda::compiler));
  library.impl("cuda_cache_directory", TORCH_BOX(&cuda::cache_directory));
  library.impl("cuda_kernels", TORCH_BOX(&cuda::kernels_of));
  library.impl("cuda_compile", TORCH_BOX(&cuda::compile_one));
}
