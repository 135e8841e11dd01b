// What the engine takes: every rule on shapes and dtypes, once. Each function throws InvalidArgument.
#pragma once
#include <array>
#include <cstdint>
#include <optional>

#include "flash_dmattn/attention.h"
#include "flash_dmattn/dynamic_mask.h"

namespace flash_dmattn {

void check(const Problem& problem);
void check(const Problem& problem, const Output& output);
void check(const Problem& problem, const OutputGradient& gradient);
void check(const Problem& problem, const InputGradient& gradient);
void check_mask_bits(const View<4>& mask_bits, const std::array<std::int64_t, 4>& size);
void check_probabilities(const Problem& problem, const View<3>& lse, const View<4>& probs);
void check(const DynamicMask& mask, const View<3>& end, const std::optional<View<3>>& threshold);
void check_survivors(const DynamicMask& mask, std::int64_t chunks, const View<4>& survivors);
void check_selection(const View<4>& score, const std::optional<View<4>>& visible, std::int64_t keep_window_size,
                     const View<4>& selected);

}  // namespace flash_dmattn
