// The engine as PyTorch operators, on PyTorch's stable ABI: one build loads under every torch >= 2.10. Shapes and
// strides are passed on as they are, and the engine says what it takes; fake kernels and autograd are in Python
// (operators.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "flash_dmattn/attention.h"
#include "flash_dmattn/dynamic_mask.h"

namespace flash_dmattn {
namespace {

using torch::headeronly::ScalarType;
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

template <int Rank>
View<Rank> view_of(const char* name, const Tensor& tensor, void* data) {
  if (tensor.dim() != Rank) {
    throw InvalidArgument(std::string(name) + " has " + std::to_string(tensor.dim()) + " dimensions; it takes " +
                          std::to_string(Rank));
  }
  if (!tensor.is_cpu()) throw InvalidArgument(std::string(name) + " is not on the CPU; it takes a CPU tensor");
  View<Rank> view{.data = data, .dtype = dtype_of(name, tensor)};
  for (int i = 0; i < Rank; ++i) {
    view.size[i] = tensor.size(i);
    // The stride of a dimension of size 1 is arbitrary in torch.
    view.stride[i] = tensor.size(i) == 1 ? (i == Rank - 1 ? 1 : 0) : tensor.stride(i);
  }
  return view;
}

// The engine does not write to inputs; reading through the const pointer leaves copy-on-write tensors shared.
template <int Rank>
View<Rank> input(const char* name, const Tensor& tensor) {
  return view_of<Rank>(name, tensor, const_cast<void*>(tensor.const_data_ptr()));
}

template <int Rank>
std::optional<View<Rank>> input(const char* name, const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return input<Rank>(name, *tensor);
}

template <int Rank>
View<Rank> output(const char* name, const Tensor& tensor) {
  return view_of<Rank>(name, tensor, tensor.mutable_data_ptr());
}

template <std::size_t Rank>
Tensor new_empty(const std::array<std::int64_t, Rank>& size, ScalarType dtype) {
  return torch::stable::empty({size.data(), size.size()}, dtype);
}

Tensor new_empty_like(const Tensor& tensor) { return torch::stable::empty(tensor.sizes(), tensor.scalar_type()); }

// What autograd brings may be expanded, as the gradient of a sum is; the engine takes a contiguous last dimension.
Tensor with_contiguous_rows(const Tensor& tensor) {
  const std::int64_t last = tensor.dim() - 1;
  return last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Threads torch_threads() {
  return {.count = static_cast<int>(torch::stable::get_num_threads()),
          .run = [](int count, const std::function<void(int)>& body) {
            torch::stable::parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) {
              for (std::int64_t worker = begin; worker < end; ++worker) body(static_cast<int>(worker));
            });
          }};
}

Problem make_problem(const Tensor& query, const Tensor& key, const Tensor* value, const std::optional<Tensor>& mask,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& end, double scale, double softcap,
                     bool is_causal) {
  return {.query = input<4>("query", query),
          .key = input<4>("key", key),
          .value = input<4>("value", value ? *value : key),
          .mask = input<4>("mask", mask),
          .bias = input<4>("bias", bias),
          .end = input<3>("end", end),
          .scale = scale,
          .softcap = softcap,
          .is_causal = is_causal};
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                       const std::optional<Tensor>& mask, const std::optional<Tensor>& bias,
                                       const std::optional<Tensor>& end, double scale, double softcap, bool is_causal) {
  const Threads threads = torch_threads();
  const Problem problem = make_problem(query, key, &value, mask, bias, end, scale, softcap, is_causal);
  const Plan plan(problem, threads);
  const auto& [batch, query_len, heads, head_dim] = problem.query.size;
  Tensor out = new_empty_like(query);
  Tensor lse = new_empty(std::array{batch, heads, query_len},
                         problem.query.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float);
  forward(problem, plan, {output<4>("out", out), output<3>("lse", lse)}, threads);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                                                        const Tensor& query, const Tensor& key, const Tensor& value,
                                                        const Tensor& out, const Tensor& lse,
                                                        const std::optional<Tensor>& mask,
                                                        const std::optional<Tensor>& bias,
                                                        const std::optional<Tensor>& end, double scale, double softcap,
                                                        bool is_causal, bool needs_bias_grad) {
  const Threads threads = torch_threads();
  const Problem problem = make_problem(query, key, &value, mask, bias, end, scale, softcap, is_causal);
  if (needs_bias_grad && !bias) throw InvalidArgument("needs_bias_grad is true without a bias; it takes false");
  const Plan plan(problem, threads);
  const Tensor grad_out_rows = with_contiguous_rows(grad_out);
  Tensor grad_query = new_empty_like(query), grad_key = new_empty_like(key), grad_value = new_empty_like(value);
  Tensor grad_bias =
      needs_bias_grad ? new_empty_like(*bias) : new_empty(std::array<std::int64_t, 1>{0}, query.scalar_type());
  InputGradient gradient{.query = output<4>("grad_query", grad_query),
                         .key = output<4>("grad_key", grad_key),
                         .value = output<4>("grad_value", grad_value),
                         .bias = std::nullopt};
  if (needs_bias_grad) gradient.bias = output<4>("grad_bias", grad_bias);
  backward(problem, plan, {input<4>("out", out), input<3>("lse", lse)},
           {input<4>("grad_out", grad_out_rows), input<3>("grad_lse", grad_lse)}, gradient, threads);
  return {grad_query, grad_key, grad_value, grad_bias};
}

Tensor probabilities_cpu(const Tensor& query, const Tensor& key, const Tensor& lse, const std::optional<Tensor>& mask,
                         const std::optional<Tensor>& bias, const std::optional<Tensor>& end, double scale,
                         double softcap, bool is_causal) {
  const Threads threads = torch_threads();
  const Problem problem = make_problem(query, key, nullptr, mask, bias, end, scale, softcap, is_causal);
  const Plan plan(problem, threads);
  const auto& [batch, query_len, heads, head_dim] = problem.query.size;
  Tensor probs = new_empty(std::array{batch, heads, query_len, problem.key.size[1]}, query.scalar_type());
  probabilities(problem, plan, input<3>("lse", lse), output<4>("probs", probs), threads);
  return probs;
}

Tensor dynamic_mask_end_cpu(const Tensor& score, const std::optional<Tensor>& key_padding_mask,
                            std::int64_t keep_window_size, std::int64_t query_len, bool is_causal) {
  const DynamicMask mask{.score = input<3>("score", score),
                         .key_padding_mask = input<2>("key_padding_mask", key_padding_mask),
                         .keep_window_size = keep_window_size,
                         .query_len = query_len,
                         .is_causal = is_causal};
  Tensor end = new_empty(mask.score.size, ScalarType::Int);
  make_dynamic_mask(mask, output<3>("end", end), std::nullopt, torch_threads());
  return end;
}

Tensor select_keys_cpu(const Tensor& score, const std::optional<Tensor>& visible, std::int64_t keep_window_size,
                       bool is_causal) {
  const View<4> score_view = input<4>("score", score);
  Tensor selected = new_empty(score_view.size, ScalarType::Bool);
  select_keys(score_view, input<4>("visible", visible), keep_window_size, is_causal, output<4>("selected", selected),
              torch_threads());
  return selected;
}

std::string cpu_instruction_set_name() { return cpu_instruction_set(); }

}  // namespace
}  // namespace flash_dmattn

STABLE_TORCH_LIBRARY(flash_dmattn, library) {
  library.def(
      "forward(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? end, float scale, "
      "float softcap, bool is_causal) -> (Tensor out, Tensor lse)");
  library.def(
      "backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "Tensor? mask, Tensor? bias, Tensor? end, float scale, float softcap, bool is_causal, bool needs_bias_grad) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)");
  library.def(
      "probabilities(Tensor query, Tensor key, Tensor lse, Tensor? mask, Tensor? bias, Tensor? end, float scale, "
      "float softcap, bool is_causal) -> Tensor");
  library.def(
      "dynamic_mask_end(Tensor score, Tensor? key_padding_mask, int keep_window_size, int query_len, bool is_causal) "
      "-> Tensor");
  library.def("select_keys(Tensor score, Tensor? visible, int keep_window_size, bool is_causal) -> Tensor");
  library.def("cpu_instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flash_dmattn, CPU, library) {
  library.impl("forward", TORCH_BOX(&flash_dmattn::forward_cpu));
  library.impl("backward", TORCH_BOX(&flash_dmattn::backward_cpu));
  library.impl("probabilities", TORCH_BOX(&flash_dmattn::probabilities_cpu));
  library.impl("dynamic_mask_end", TORCH_BOX(&flash_dmattn::dynamic_mask_end_cpu));
  library.impl("select_keys", TORCH_BOX(&flash_dmattn::select_keys_cpu));
}

// Takes no tensor, so no device picks its kernel.
STABLE_TORCH_LIBRARY_IMPL(flash_dmattn, CompositeExplicitAutograd, library) {
  library.impl("cpu_instruction_set", TORCH_BOX(&flash_dmattn::cpu_instruction_set_name));
}
