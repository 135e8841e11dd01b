// The options that kernels of all passes have: from a problem, and as they are written in a kernel's name.
#pragma once
#include <string>

#include "flash_dmattn/attention.h"
#include "problem.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

/// Throws InvalidArgument unless the query is float16 or bfloat16.
inline Number number_of(const Problem& problem) {
  const DType dtype = problem.query.dtype;
  if (dtype != DType::float16 && dtype != DType::bfloat16)
    throw InvalidArgument(std::string("query: is ") + name_of(dtype) + ", takes float16 or bfloat16 on a GPU");
  return dtype == DType::float16 ? Number::float16 : Number::bfloat16;
}

inline std::string text(int number) { return std::to_string(number); }
inline std::string text(bool value) { return value ? "true" : "false"; }
inline std::string text(Number number) { return number == Number::float16 ? "Number::float16" : "Number::bfloat16"; }
inline std::string text(Test test) { return test == Test::interval ? "Test::interval" : "Test::bits"; }
inline std::string text(BiasKind kind) {
  return kind == BiasKind::none ? "BiasKind::none" : kind == BiasKind::per_key ? "BiasKind::per_key" : "BiasKind::full";
}

/// "name{a, b, c}"
template <class First, class... Option>
std::string options_text(const char* name, First first, Option... option) {
  return std::string(name) + "{" + text(first) + ((", " + text(option)) + ...) + "}";
}

}  // namespace flash_dmattn::cuda
