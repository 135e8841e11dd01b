// The formulas of the headers as float64 loops, written for reading only.
#pragma once
#include "flash_dmattn/attention.h"
#include "flash_dmattn/dynamic_mask.h"
#include "tensor.h"

namespace flash_dmattn::test {

/// A Problem that owns its tensors.
struct Inputs {
  Tensor<4> query, key, value;
  std::optional<Tensor<4>> mask, bias;
  std::optional<Tensor<3>> end;
  double scale = 1, softcap = 0;
  bool is_causal = false;

  Problem problem() const;
};

struct Results {
  Tensor<4> out;
  Tensor<3> lse;
  Tensor<4> probs;
};

struct Gradients {
  Tensor<4> query, key, value;
  std::optional<Tensor<4>> bias;
};

/// The gradients, and the same sums over the absolute values of their terms: a rounding error is relative to those, for
/// terms cancel (the gradient of a bias that is the same for all keys is 0).
struct GradientSums {
  Gradients sum, magnitude;
};

/// Everything in float64.
Results attention(const Inputs& in);
GradientSums attention_gradient(const Inputs& in, const Tensor<4>& grad_out, const std::optional<Tensor<3>>& grad_lse);

/// Whether the query at absolute position `position` (a query that is not causal: any position) selects the key, by
/// counting the keys that beat it.
bool selects(const Tensor<3>& score, const std::optional<Tensor<2>>& key_padding_mask, std::int64_t keep_window_size,
             bool is_causal, std::int64_t batch, std::int64_t head, std::int64_t position, std::int64_t key);

/// The rule itself: key j beats key k.
bool beats(double score_j, std::int64_t j, double score_k, std::int64_t k);

}  // namespace flash_dmattn::test
