// A stream of a GPU: where launchers meet the driver.
#include <utility>

#include "cuda/jit/device.h"

namespace flash_dmattn::cuda {
namespace {

class GpuStream : public Stream {
 public:
  GpuStream(Device& device, CUstream stream, std::function<void*(std::size_t bytes)> allocate)
      : device_(device), stream_(stream), allocate_(std::move(allocate)) {
    const CUcontext context = device.context();
    CUcontext current = nullptr;
    driver_.check(driver_.cuCtxGetCurrent(&current), "The CUDA driver does not tell the current context");
    if (current != context) {
      driver_.check(driver_.cuCtxPushCurrent(context), "The GPU's context cannot be made current");
      pushed_ = true;
    }
  }
  GpuStream(const GpuStream&) = delete;
  ~GpuStream() override {
    CUcontext popped;
    if (pushed_) driver_.cuCtxPopCurrent(&popped);
  }

  int arch() const override { return device_.arch(); }
  int multiprocessors() const override { return device_.multiprocessors(); }
  void* allocate(std::size_t bytes) override { return bytes > 0 ? allocate_(bytes) : nullptr; }
  void zero(void* memory, std::size_t bytes) override {
    if (bytes == 0) return;
    driver_.check(driver_.cuMemsetD8Async(reinterpret_cast<CUdeviceptr>(memory), 0, bytes, stream_),
                  "Memory of the GPU cannot be set to zero");
  }

 protected:
  void launch_bytes(const Kernel& kernel, Grid grid, int threads, int shared_bytes, const void* params,
                    std::size_t) override {
    void* arguments[] = {const_cast<void*>(params)};
    const CUresult result = driver_.cuLaunchKernel(device_.function(kernel), grid.x, grid.y, grid.z, threads, 1, 1,
                                                   shared_bytes, stream_, arguments, nullptr);
    if (result != 0) driver_.fail(result, "The GPU does not take a launch of " + kernel.name);
  }

 private:
  const Driver& driver_ = Driver::get();
  Device& device_;
  CUstream stream_;
  std::function<void*(std::size_t bytes)> allocate_;
  bool pushed_ = false;
};

}  // namespace

std::unique_ptr<Stream> gpu_stream(int device, void* stream, std::function<void*(std::size_t bytes)> allocate) {
  return std::make_unique<GpuStream>(Device::get(device), static_cast<CUstream>(stream), std::move(allocate));
}

}  // namespace flash_dmattn::cuda
