// The kernels of the CUDA engine, compiled by NVRTC when first used and kept in a folder: what is missing to use them,
// where they are kept, and compiling them ahead of time, for which no GPU is needed.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "flash_dmattn/cuda.h"

namespace flash_dmattn::cuda {

/// One sentence on what keeps a GPU from being used (no driver, no such GPU, too old, no NVRTC); empty: nothing does.
std::string missing(int device);

/// Where NVRTC may be, files or folders, best first. They are looked at before the places that the dynamic linker
/// knows, and after an NVRTC that the process has loaded by itself. Counts until NVRTC is first used.
void set_nvrtc_path(std::vector<std::string> paths);

/// "NVRTC 13.0 (/usr/local/cuda/lib64/libnvrtc.so.13)". Throws Error where there is none.
std::string compiler();

/// The folder of compiled kernels: $FLASH_DMATTN_CACHE_DIR, else flash_dmattn in $XDG_CACHE_HOME or ~/.cache. Empty
/// where none of these is set: then nothing is kept.
std::string cache_directory();

/// The names of its files end in this.
inline constexpr char kCacheSuffix[] = ".kernel";

/// Takes the warnings (a folder that cannot be written to), instead of standard error.
void set_warning_handler(std::function<void(const std::string& text)> handler);

/// The kernels of the passes: `generic` ones for all GPUs, or those for `hopper` (sm_90a) wherever they can do a
/// problem. `automatic`: wherever they are the faster ones.
enum class Family { automatic, generic, hopper };

/// For comparing them. At first it is automatic, or what $FLASH_DMATTN_CUDA_FAMILY names.
void set_family(Family family);

/// A kernel and what it is compiled for.
struct Target {
  std::string arch;  ///< "sm_80", "sm_90a", …
  Kernel kernel;
};

/// All kernels that the engine can choose for these architectures, dtypes and head dims. `covering`: only so many that
/// every value of each option, and every pair of values of two options, is there.
std::vector<Target> kernels(const std::vector<std::string>& archs, const std::vector<DType>& dtypes,
                            const std::vector<std::int64_t>& head_dims, bool covering = false);

/// What a compiled kernel takes.
struct Resources {
  int registers;    ///< per thread
  int local_bytes;  ///< of memory per thread, where registers do not suffice (spills) or are indexed
};

/// Compiles a kernel, unless it is in the folder of compiled kernels, where it is put. Threads compile in parallel.
/// Throws Error with the compiler's messages.
Resources compile(const Target& target);

}  // namespace flash_dmattn::cuda
