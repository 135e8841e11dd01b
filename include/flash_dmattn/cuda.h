// The same passes on a GPU: fp16 and bfloat16, on NVIDIA GPUs of compute capability 8.0 and later.
//
// Needs no CUDA to build: the driver and NVRTC are loaded when first used, and kernels are compiled when first used.
// Views refer to memory of the stream's device. Nothing here waits for the device: errors of kernels come later.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "flash_dmattn/attention.h"
#include "flash_dmattn/dynamic_mask.h"

namespace flash_dmattn::cuda {

/// What the driver or the compiler says went wrong, or a sentence on what is missing.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A kernel: the struct template instance `name` (within flash_dmattn::cuda) of the embedded source `header`. It has
///     static constexpr int kThreads, kBlocksPerMultiprocessor;
///     using Params = …;
///     static void run(const Params& params, char* shared);
struct Kernel {
  std::string header;  ///< "sm80/forward.cuh"
  std::string name;    ///< "Forward<ForwardOptions{…}>"
  bool operator==(const Kernel&) const = default;
};

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

struct TensorBoxes;  // what the copy engine takes of a tensor, and what kernels take of that
struct TensorMap;

/// Where kernels are launched: one stream of a GPU, or, in tests, an emulation of one.
class Stream {
 public:
  virtual ~Stream() = default;
  virtual int arch() const = 0;  ///< compute capability: 80, 90, 120, …
  virtual int multiprocessors() const = 0;
  /// Memory, aligned to 256 bytes, that is there until the work that is launched on this object has run.
  virtual void* allocate(std::size_t bytes) = 0;
  /// Zeros, in the order of the launches.
  virtual void zero(void* memory, std::size_t bytes) = 0;
  /// For a parameter of a kernel that copies boxes; from compute capability 9.0 on.
  virtual TensorMap tensor_map(const TensorBoxes& boxes) const = 0;
  /// Calls `body`, whose launches may wait until it has returned: kernels that are new are compiled side by side.
  virtual void together(const std::function<void()>& body) { body(); }

  template <class Params>
  void launch(const Kernel& kernel, Grid grid, int threads, int shared_bytes, const Params& params) {
    if (grid.x > 0 && grid.y > 0 && grid.z > 0)
      launch_bytes(kernel, grid, threads, shared_bytes, &params, sizeof(Params));
  }
  template <class T>
  T* allocate_array(std::size_t count) {
    return static_cast<T*>(allocate(count * sizeof(T)));
  }

 protected:
  virtual void launch_bytes(const Kernel& kernel, Grid grid, int threads, int shared_bytes, const void* params,
                            std::size_t params_bytes) = 0;
};

/// A stream of a GPU. `stream` is a CUstream (cudaStream_t) of the device's primary context; `allocate` gives memory in
/// the order of that stream. Throws Error where the GPU cannot be used.
std::unique_ptr<Stream> gpu_stream(int device, void* stream, std::function<void*(std::size_t bytes)> allocate);

void forward(const Problem& problem, const Output& output, Stream& stream);

/// Of Output::mask_bits: (B | 1, 1 | Hk | H, ceil(Q / 32), K), as the mask is before an expand; zeros where it has no
/// value for each pair, and there are no bits.
std::array<std::int64_t, 4> mask_bits_size(const Problem& problem);

/// `deterministic`: the same bits on every run, for which sums wait for their turn.
void backward(const Problem& problem, const Output& output, const OutputGradient& output_gradient,
              const InputGradient& input_gradient, bool deterministic, Stream& stream);

void probabilities(const Problem& problem, const View<3>& lse, const View<4>& probs, Stream& stream);

/// As flash_dmattn::make_dynamic_mask, without threshold. `survivors` (causal only) is (B, heads, chunks, slots) int32
/// with chunks = ceil(K / survivor_chunk(w)) and slots = min(w, K): the positions of the keys that survive at the start
/// of each chunk (the w best of the keys before it), -1 where they are fewer. Attention makes its key lists from them.
void make_dynamic_mask(const DynamicMask& mask, const View<3>& end, const std::optional<View<4>>& survivors,
                       Stream& stream);

/// Key positions from one row of survivors to the next.
std::int64_t survivor_chunk(std::int64_t keep_window_size);

void select_keys(const View<4>& score, const std::optional<View<4>>& visible, std::int64_t keep_window_size,
                 bool is_causal, const View<4>& selected, Stream& stream);

}  // namespace flash_dmattn::cuda
