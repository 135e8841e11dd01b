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
inline const char* text(bool value) { return value ? "true" : "false"; }
inline const char* text(Number number) { return number == Number::float16 ? "Number::float16" : "Number::bfloat16"; }
inline const char* text(Test test) { return test == Test::interval ? "Test::interval" : "Test::bits"; }
inline const char* text(BiasKind kind) {
  return kind == BiasKind::none ? "BiasKind::none" : kind == BiasKind::per_key ? "BiasKind::per_key" : "BiasKind::full";
}

/// "name{a, b, c}". Every launch asks for it, so it takes memory once.
template <class First, class... Option>
std::string options_text(const char* name, First first, Option... option) {
  std::string all;
  all.reserve(160);
  all.append(name).append("{").append(text(first));
  (all.append(", ").append(text(option)), ...);
  return all.append("}");
}

}  // namespace flash_dmattn::cuda
