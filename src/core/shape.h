// The sizes of a problem, and what its broadcast dimensions mean.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "flash_dmattn/attention.h"

namespace flash_dmattn {

struct Shape {
  std::int64_t batch, query_len, key_len, heads, kv_heads, head_dim;

  explicit Shape(const Problem& problem)
      : batch(problem.query.size[0]),
        query_len(problem.query.size[1]),
        key_len(problem.key.size[1]),
        heads(problem.query.size[2]),
        kv_heads(problem.key.size[2]),
        head_dim(problem.query.size[3]) {}

  /// Query heads that read one KV head.
  std::int64_t group() const { return kv_heads > 0 ? heads / kv_heads : 1; }
  /// The absolute position of query 0: queries are aligned with the last keys.
  std::int64_t first_position() const { return key_len - query_len; }
  /// The head of a mask or bias with `count` heads (1, Hk or H) that serves query head `head`.
  std::int64_t broadcast_head(std::int64_t count, std::int64_t head) const {
    return count == heads ? head : count == 1 ? 0 : head / group();
  }
};

/// A view whose dimensions of stride 0 have size 1: what an expand made of it is undone.
template <int Rank>
View<Rank> without_expand(View<Rank> view) {
  for (int i = 0; i < Rank; ++i) {
    if (view.size[i] > 1 && view.stride[i] == 0) view.size[i] = 1;
    if (view.size[i] <= 1) view.stride[i] = 0;
  }
  return view;
}

template <std::size_t Rank>
std::int64_t product(const std::array<std::int64_t, Rank>& size) {
  std::int64_t all = 1;
  for (const std::int64_t each : size) all *= each;
  return all;
}

template <int Rank>
bool is_contiguous(const View<Rank>& view) {
  std::int64_t step = 1;
  for (int i = Rank; i-- > 0; step *= view.size[i])
    if (view.size[i] > 1 && view.stride[i] != step) return false;
  return true;
}

/// The address of an element; the caller names its type.
template <class T, int Rank, class... Index>
T* at(const View<Rank>& view, Index... index) {
  static_assert(sizeof...(Index) == Rank);
  std::int64_t offset = 0;
  int i = 0;
  ((offset += static_cast<std::int64_t>(index) * view.stride[i++]), ...);
  return static_cast<T*>(view.data) + offset;
}

/// The same where the type is only known at run time.
template <int Rank, class... Index>
char* address(const View<Rank>& view, Index... index) {
  return at<char>(View<Rank>{view.data, view.dtype, view.size,
                             [&] {
                               auto bytes = view.stride;
                               for (auto& s : bytes) s *= static_cast<std::int64_t>(size_of(view.dtype));
                               return bytes;
                             }()},
                  index...);
}

}  // namespace flash_dmattn
