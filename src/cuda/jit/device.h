// A GPU, and the kernels that are loaded on it.
#pragma once
#include <functional>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>

#include "cuda/jit/compiler.h"
#include "cuda/jit/driver.h"
#include "flash_dmattn/cuda.h"

namespace flash_dmattn::cuda {

class Device {
 public:
  /// Of this process, for good. Throws Error where there is none or it is too old.
  static Device& get(int index);

  int arch() const { return arch_; }
  int multiprocessors() const { return multiprocessors_; }
  /// The primary context, which PyTorch and the runtime API use, too.
  CUcontext context();
  /// Null unless it is loaded. As fast as finding a string.
  CUfunction find(const Kernel& kernel);
  /// Loads what was compiled from the kernel for this GPU, image(); the context is current.
  CUfunction load(const Kernel& kernel, const Image& image);
  Image image(const Kernel& kernel) const;

  explicit Device(int index);  ///< For get.

 private:
  struct HashOfName {
    std::size_t operator()(const Kernel& kernel) const { return std::hash<std::string>()(kernel.name); }
  };

  const Driver& driver_ = Driver::get();
  CUdevice device_;
  int arch_, multiprocessors_, shared_bytes_;
  std::shared_mutex mutex_;
  CUcontext context_ = nullptr;
  std::unordered_map<Kernel, CUfunction, HashOfName> functions_;
};

}  // namespace flash_dmattn::cuda
