#include "core/check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <string>

#include "core/shape.h"

namespace flash_dmattn {
namespace {

template <class... Part>
[[noreturn]] void refuse(const Part&... part) {
  std::ostringstream message;
  (message << ... << part);
  throw InvalidArgument(message.str());
}

template <std::size_t N>
std::string text(const std::array<std::int64_t, N>& size) {
  std::ostringstream out;
  out << '(';
  for (std::size_t i = 0; i < N; ++i) out << (i > 0 ? ", " : "") << size[i];
  out << ')';
  return out.str();
}

// Positions, and what comes after the last, are int32.
constexpr std::int64_t kLongest = std::numeric_limits<std::int32_t>::max() - 1;

bool is_floating(DType dtype) { return dtype >= DType::float16; }
DType sum_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

template <int Rank>
void check_size(const char* name, const View<Rank>& view, const decltype(View<Rank>::size)& size) {
  if (view.size != size) refuse(name, ": has shape ", text(view.size), ", takes ", text(size));
}

template <int Rank>
void check_dtype(const char* name, const View<Rank>& view, DType dtype) {
  if (view.dtype != dtype) refuse(name, ": is ", name_of(view.dtype), ", takes ", name_of(dtype));
}

void check_rows(const char* name, const View<4>& view) {
  if (view.size[3] > 1 && view.stride[3] != 1)
    refuse(name, ": the last dimension has stride ", view.stride[3], ", takes a contiguous last dimension (stride 1)");
}

template <int Rank>
void check_in_reach(const char* name, const View<Rank>& view) {
  for (std::int64_t size : view.size)
    if (size < 0) refuse(name, ": has shape ", text(view.size), ", takes sizes of at least 0");
  const bool empty = std::find(view.size.begin(), view.size.end(), 0) != view.size.end();
  if (view.data == nullptr && !empty) refuse(name, ": has no data");
}

template <int Rank>
void check_broadcast(const char* name, const View<Rank>& view, const Shape& s) {
  check_in_reach(name, view);
  std::array<std::int64_t, Rank> full{s.batch, s.heads, Rank == 4 ? s.query_len : s.key_len};
  full[Rank - 1] = s.key_len;
  for (int i = 0; i < Rank; ++i) {
    const bool fits = view.size[i] == full[i] || (view.size[i] == 1 && !(Rank == 3 && i == 2)) ||
                      (i == 1 && view.size[i] == s.kv_heads);
    if (!fits)
      refuse(name, ": has shape ", text(view.size), ", takes (", s.batch, " or 1, ", s.heads, " or ", s.kv_heads,
             " or 1, ",
             Rank == 4 ? std::to_string(s.query_len) + " or 1, " + std::to_string(s.key_len) + " or 1)"
                       : std::to_string(s.key_len) + ")");
  }
}

}  // namespace

void check(const Problem& problem) {
  const View<4>&q = problem.query, &k = problem.key, &v = problem.value;
  check_in_reach("query", q);
  check_in_reach("key", k);
  check_in_reach("value", v);
  if (!is_floating(q.dtype)) refuse("query: is ", name_of(q.dtype), ", takes float16, bfloat16, float32 or float64");
  check_dtype("key", k, q.dtype);
  check_dtype("value", v, q.dtype);
  const Shape s(problem);
  if (s.head_dim < 1 || s.head_dim > 256) refuse("query: has head dim ", s.head_dim, ", takes 1 to 256");
  if (s.heads < 1) refuse("query: has ", s.heads, " heads, takes at least 1");
  if (s.kv_heads < 1 || s.heads % s.kv_heads != 0)
    refuse("key: has ", s.kv_heads, " heads, takes a number that divides the query's ", s.heads);
  check_size("key", k, {s.batch, s.key_len, s.kv_heads, s.head_dim});
  check_size("value", v, k.size);
  if (s.key_len > kLongest) refuse("key: has length ", s.key_len, ", takes at most ", kLongest);
  if (s.query_len > kLongest) refuse("query: has length ", s.query_len, ", takes at most ", kLongest);
  check_rows("query", q);
  check_rows("key", k);
  check_rows("value", v);
  if (problem.mask) {
    check_dtype("mask", *problem.mask, DType::boolean);
    check_broadcast("mask", *problem.mask, s);
  }
  if (problem.bias) {
    if (problem.bias->dtype != q.dtype && problem.bias->dtype != DType::float32)
      refuse("bias: is ", name_of(problem.bias->dtype), ", takes ", name_of(q.dtype), " or float32");
    check_broadcast("bias", *problem.bias, s);
  }
  if (problem.end) {
    check_dtype("end", *problem.end, DType::int32);
    check_broadcast("end", *problem.end, s);
  }
  if (!std::isfinite(problem.scale)) refuse("scale: is ", problem.scale, ", takes a finite number");
  if (!(problem.softcap >= 0) || !std::isfinite(problem.softcap))
    refuse("softcap: is ", problem.softcap, ", takes a positive finite number, or 0 for none");
}

void check(const Problem& problem, const Output& output) {
  const Shape s(problem);
  check_dtype("out", output.out, problem.query.dtype);
  check_size("out", output.out, problem.query.size);
  check_rows("out", output.out);
  check_dtype("lse", output.lse, sum_dtype(problem.query.dtype));
  check_size("lse", output.lse, {s.batch, s.heads, s.query_len});
}

void check(const Problem& problem, const OutputGradient& gradient) {
  const Shape s(problem);
  check_dtype("grad_out", gradient.out, problem.query.dtype);
  check_size("grad_out", gradient.out, problem.query.size);
  check_rows("grad_out", gradient.out);
  if (gradient.lse) {
    check_dtype("grad_lse", *gradient.lse, sum_dtype(problem.query.dtype));
    check_size("grad_lse", *gradient.lse, {s.batch, s.heads, s.query_len});
  }
}

void check(const Problem& problem, const InputGradient& gradient) {
  const auto same = [](const char* name, const View<4>& gradient, const View<4>& input) {
    check_dtype(name, gradient, input.dtype);
    check_size(name, gradient, input.size);
  };
  same("grad_query", gradient.query, problem.query);
  same("grad_key", gradient.key, problem.key);
  same("grad_value", gradient.value, problem.value);
  check_rows("grad_query", gradient.query);
  check_rows("grad_key", gradient.key);
  check_rows("grad_value", gradient.value);
  if (gradient.bias) {
    if (!problem.bias) refuse("grad_bias: is given, but the problem has no bias");
    same("grad_bias", *gradient.bias, *problem.bias);
  }
}

void check_mask_bits(const View<4>& mask_bits, const std::array<std::int64_t, 4>& size) {
  check_dtype("mask_bits", mask_bits, DType::int32);
  check_size("mask_bits", mask_bits, size);
  check_in_reach("mask_bits", mask_bits);
  if (!is_contiguous(mask_bits)) refuse("mask_bits: is not contiguous, takes a contiguous tensor");
}

void check_probabilities(const Problem& problem, const View<3>& lse, const View<4>& probs) {
  const Shape s(problem);
  check_dtype("lse", lse, sum_dtype(problem.query.dtype));
  check_size("lse", lse, {s.batch, s.heads, s.query_len});
  check_dtype("probs", probs, problem.query.dtype);
  check_size("probs", probs, {s.batch, s.heads, s.query_len, s.key_len});
}

void check(const DynamicMask& mask, const View<3>& end, const std::optional<View<3>>& threshold) {
  check_in_reach("score", mask.score);
  if (!is_floating(mask.score.dtype))
    refuse("score: is ", name_of(mask.score.dtype), ", takes float16, bfloat16, float32 or float64");
  if (mask.keep_window_size < 1) refuse("keep_window_size: is ", mask.keep_window_size, ", takes at least 1");
  if (mask.query_len < 0) refuse("query_len: is ", mask.query_len, ", takes at least 0");
  if (mask.score.size[2] > kLongest) refuse("score: has ", mask.score.size[2], " keys, takes at most ", kLongest);
  if (mask.key_padding_mask) {
    const View<2>& padding = *mask.key_padding_mask;
    check_dtype("key_padding_mask", padding, DType::boolean);
    if ((padding.size[0] != 1 && padding.size[0] != mask.score.size[0]) || padding.size[1] != mask.score.size[2])
      refuse("key_padding_mask: has shape ", text(padding.size), ", takes (", mask.score.size[0], " or 1, ",
             mask.score.size[2], ")");
  }
  check_dtype("end", end, DType::int32);
  check_size("end", end, mask.score.size);
  if (threshold) {
    if (!mask.is_causal) refuse("threshold: is given, but only a causal mask has one");
    check_dtype("threshold", *threshold, DType::int32);
    check_size("threshold", *threshold, mask.score.size);
  }
}

void check_survivors(const DynamicMask& mask, std::int64_t chunks, const View<4>& survivors) {
  if (!mask.is_causal) refuse("survivors: is given, but only a causal mask has them");
  const auto& size = mask.score.size;
  check_dtype("survivors", survivors, DType::int32);
  check_size("survivors", survivors, {size[0], size[1], chunks, std::min(mask.keep_window_size, size[2])});
}

void check_selection(const View<4>& score, const std::optional<View<4>>& visible, std::int64_t keep_window_size,
                     const View<4>& selected) {
  const auto broadcasts = [&](const char* name, const View<4>& view) {
    check_in_reach(name, view);
    for (int i = 0; i < 4; ++i)
      if (view.size[i] != 1 && view.size[i] != selected.size[i])
        refuse(name, ": has shape ", text(view.size), ", takes sizes of 1 or those of ", text(selected.size));
  };
  if (!is_floating(score.dtype)) refuse("score: is ", name_of(score.dtype), ", takes a floating dtype");
  broadcasts("score", score);
  if (visible) {
    check_dtype("visible", *visible, DType::boolean);
    broadcasts("visible", *visible);
  }
  if (keep_window_size < 1) refuse("keep_window_size: is ", keep_window_size, ", takes at least 1");
  check_dtype("selected", selected, DType::boolean);
  check_in_reach("selected", selected);
  for (std::int64_t size : selected.size)
    if (size > kLongest) refuse("selected: has shape ", text(selected.size), ", takes sizes of at most ", kLongest);
}

}  // namespace flash_dmattn
