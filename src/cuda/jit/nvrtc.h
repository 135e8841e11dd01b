// NVRTC, NVIDIA's compiler, loaded when first used. Declares what is used of its API; no CUDA header.
#pragma once
#include <string>
#include <vector>

namespace flash_dmattn::cuda {

class Nvrtc {
 public:
  /// The one of this process. Throws Error where there is none; looks again at the next call.
  static const Nvrtc& get();

  int version() const { return version_; }  ///< 1208: 12.8
  std::string name() const;                 ///< "NVRTC 12.8"
  const std::string& path() const { return path_; }
  const std::vector<int>& archs() const { return archs_; }  ///< 80, 90, …, ascending

  /// A cubin ("sm_…" in `options`) or PTX ("compute_…"). All sources of sources() can be included. Throws Error.
  std::string compile(const std::string& unit, const std::vector<std::string>& options) const;

 private:
  Nvrtc();

  struct Functions {
    const char* (*nvrtcGetErrorString)(int);
    int (*nvrtcVersion)(int* major, int* minor);
    int (*nvrtcGetNumSupportedArchs)(int*);
    int (*nvrtcGetSupportedArchs)(int*);
    int (*nvrtcCreateProgram)(void** program, const char* source, const char* name, int headers,
                              const char* const* header_texts, const char* const* header_names);
    int (*nvrtcDestroyProgram)(void** program);
    int (*nvrtcCompileProgram)(void* program, int options, const char* const*);
    int (*nvrtcGetProgramLogSize)(void* program, std::size_t*);
    int (*nvrtcGetProgramLog)(void* program, char*);
    int (*nvrtcGetCUBINSize)(void* program, std::size_t*);
    int (*nvrtcGetCUBIN)(void* program, char*);
    int (*nvrtcGetPTXSize)(void* program, std::size_t*);
    int (*nvrtcGetPTX)(void* program, char*);
  } functions_;
  std::string path_;
  int version_;
  std::vector<int> archs_;
};

}  // namespace flash_dmattn::cuda
