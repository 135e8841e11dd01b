// A stream of a GPU: where launchers meet the driver.
#include <algorithm>
#include <array>
#include <cstdint>
#include <future>
#include <utility>
#include <vector>

#include "cuda/jit/device.h"
#include "tensor_map.cuh"

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
    const auto set = [=, this] {
      driver_.check(driver_.cuMemsetD8Async(reinterpret_cast<CUdeviceptr>(memory), 0, bytes, stream_),
                    "Memory of the GPU cannot be set to zero");
    };
    if (waiting_.empty())
      set();
    else
      waiting_.push_back(set);
  }
  TensorMap tensor_map(const TensorBoxes& boxes) const override {
    const auto [batch, positions, heads, columns] = boxes.size;
    const auto of = [](auto... numbers) { return std::array{static_cast<std::uint64_t>(numbers)...}; };
    // From dimension to dimension, the contiguous one first; strides are in bytes. That of a dimension of one is free.
    const auto bytes = [](i64 stride, int size) { return size > 1 ? 2 * stride : 16; };
    const auto sizes = of(columns, heads, positions, batch);
    const auto strides =
        of(bytes(boxes.rows.head, heads), bytes(boxes.rows.position, positions), bytes(boxes.rows.batch, batch));
    const std::array<unsigned, 4> box{kBoxColumns, static_cast<unsigned>(boxes.heads),
                                      static_cast<unsigned>(boxes.positions), 1},
        steps{1, 1, 1, 1};
    TensorMap map;
    driver_.check(driver_.cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, boxes.rows.data, sizes.data(),
                                                 strides.data(), box.data(), steps.data(),
                                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
                  "The CUDA driver does not take a tensor for bulk copies");
    return map;
  }
  void together(const std::function<void()>& body) override {
    if (is_together_) return body();
    is_together_ = true;
    try {
      body();
      for (auto& [kernel, image] : new_) device_.load(kernel, image.get());
      for (const auto& launch : waiting_) launch();
    } catch (...) {
      forget_waiting();
      throw;
    }
    forget_waiting();
  }

 protected:
  void launch_bytes(const Kernel& kernel, Grid grid, int threads, int shared_bytes, const void* params,
                    std::size_t params_bytes) override {
    const CUfunction function = device_.find(kernel);
    if (function && waiting_.empty()) return launch_loaded(function, kernel, grid, threads, shared_bytes, params);
    if (!is_together_)
      return launch_loaded(device_.load(kernel, device_.image(kernel)), kernel, grid, threads, shared_bytes, params);
    if (!function) start_compiling(kernel);
    waiting_.push_back([=, this, bytes = std::string(static_cast<const char*>(params), params_bytes)] {
      launch_loaded(device_.find(kernel), kernel, grid, threads, shared_bytes, bytes.data());
    });
  }

 private:
  void launch_loaded(CUfunction function, const Kernel& kernel, Grid grid, int threads, int shared_bytes,
                     const void* params) {
    void* arguments[] = {const_cast<void*>(params)};
    const CUresult result = driver_.cuLaunchKernel(function, grid.x, grid.y, grid.z, threads, 1, 1, shared_bytes,
                                                   stream_, arguments, nullptr);
    if (result != 0) driver_.fail(result, "The GPU does not take a launch of " + kernel.name);
  }

  void start_compiling(const Kernel& kernel) {
    if (std::ranges::find(new_, kernel, &NewKernel::first) == new_.end())
      new_.emplace_back(kernel, std::async([this, kernel] { return device_.image(kernel); }));
  }
  void forget_waiting() {
    is_together_ = false;
    waiting_.clear();
    new_.clear();
  }

  using NewKernel = std::pair<Kernel, std::future<Image>>;
  const Driver& driver_ = Driver::get();
  Device& device_;
  CUstream stream_;
  std::function<void*(std::size_t bytes)> allocate_;
  bool pushed_ = false, is_together_ = false;
  // Within together(): what is being compiled; its first launch, and all that comes after that.
  std::vector<NewKernel> new_;
  std::vector<std::function<void()>> waiting_;
};

}  // namespace

std::unique_ptr<Stream> gpu_stream(int device, void* stream, std::function<void*(std::size_t bytes)> allocate) {
  return std::make_unique<GpuStream>(Device::get(device), static_cast<CUstream>(stream), std::move(allocate));
}

}  // namespace flash_dmattn::cuda
