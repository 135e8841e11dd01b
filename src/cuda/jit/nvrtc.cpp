#include "cuda/jit/nvrtc.h"

#include <dlfcn.h>

#include <filesystem>
#include <memory>
#include <mutex>
#include <utility>

#include "cuda/jit/sources.h"
#include "cuda/jit/symbol.h"
#include "flash_dmattn/cuda_kernels.h"

namespace flash_dmattn::cuda {
namespace {

constexpr const char* kNames[] = {"libnvrtc.so.13", "libnvrtc.so.12"};

struct SearchPath {
  std::mutex mutex;
  std::vector<std::string> paths;
};

SearchPath& search_path() {
  static SearchPath& path = *new SearchPath;
  return path;
}

// The NVRTC that the process has, if any: two versions in one process only cost memory. libnvrtc-builtins, which NVRTC
// loads itself, is found beside it.
void* open_nvrtc() {
  for (const char* name : kNames)
    if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) return library;
  const std::lock_guard lock(search_path().mutex);
  for (const std::string& path : search_path().paths) {
    if (std::error_code error; !std::filesystem::is_directory(path, error)) {
      if (void* library = dlopen(path.c_str(), RTLD_LAZY)) return library;
      continue;
    }
    for (const char* name : kNames)
      if (void* library = dlopen((std::filesystem::path(path) / name).c_str(), RTLD_LAZY)) return library;
  }
  for (const std::string folder : {"", "/usr/local/cuda/lib64/"})
    for (const char* name : kNames)
      if (void* library = dlopen((folder + name).c_str(), RTLD_LAZY)) return library;
  throw Error(
      "NVRTC, which compiles CUDA kernels, is missing (libnvrtc.so.13 or .12): install PyTorch for CUDA, "
      "nvidia-cuda-nvrtc, or the CUDA toolkit");
}

std::string file_of(const void* symbol) {
  Dl_info info;
  return dladdr(symbol, &info) && info.dli_fname ? info.dli_fname : "";
}

}  // namespace

void set_nvrtc_path(std::vector<std::string> paths) {
  const std::lock_guard lock(search_path().mutex);
  search_path().paths = std::move(paths);
}

const Nvrtc& Nvrtc::get() {
  // Never unloaded: other threads may be compiling when the process ends.
  static const Nvrtc& nvrtc = *new Nvrtc;
  return nvrtc;
}

Nvrtc::Nvrtc() {
  void* library = open_nvrtc();
#define FLASH_DMATTN_LOAD(name) functions_.name = symbol<decltype(functions_.name)>(library, #name, "NVRTC")
  FLASH_DMATTN_LOAD(nvrtcGetErrorString);
  FLASH_DMATTN_LOAD(nvrtcVersion);
  FLASH_DMATTN_LOAD(nvrtcGetNumSupportedArchs);
  FLASH_DMATTN_LOAD(nvrtcGetSupportedArchs);
  FLASH_DMATTN_LOAD(nvrtcCreateProgram);
  FLASH_DMATTN_LOAD(nvrtcDestroyProgram);
  FLASH_DMATTN_LOAD(nvrtcCompileProgram);
  FLASH_DMATTN_LOAD(nvrtcGetProgramLogSize);
  FLASH_DMATTN_LOAD(nvrtcGetProgramLog);
  FLASH_DMATTN_LOAD(nvrtcGetCUBINSize);
  FLASH_DMATTN_LOAD(nvrtcGetCUBIN);
  FLASH_DMATTN_LOAD(nvrtcGetPTXSize);
  FLASH_DMATTN_LOAD(nvrtcGetPTX);
#undef FLASH_DMATTN_LOAD
  path_ = file_of(reinterpret_cast<const void*>(functions_.nvrtcVersion));
  int major = 0, minor = 0, count = 0;
  functions_.nvrtcVersion(&major, &minor);
  version_ = 100 * major + minor;
  functions_.nvrtcGetNumSupportedArchs(&count);
  archs_.resize(count);
  functions_.nvrtcGetSupportedArchs(archs_.data());
}

std::string Nvrtc::name() const {
  return "NVRTC " + std::to_string(version_ / 100) + "." + std::to_string(version_ % 100);
}

std::string Nvrtc::compile(const std::string& unit, const std::vector<std::string>& options) const {
  const auto check = [&](int status) {
    if (status != 0) throw Error(name() + ": " + functions_.nvrtcGetErrorString(status));
  };
  std::vector<const char*> texts, names, flags;
  for (const Source& source : sources()) {
    texts.push_back(source.text);
    names.push_back(source.name);
  }
  bool is_ptx = false;
  for (const std::string& option : options) {
    flags.push_back(option.c_str());
    is_ptx |= option.starts_with("-arch=compute_");
  }
  void* created;
  check(functions_.nvrtcCreateProgram(&created, unit.c_str(), "kernel.cu", static_cast<int>(names.size()), texts.data(),
                                      names.data()));
  const auto destroy = [&](void* program) { functions_.nvrtcDestroyProgram(&program); };
  const std::unique_ptr<void, decltype(destroy)> program(created, destroy);

  const auto get = [&](auto get_size, auto get_text) {
    std::size_t size = 0;
    check(get_size(program.get(), &size));
    std::string text(size, '\0');
    check(get_text(program.get(), text.data()));
    return text;
  };
  if (functions_.nvrtcCompileProgram(program.get(), static_cast<int>(flags.size()), flags.data()) != 0)
    throw Error(name() + " cannot compile a kernel:\n" + unit +
                get(functions_.nvrtcGetProgramLogSize, functions_.nvrtcGetProgramLog).c_str());
  return is_ptx ? get(functions_.nvrtcGetPTXSize, functions_.nvrtcGetPTX)
                : get(functions_.nvrtcGetCUBINSize, functions_.nvrtcGetCUBIN);
}

}  // namespace flash_dmattn::cuda
