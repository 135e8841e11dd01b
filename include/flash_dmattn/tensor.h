// What the engine is told about memory that belongs to its caller.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace flash_dmattn {

enum class DType : std::uint8_t { boolean, int32, float16, bfloat16, float32, float64 };

std::size_t size_of(DType dtype);
const char* name_of(DType dtype);

/// A strided view of somebody else's memory. Strides are in elements and may be 0 (a broadcast dimension).
template <int Rank>
struct View {
  void* data = nullptr;
  DType dtype = DType::float32;
  std::array<std::int64_t, Rank> size{};
  std::array<std::int64_t, Rank> stride{};
};

/// An argument that fits no rule. The message names the argument, what it is and what it may be.
class InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

}  // namespace flash_dmattn
