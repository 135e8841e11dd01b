#include "cuda/jit/device.h"

#include <memory>
#include <vector>

#include "cuda/jit/nvrtc.h"
#include "flash_dmattn/cuda_kernels.h"

namespace flash_dmattn::cuda {

Device& Device::get(int index) {
  static std::shared_mutex mutex;
  // Never destroyed: the driver may be gone before.
  static auto& devices = *new std::unordered_map<int, std::unique_ptr<Device>>;
  {
    const std::shared_lock lock(mutex);
    if (const auto found = devices.find(index); found != devices.end()) return *found->second;
  }
  const std::unique_lock lock(mutex);
  if (const auto found = devices.find(index); found != devices.end()) return *found->second;
  return *devices.emplace(index, std::make_unique<Device>(index)).first->second;
}

Device::Device(int index) {
  int count = 0;
  driver_.check(driver_.cuDeviceGetCount(&count), "The CUDA driver does not tell its GPUs");
  if (index < 0 || index >= count)
    throw Error("There is no GPU " + std::to_string(index) + ": the CUDA driver has " + std::to_string(count));
  driver_.check(driver_.cuDeviceGet(&device_, index), "The CUDA driver does not give a GPU");
  const auto attribute = [&](CUdevice_attribute name) {
    int value = 0;
    driver_.check(driver_.cuDeviceGetAttribute(&value, name, device_), "The CUDA driver does not describe a GPU");
    return value;
  };
  arch_ = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
          attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  multiprocessors_ = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  shared_bytes_ = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  if (arch_ < kOldestArch) {
    char name[256] = "";
    driver_.cuDeviceGetName(name, sizeof name, device_);
    throw Error(std::string(name) + " is too old: it has compute capability " + std::to_string(arch_ / 10) + "." +
                std::to_string(arch_ % 10) + ", and 8.0 (Ampere) or later is needed");
  }
}

CUcontext Device::context() {
  {
    const std::shared_lock lock(mutex_);
    if (context_) return context_;
  }
  const std::unique_lock lock(mutex_);
  if (!context_) driver_.check(driver_.cuDevicePrimaryCtxRetain(&context_, device_), "The GPU has no context to give");
  return context_;
}

CUfunction Device::find(const Kernel& kernel) {
  const std::shared_lock lock(mutex_);
  const auto found = functions_.find(kernel);
  return found != functions_.end() ? found->second : nullptr;
}

Image Device::image(const Kernel& kernel) const { return image_of(kernel, nvrtc_arch(arch_)); }

CUfunction Device::load(const Kernel& kernel, const Image& image) {
  // Loading is no part of a CUDA graph that this thread may be capturing.
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  driver_.cuThreadExchangeStreamCaptureMode(&mode);
  CUmodule module;
  CUfunction function = nullptr;
  CUresult result = driver_.cuModuleLoadData(&module, image->data());
  if (result == 0) result = driver_.cuModuleGetFunction(&function, module, entry_name(kernel).c_str());
  // As much as a block may have: kernels have no shared memory but what is asked for at launch.
  if (result == 0)
    result = driver_.cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes_);
  driver_.cuThreadExchangeStreamCaptureMode(&mode);
  if (result != 0) {
    driver_.fail(result, "The CUDA driver (for CUDA " + driver_.version() + ") does not load what " +
                             Nvrtc::get().name() + " compiled from " + kernel.name);
  }
  const std::unique_lock lock(mutex_);
  return functions_.emplace(kernel, function).first->second;
}

std::string missing(int device) {
  try {
    nvrtc_arch(Device::get(device).arch());
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace flash_dmattn::cuda
