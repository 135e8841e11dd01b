// Arithmetic on sizes, in 64 bits whatever they are held in.
#pragma once
#include <cstdint>

namespace flash_dmattn::cuda {

constexpr std::int64_t divide_up_wide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up_wide(std::int64_t a, std::int64_t b) { return divide_up_wide(a, b) * b; }

}  // namespace flash_dmattn::cuda
