// Runs kernels of src/cuda/kernels on the CPU.
//
// A test compiles the kernels that it needs, and launches them on an EmulatedStream, itself or through a launcher:
//
//     #include "sm80/forward.cuh"              // finds ptx/ here, not in src/cuda/kernels
//     namespace flash_dmattn::cuda {           // at namespace scope; the text is what Kernel::name has
//     EMULATE(Forward<ForwardOptions{90, 128, Number::bfloat16, Test::interval, BiasKind::none, false, false}>);
//     }
//     ...
//     cuda::EmulatedStream stream;
//     cuda::forward(problem, output, stream);  // the tensors are plain host memory
//
// A launch that finds no kernel of its name says which line is missing. Launches have run when they return.
//
// A kernel that includes ptx/ lies in a folder of src/cuda/kernels: beside ptx/, it would find the real one.
//
// What is emulated: threads of up to multiprocessors() * kBlocksPerMultiprocessor blocks (and 4096 threads) take turns,
// in an order that is random but the same on every run; blocks start in the order of their index, x first. Shared
// memory, and memory that was allocated, are NaN until written. A copy_async_16 destroys what it will overwrite at
// once, and what is on its way there, and lands when its thread waits for it; what counts at a Barrier lands when
// nobody can go on without; bulk copies read shared memory, and then write, when they are waited for. Products of a
// warpgroup run when they are waited for: until then their accumulators are NaN, and so is every number of theirs that
// changes in shared memory. Reported, as an Error that launch throws: addresses that are not aligned or not in shared
// memory where they must be, writes past the end of shared or allocated memory (when the block or the kernel has
// ended), threads of a warp or a warpgroup that meet at different instructions, barriers without init, products and
// bulk copies that nobody waits for, and threads that wait for ever. Not seen: conflicts of banks, a forgotten
// fence_for_bulk, registers that grow or shrink, and races that no order of turns between two meetings can show.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "flash_dmattn/cuda.h"

namespace flash_dmattn::cuda {

namespace emulator {

struct EmulatedKernel {
  int threads, blocks_per_multiprocessor;
  std::size_t params_bytes;
  void (*run)(const void* params, char* shared);
};

/// By name, without spaces.
std::map<std::string, EmulatedKernel>& kernels();
std::string without_spaces(const std::string& text);

template <class K>
bool add_kernel(const std::string& name) {
  using Params = typename K::Params;
  kernels()[without_spaces(name)] = {
      K::kThreads, K::kBlocksPerMultiprocessor, sizeof(Params),
      [](const void* params, char* shared) { K::run(*static_cast<const Params*>(params), shared); }};
  return true;
}

}  // namespace emulator

#define EMULATE_JOIN_(a, b) a##b
#define EMULATE_NAME_(line) EMULATE_JOIN_(emulated_kernel_, line)
/// Makes one kernel known.
#define EMULATE(...)                                              \
  [[maybe_unused]] static const bool EMULATE_NAME_(__COUNTER__) = \
      ::flash_dmattn::cuda::emulator::add_kernel<__VA_ARGS__>(#__VA_ARGS__)

class EmulatedStream : public Stream {
 public:
  explicit EmulatedStream(int arch = 90, int multiprocessors = 3) : arch_(arch), multiprocessors_(multiprocessors) {}
  int arch() const override { return arch_; }
  int multiprocessors() const override { return multiprocessors_; }
  void* allocate(std::size_t bytes) override;
  void zero(void* memory, std::size_t bytes) override;
  TensorMap tensor_map(const TensorBoxes& boxes) const override;

  /// For the order in which threads take turns.
  void seed(unsigned seed) { seed_ = seed; }
  std::size_t allocated_bytes() const;
  /// What has been launched.
  const std::vector<std::string>& launched() const { return launched_; }

 protected:
  void launch_bytes(const Kernel& kernel, Grid grid, int threads, int shared_bytes, const void* params,
                    std::size_t params_bytes) override;

 private:
  struct Memory {
    std::unique_ptr<unsigned char[]> bytes;  // what was allocated, between two guards
    unsigned char* start;
    std::size_t size;
  };
  void check_guards(const std::string& after) const;

  int arch_, multiprocessors_;
  unsigned seed_ = 1;
  std::vector<Memory> memory_;
  std::vector<std::string> launched_;
};

}  // namespace flash_dmattn::cuda
