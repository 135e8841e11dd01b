// The engine as PyTorch operators, on PyTorch's stable ABI: one build loads under every torch >= 2.10, with CUDA or
// without. Shapes and strides are passed on as they are, and the engine says what it takes; fake kernels and autograd
// are in Python (operators.py).
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "flash_dmattn/attention.h"
#include "flash_dmattn/cuda.h"
#include "flash_dmattn/dynamic_mask.h"

namespace flash_dmattn {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Bool:
      return DType::boolean;
    case ScalarType::Int:
      return DType::int32;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    default:
      throw InvalidArgument(std::string(name) + " has dtype " + torch::headeronly::toString(tensor.scalar_type()) +
                            "; it takes bool, int32, float16, bfloat16, float32 or float64");
  }
}

std::int32_t torch_dtype(DType dtype) {
  switch (dtype) {
    case DType::boolean:
      return aoti_torch_dtype_bool();
    case DType::int32:
      return aoti_torch_dtype_int32();
    case DType::float16:
      return aoti_torch_dtype_float16();
    case DType::bfloat16:
      return aoti_torch_dtype_bfloat16();
    case DType::float32:
      return aoti_torch_dtype_float32();
    case DType::float64:
      return aoti_torch_dtype_float64();
  }
  throw InvalidArgument("dtype is none of the engine's");
}

std::string text(const Device& device) {
  return device.is_cpu() ? "cpu" : device.is_cuda() ? "cuda:" + std::to_string(device.index()) : "another device";
}

template <int Rank>
View<Rank> view_of(const char* name, const Tensor& tensor, void* data) {
  if (tensor.dim() != Rank) {
    throw InvalidArgument(std::string(name) + " has " + std::to_string(tensor.dim()) + " dimensions; it takes " +
                          std::to_string(Rank));
  }
  View<Rank> view{.data = data, .dtype = dtype_of(name, tensor)};
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (int i = 0; i < Rank; ++i) {
    view.size[i] = sizes[i];
    // The stride of a dimension of size 1 is arbitrary in torch.
    view.stride[i] = sizes[i] == 1 ? (i == Rank - 1 ? 1 : 0) : strides[i];
  }
  return view;
}

template <int Rank>
View<Rank> output(const char* name, const Tensor& tensor) {
  return view_of<Rank>(name, tensor, tensor.mutable_data_ptr());
}

// What autograd brings may be expanded, as the gradient of a sum is; the engine takes a contiguous last dimension.
Tensor with_contiguous_rows(const Tensor& tensor) {
  const std::int64_t last = tensor.dim() - 1;
  return last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// An operator's first tensor says on which device it runs: there all others have to be, and there new ones are made.
class OneDevice {
 public:
  OneDevice(const char* name, const Tensor& first, DeviceType type) : name_(name), device_(first.device()) {
    if (device_.type() != type) {
      throw InvalidArgument(std::string(name) + " is on " + text(device_) +
                            ", other tensors on a GPU; it takes a tensor on the same device");
    }
  }

  // The engine does not write to inputs; reading through the const pointer leaves copy-on-write tensors shared.
  template <int Rank>
  View<Rank> input(const char* name, const Tensor& tensor) const {
    if (tensor.device() != device_) {
      throw InvalidArgument(std::string(name) + " is on " + text(tensor.device()) + "; it takes a tensor on " +
                            text(device_) + ", as " + name_);
    }
    return view_of<Rank>(name, tensor, const_cast<void*>(tensor.const_data_ptr()));
  }
  template <int Rank>
  std::optional<View<Rank>> input(const char* name, const std::optional<Tensor>& tensor) const {
    if (!tensor) return std::nullopt;
    return input<Rank>(name, *tensor);
  }
  // Of operators that leave an empty tensor where there is nothing.
  template <int Rank>
  std::optional<View<Rank>> input_unless_empty(const char* name, const std::optional<Tensor>& tensor) const {
    if (!tensor || tensor->numel() == 0) return std::nullopt;
    return input<Rank>(name, *tensor);
  }

  // Contiguous. torch::stable::new_empty would look an operator up by its name, and box its arguments, each time.
  template <std::size_t Rank>
  Tensor empty(const std::array<std::int64_t, Rank>& size, DType dtype) const {
    std::array<std::int64_t, Rank> stride;
    std::uint64_t step = 1;  // May overflow; torch refuses such sizes.
    for (std::size_t i = Rank; i-- > 0; step *= std::max<std::int64_t>(size[i], 1)) stride[i] = step;
    AtenTensorHandle tensor = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        Rank, size.data(), stride.data(), torch_dtype(dtype),
        device_.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(), device_.index(), &tensor));
    return Tensor(tensor);
  }

 private:
  const char* name_;
  const Device device_;
};

Threads torch_threads() {
  return {.count = static_cast<int>(torch::stable::get_num_threads()),
          .run = [](int count, const std::function<void(int)>& body) {
            torch::stable::parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) {
              for (std::int64_t worker = begin; worker < end; ++worker) body(static_cast<int>(worker));
            });
          }};
}

// The engine on torch's threads.
class Cpu : public OneDevice {
 public:
  Cpu(const char* name, const Tensor& first) : OneDevice(name, first, DeviceType::CPU) {}

  void forward(const Problem& problem, const Output& output) const {
    flash_dmattn::forward(problem, Plan(problem, threads_), output, threads_);
  }
  void backward(const Problem& problem, const Output& output, const OutputGradient& output_gradient,
                const InputGradient& input_gradient, bool) const {
    flash_dmattn::backward(problem, Plan(problem, threads_), output, output_gradient, input_gradient, threads_);
  }
  void probabilities(const Problem& problem, const View<3>& lse, const View<4>& probs) const {
    flash_dmattn::probabilities(problem, Plan(problem, threads_), lse, probs, threads_);
  }
  static std::array<std::int64_t, 4> mask_bits_size(const Problem&) { return {}; }
  static std::array<std::int64_t, 2> survivors_size(const DynamicMask&) { return {0, 0}; }
  void make_dynamic_mask(const DynamicMask& mask, const View<3>& end, const View<4>&) const {
    flash_dmattn::make_dynamic_mask(mask, end, std::nullopt, threads_);
  }
  void select_keys(const View<4>& score, const std::optional<View<4>>& visible, std::int64_t keep_window_size,
                   bool is_causal, const View<4>& selected) const {
    flash_dmattn::select_keys(score, visible, keep_window_size, is_causal, selected, threads_);
  }

 private:
  Threads threads_ = torch_threads();
};

// In libtorch_cuda, which a torch for CPUs has not: looked up, not linked.
void* current_stream(int device) {
  using Function = AOTITorchError (*)(std::int32_t, void**);
  static const auto function = reinterpret_cast<Function>(
      dlsym(dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD), "aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  if (!function || function(device, &stream) != AOTI_TORCH_SUCCESS)
    throw cuda::Error("PyTorch does not say which CUDA stream is the current one");
  return stream;
}

// The engine on the current stream of the tensors' GPU. Its memory is torch's, and may be used again on that stream as
// soon as the operator has returned.
class Gpu : public OneDevice {
 public:
  Gpu(const char* name, const Tensor& first) : OneDevice(name, first, DeviceType::CUDA) {
    const int device = first.get_device_index();
    stream_ = cuda::gpu_stream(device, current_stream(device), [this](std::size_t bytes) { return allocate(bytes); });
  }
  Gpu(const Gpu&) = delete;

  void forward(const Problem& problem, const Output& output) const { cuda::forward(problem, output, *stream_); }
  void backward(const Problem& problem, const Output& output, const OutputGradient& output_gradient,
                const InputGradient& input_gradient, bool deterministic) const {
    cuda::backward(problem, output, output_gradient, input_gradient, deterministic, *stream_);
  }
  void probabilities(const Problem& problem, const View<3>& lse, const View<4>& probs) const {
    cuda::probabilities(problem, lse, probs, *stream_);
  }
  static std::array<std::int64_t, 4> mask_bits_size(const Problem& problem) { return cuda::mask_bits_size(problem); }
  static std::array<std::int64_t, 2> survivors_size(const DynamicMask& mask) {
    if (!mask.is_causal || mask.keep_window_size < 1) return {0, 0};
    const std::int64_t key_len = mask.score.size[2], chunk = cuda::survivor_chunk(mask.keep_window_size);
    return {(key_len + chunk - 1) / chunk, std::min(mask.keep_window_size, key_len)};
  }
  void make_dynamic_mask(const DynamicMask& mask, const View<3>& end, const View<4>& survivors) const {
    cuda::make_dynamic_mask(mask, end, mask.is_causal ? std::optional(survivors) : std::nullopt, *stream_);
  }
  void select_keys(const View<4>& score, const std::optional<View<4>>& visible, std::int64_t keep_window_size,
                   bool is_causal, const View<4>& selected) const {
    cuda::select_keys(score, visible, keep_window_size, is_causal, selected, *stream_);
  }

 private:
  // A tensor takes as long to make as a kernel to launch: small arrays share one, unless each is to be alone for a
  // memory checker, as torch's own are then.
  std::byte* allocate(std::size_t bytes) {
    static const std::size_t shared_bytes = std::getenv("PYTORCH_NO_CUDA_MEMORY_CACHING") ? 0 : std::size_t{1} << 20;
    constexpr std::size_t kAlignment = 256;
    if (bytes > shared_bytes / 4) return allocate_tensor(bytes);
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (bytes > shared_left_) {
      shared_ = allocate_tensor(shared_bytes);
      shared_left_ = shared_bytes;
    }
    shared_left_ -= bytes;
    return std::exchange(shared_, shared_ + bytes);
  }
  std::byte* allocate_tensor(std::size_t bytes) {
    const Tensor& memory = memory_.emplace_back(empty(std::array{static_cast<std::int64_t>(bytes)}, DType::boolean));
    return static_cast<std::byte*>(memory.mutable_data_ptr());
  }

  std::unique_ptr<cuda::Stream> stream_;
  std::vector<Tensor> memory_;
  std::byte* shared_ = nullptr;
  std::size_t shared_left_ = 0;
};

Problem make_problem(const OneDevice& device, const Tensor& query, const Tensor& key, const Tensor* value,
                     const std::optional<Tensor>& mask, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& end, const std::optional<Tensor>& survivors, double scale,
                     double softcap, bool is_causal) {
  return {.query = device.input<4>("query", query),
          .key = device.input<4>("key", key),
          .value = device.input<4>("value", value ? *value : key),
          .mask = device.input<4>("mask", mask),
          .bias = device.input<4>("bias", bias),
          .end = device.input<3>("end", end),
          .survivors = device.input_unless_empty<4>("survivors", survivors),
          .scale = scale,
          .softcap = softcap,
          .is_causal = is_causal};
}

template <class Engine>
std::tuple<Tensor, Tensor> run_forward(const Engine& engine, const Problem& problem,
                                       const std::optional<View<4>>& mask_bits) {
  const auto& [batch, query_len, heads, head_dim] = problem.query.size;
  const DType dtype = problem.query.dtype;
  const Tensor out = engine.empty(problem.query.size, dtype);
  const Tensor lse =
      engine.empty(std::array{batch, heads, query_len}, dtype == DType::float64 ? DType::float64 : DType::float32);
  engine.forward(problem, {output<4>("out", out), output<3>("lse", lse), mask_bits});
  return {out, lse};
}

template <class Engine>
std::tuple<Tensor, Tensor> forward_on(const Tensor& query, const Tensor& key, const Tensor& value,
                                      const std::optional<Tensor>& mask, const std::optional<Tensor>& bias,
                                      const std::optional<Tensor>& end, const std::optional<Tensor>& survivors,
                                      double scale, double softcap, bool is_causal, bool) {
  const Engine engine("query", query);
  return run_forward(engine,
                     make_problem(engine, query, key, &value, mask, bias, end, survivors, scale, softcap, is_causal),
                     std::nullopt);
}

template <class Engine>
std::tuple<Tensor, Tensor, Tensor> forward_saving_on(const Tensor& query, const Tensor& key, const Tensor& value,
                                                     const std::optional<Tensor>& mask,
                                                     const std::optional<Tensor>& bias,
                                                     const std::optional<Tensor>& end,
                                                     const std::optional<Tensor>& survivors, double scale,
                                                     double softcap, bool is_causal, bool) {
  const Engine engine("query", query);
  const Problem problem =
      make_problem(engine, query, key, &value, mask, bias, end, survivors, scale, softcap, is_causal);
  const Tensor mask_bits = engine.empty(Engine::mask_bits_size(problem), DType::int32);
  std::optional<View<4>> place;
  if (mask_bits.numel() > 0) place = output<4>("mask_bits", mask_bits);
  const auto [out, lse] = run_forward(engine, problem, place);
  return {out, lse, mask_bits};
}

template <class Engine>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_on(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& lse, const std::optional<Tensor>& mask_bits,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& bias, const std::optional<Tensor>& end,
    const std::optional<Tensor>& survivors, double scale, double softcap, bool is_causal, bool deterministic,
    bool needs_bias_grad) {
  const Engine engine("query", query);
  const Problem problem =
      make_problem(engine, query, key, &value, mask, bias, end, survivors, scale, softcap, is_causal);
  if (needs_bias_grad && !bias) throw InvalidArgument("needs_bias_grad is true without a bias; it takes false");
  const Tensor grad_out_rows = with_contiguous_rows(grad_out);
  const DType dtype = problem.query.dtype;
  const Tensor grad_query = engine.empty(problem.query.size, dtype), grad_key = engine.empty(problem.key.size, dtype),
               grad_value = engine.empty(problem.value.size, dtype);
  const Tensor grad_bias = needs_bias_grad ? engine.empty(problem.bias->size, problem.bias->dtype)
                                           : engine.empty(std::array<std::int64_t, 1>{0}, dtype);
  InputGradient gradient{.query = output<4>("grad_query", grad_query),
                         .key = output<4>("grad_key", grad_key),
                         .value = output<4>("grad_value", grad_value),
                         .bias = std::nullopt};
  if (needs_bias_grad) gradient.bias = output<4>("grad_bias", grad_bias);
  engine.backward(problem,
                  {engine.template input<4>("out", out), engine.template input<3>("lse", lse),
                   engine.template input_unless_empty<4>("mask_bits", mask_bits)},
                  {engine.template input<4>("grad_out", grad_out_rows), engine.template input<3>("grad_lse", grad_lse)},
                  gradient, deterministic);
  return {grad_query, grad_key, grad_value, grad_bias};
}

template <class Engine>
Tensor probabilities_on(const Tensor& query, const Tensor& key, const Tensor& lse, const std::optional<Tensor>& mask,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& end,
                        const std::optional<Tensor>& survivors, double scale, double softcap, bool is_causal) {
  const Engine engine("query", query);
  const Problem problem =
      make_problem(engine, query, key, nullptr, mask, bias, end, survivors, scale, softcap, is_causal);
  const auto& [batch, query_len, heads, head_dim] = problem.query.size;
  const Tensor probs = engine.empty(std::array{batch, heads, query_len, problem.key.size[1]}, problem.query.dtype);
  engine.probabilities(problem, engine.template input<3>("lse", lse), output<4>("probs", probs));
  return probs;
}

template <class Engine>
std::tuple<Tensor, Tensor> dynamic_mask_on(const Tensor& score, const std::optional<Tensor>& key_padding_mask,
                                           std::int64_t keep_window_size, std::int64_t query_len, bool is_causal) {
  const Engine engine("score", score);
  const DynamicMask mask{.score = engine.template input<3>("score", score),
                         .key_padding_mask = engine.template input<2>("key_padding_mask", key_padding_mask),
                         .keep_window_size = keep_window_size,
                         .query_len = query_len,
                         .is_causal = is_causal};
  const auto [chunks, slots] = Engine::survivors_size(mask);
  const Tensor end = engine.empty(mask.score.size, DType::int32);
  const Tensor survivors =
      engine.empty(std::array{mask.score.size[0], mask.score.size[1], chunks, slots}, DType::int32);
  engine.make_dynamic_mask(mask, output<3>("end", end), output<4>("survivors", survivors));
  return {end, survivors};
}

template <class Engine>
Tensor select_keys_on(const Tensor& score, const std::optional<Tensor>& visible, std::int64_t keep_window_size,
                      bool is_causal) {
  const Engine engine("score", score);
  const View<4> score_view = engine.template input<4>("score", score);
  const Tensor selected = engine.empty(score_view.size, DType::boolean);
  engine.select_keys(score_view, engine.template input<4>("visible", visible), keep_window_size, is_causal,
                     output<4>("selected", selected));
  return selected;
}

std::string cpu_instruction_set_name() { return cpu_instruction_set(); }

}  // namespace
}  // namespace flash_dmattn

STABLE_TORCH_LIBRARY(flash_dmattn, library) {
  library.def(
      "forward(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? end, Tensor? survivors, "
      "float scale, float softcap, bool is_causal, bool deterministic) -> (Tensor out, Tensor lse)");
  library.def(
      "forward_saving(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? end, "
      "Tensor? survivors, float scale, float softcap, bool is_causal, bool deterministic) "
      "-> (Tensor out, Tensor lse, Tensor mask_bits)");
  library.def(
      "backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "Tensor? mask_bits, Tensor? mask, Tensor? bias, Tensor? end, Tensor? survivors, float scale, float softcap, "
      "bool is_causal, bool deterministic, bool needs_bias_grad) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)");
  library.def(
      "probabilities(Tensor query, Tensor key, Tensor lse, Tensor? mask, Tensor? bias, Tensor? end, "
      "Tensor? survivors, float scale, float softcap, bool is_causal) -> Tensor");
  library.def(
      "dynamic_mask(Tensor score, Tensor? key_padding_mask, int keep_window_size, int query_len, bool is_causal) "
      "-> (Tensor end, Tensor survivors)");
  library.def("select_keys(Tensor score, Tensor? visible, int keep_window_size, bool is_causal) -> Tensor");
  library.def("survivor_chunk(int keep_window_size) -> int");
  library.def("cpu_instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flash_dmattn, CPU, library) {
  using flash_dmattn::Cpu;
  library.impl("forward", TORCH_BOX(&flash_dmattn::forward_on<Cpu>));
  library.impl("forward_saving", TORCH_BOX(&flash_dmattn::forward_saving_on<Cpu>));
  library.impl("backward", TORCH_BOX(&flash_dmattn::backward_on<Cpu>));
  library.impl("probabilities", TORCH_BOX(&flash_dmattn::probabilities_on<Cpu>));
  library.impl("dynamic_mask", TORCH_BOX(&flash_dmattn::dynamic_mask_on<Cpu>));
  library.impl("select_keys", TORCH_BOX(&flash_dmattn::select_keys_on<Cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(flash_dmattn, CUDA, library) {
  using flash_dmattn::Gpu;
  library.impl("forward", TORCH_BOX(&flash_dmattn::forward_on<Gpu>));
  library.impl("forward_saving", TORCH_BOX(&flash_dmattn::forward_saving_on<Gpu>));
  library.impl("backward", TORCH_BOX(&flash_dmattn::backward_on<Gpu>));
  library.impl("probabilities", TORCH_BOX(&flash_dmattn::probabilities_on<Gpu>));
  library.impl("dynamic_mask", TORCH_BOX(&flash_dmattn::dynamic_mask_on<Gpu>));
  library.impl("select_keys", TORCH_BOX(&flash_dmattn::select_keys_on<Gpu>));
}

// Take no tensor, so no device picks their kernel.
STABLE_TORCH_LIBRARY_IMPL(flash_dmattn, CompositeExplicitAutograd, library) {
  library.impl("survivor_chunk", TORCH_BOX(&flash_dmattn::cuda::survivor_chunk));
  library.impl("cpu_instruction_set", TORCH_BOX(&flash_dmattn::cpu_instruction_set_name));
}
