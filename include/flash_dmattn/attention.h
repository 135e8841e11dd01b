// Attention over any mask: describe the problem, make a plan, run it.
//
//     Problem problem{.query = q, .key = k, .value = v, .scale = 0.125, .is_causal = true};
//     Plan plan(problem, threads);
//     forward(problem, plan, {out, lse}, threads);
//     backward(problem, plan, saved, gradients, threads);
#pragma once
#include <cstdint>
#include <memory>
#include <optional>

#include "flash_dmattn/tensor.h"
#include "flash_dmattn/threads.h"

namespace flash_dmattn {

/// B batch, Q query length, K key length, H query heads, Hk KV heads (H % Hk == 0), D head dim (1..256).
///
///     s   = scale * (query . key);  s = softcap * tanh(s / softcap) where softcap > 0;  s += bias
///     out = softmax(s over the visible keys) . value;  lse = log(sum(exp(s)))
///     visible(q, k) = mask[q, k] and (not is_causal or k <= p) and p < end[k],  p = q + K - Q
///
/// A query that sees no key has output 0 and lse -inf.
struct Problem {
  View<4> query;                     ///< (B, Q, H, D) float16, bfloat16, float32 or float64, last dimension contiguous
  View<4> key;                       ///< (B, K, Hk, D), the query's dtype
  View<4> value;                     ///< (B, K, Hk, D), the query's dtype
  std::optional<View<4>> mask = {};  ///< (B | 1, 1 | Hk | H, 1 | Q, 1 | K) boolean: true is visible
  std::optional<View<4>> bias =
      {};  ///< (B | 1, 1 | Hk | H, 1 | Q, 1 | K), the query's dtype or float32; -inf masks the key
  std::optional<View<3>> end = {};        ///< (B | 1, 1 | Hk | H, K) int32, from make_dynamic_mask
  std::optional<View<4>> survivors = {};  ///< beside end, on a GPU: from cuda::make_dynamic_mask; the CPU needs none
  double scale = 1;
  double softcap = 0;  ///< 0: none
  bool is_causal = false;
};

/// What there is to load for every run of query positions, and how it is tested: made once, read by every pass.
/// Refers to the problem's mask and end, which must outlive it.
class Plan {
 public:
  Plan(const Problem& problem, const Threads& threads);  ///< Throws InvalidArgument where the problem fits no rule.
  ~Plan();
  Plan(Plan&&) noexcept;
  Plan& operator=(Plan&&) noexcept;
  struct Lists;
  const Lists& lists() const { return *lists_; }

 private:
  std::unique_ptr<const Lists> lists_;
};

struct Output {
  View<4> out;  ///< (B, Q, H, D), the query's dtype
  View<3> lse;  ///< (B, H, Q) float32 (float64 for float64), natural logarithm
  /// On a GPU: what backward reads in place of a mask with a value for each pair, if forward was given a place for it.
  /// cuda::mask_bits_size int32, contiguous: bit i of [b, h, w, k] is mask[b, h, 32 w + i, k], unless causality hides
  /// that pair. The CPU needs none.
  std::optional<View<4>> mask_bits = {};
};

struct OutputGradient {
  View<4> out;                      ///< (B, Q, H, D), the query's dtype
  std::optional<View<3>> lse = {};  ///< (B, H, Q), the dtype of lse
};

struct InputGradient {
  View<4> query, key, value;         ///< as the inputs, last dimension contiguous; every element is written
  std::optional<View<4>> bias = {};  ///< the bias's own sizes and dtype; sizes of 1 are summed over
};

/// A short query (decoding) splits its keys over the threads; results do not depend on the number of threads.
void forward(const Problem& problem, const Plan& plan, const Output& output, const Threads& threads);

/// The sums are always taken in the same order: the same bits for every run and any number of threads.
void backward(const Problem& problem, const Plan& plan, const Output& output, const OutputGradient& output_gradient,
              const InputGradient& input_gradient, const Threads& threads);

/// probs (B, H, Q, K), the query's dtype: exp(s - lse) where visible, else 0.
void probabilities(const Problem& problem, const Plan& plan, const View<3>& lse, const View<4>& probs,
                   const Threads& threads);

/// The instruction set that the CPU kernels use, e.g. "avx512_bf16": the best that this machine has, or the one that
/// the environment variable FLASH_DMATTN_CPU names.
const char* cpu_instruction_set();

}  // namespace flash_dmattn
