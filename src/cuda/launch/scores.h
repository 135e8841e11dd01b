// The part of a kernel's parameters that all passes of the generic family share.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>

#include "attention/scores_params.cuh"
#include "cuda/launch/plan.h"
#include "cuda/launch/rows.h"
#include "flash_dmattn/attention.h"

namespace flash_dmattn::cuda {

inline Logits make_logits(const Problem& problem) {
  constexpr double log2e = 1.4426950408889634;
  const double magnitude = std::fabs(problem.scale);
  Logits logits{};
  if (problem.softcap > 0) {
    logits.factor = 1;
    logits.bias_factor = static_cast<float>(log2e);
    logits.cap = static_cast<float>(problem.softcap * log2e);
    logits.inner = static_cast<float>(2 * log2e * problem.scale / problem.softcap);
    logits.sign = 1;
  } else {
    // A scale that no product can make up for is 0: the queries then are, and the factor is that of the bias alone.
    logits.sign = magnitude < 0x1p-100 ? 0 : problem.scale < 0 ? -1 : 1;
    const double factor = logits.sign == 0 ? log2e : std::min(magnitude * log2e, 0x1p64);
    logits.factor = static_cast<float>(factor);
    logits.bias_factor = static_cast<float>(log2e / factor);
  }
  return logits;
}

inline RowNumbers row_numbers(const View<3>& view) {
  return {static_cast<float*>(view.data), view.stride[0], view.stride[1], view.stride[2]};
}

/// Kernels compute the address of a key from its position in 32 bits, in bytes.
inline Rows key_rows(const char* name, const View<4>& view, Stream& stream) {
  const Rows rows = aligned_input(view, stream);
  constexpr std::int64_t longest = (std::int64_t{1} << 30) - 1;
  if (std::abs(rows.position) > longest)
    throw InvalidArgument(std::string(name) + ": has stride " + std::to_string(rows.position) +
                          " from position to position, takes at most " + std::to_string(longest) + " on a GPU");
  return rows;
}

inline ScoresParams make_scores(const Problem& problem, const Shape& shape, const Plan& plan, Stream& stream) {
  return {.shape = shape,
          .query = aligned_input(problem.query, stream),
          .key = key_rows("key", problem.key, stream),
          .bias = problem.bias ? make_bias(problem) : Bias{},
          .plan = plan,
          .logits = make_logits(problem)};
}

}  // namespace flash_dmattn::cuda
