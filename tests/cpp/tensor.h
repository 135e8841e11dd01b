// Tensors that own their memory, read and written as doubles: slow, plain, and any dtype, layout or broadcast.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "flash_dmattn/tensor.h"

namespace flash_dmattn::test {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

inline double half_to_double(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 31  ? (mantissa ? kNaN : kInfinity)
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

inline std::uint16_t double_to_half(double x) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7e00;
  x = std::fabs(x);
  if (x >= 65520) return sign | 0x7c00;
  const int exponent = x < std::ldexp(1, -14) ? -14 : std::ilogb(x);
  // Rounds to nearest even; a mantissa that rounds up to 2048 carries into the exponent as it should.
  const auto mantissa = static_cast<std::uint16_t>(std::nearbyint(std::ldexp(x, 10 - exponent)));
  return sign | static_cast<std::uint16_t>(((exponent + 14) << 10) + mantissa);
}

inline double bfloat16_to_double(std::uint16_t bits) {
  const std::uint32_t word = std::uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

inline std::uint16_t double_to_bfloat16(double x) {
  const auto narrow = static_cast<float>(x);
  std::uint32_t word;
  std::memcpy(&word, &narrow, sizeof word);
  if (std::isnan(narrow)) return 0x7fc0;
  return static_cast<std::uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

template <int Rank>
using Index = std::array<std::int64_t, Rank>;

template <int Rank>
struct Tensor : View<Rank> {
  std::shared_ptr<std::byte[]> memory;

  Tensor() = default;
  /// `order` lists the dimensions from the slowest to the fastest in memory; `gap` elements stay unused behind each
  /// row. The memory is exactly as long as it must be, so that a sanitizer sees the first byte past it.
  Tensor(DType dtype, Index<Rank> size, Index<Rank> order = natural_order(), std::int64_t gap = 0) {
    this->dtype = dtype;
    this->size = size;
    std::int64_t next = 1;
    for (int i = Rank - 1; i >= 0; --i) {
      this->stride[order[i]] = next;
      next = next * size[order[i]] + (i == Rank - 1 ? gap : 0);
    }
    std::int64_t last = 0;
    for (int i = 0; i < Rank; ++i) last += (size[i] - 1) * this->stride[i];
    const bool empty = std::find(size.begin(), size.end(), 0) != size.end();
    const std::size_t bytes = empty ? 0 : (last + 1) * size_of(dtype);
    memory.reset(new std::byte[bytes]);
    this->data = memory.get();
    // 0xff is NaN in every floating dtype: what is not written is seen.
    std::memset(this->data, 0xff, bytes);
  }

  static Index<Rank> natural_order() {
    Index<Rank> order;
    std::iota(order.begin(), order.end(), 0);
    return order;
  }

  /// The element at `index`, in which a dimension of size 1 takes any position.
  std::byte* element(const Index<Rank>& index) const {
    std::int64_t offset = 0;
    for (int i = 0; i < Rank; ++i) offset += this->size[i] == 1 ? 0 : index[i] * this->stride[i];
    return static_cast<std::byte*>(this->data) + offset * size_of(this->dtype);
  }

  double at(const Index<Rank>& index) const {
    const auto load = [&]<class T>(T value) {
      std::memcpy(&value, element(index), sizeof value);
      return value;
    };
    switch (this->dtype) {
      case DType::boolean:
        return load(std::uint8_t{});
      case DType::int32:
        return load(std::int32_t{});
      case DType::float16:
        return half_to_double(load(std::uint16_t{}));
      case DType::bfloat16:
        return bfloat16_to_double(load(std::uint16_t{}));
      case DType::float32:
        return load(float{});
      case DType::float64:
        return load(double{});
    }
    return kNaN;
  }

  void set(const Index<Rank>& index, double x) const {
    const auto save = [&](auto value) { std::memcpy(element(index), &value, sizeof value); };
    switch (this->dtype) {
      case DType::boolean:
        return save(static_cast<std::uint8_t>(x != 0));
      case DType::int32:
        return save(static_cast<std::int32_t>(x));
      case DType::float16:
        return save(double_to_half(x));
      case DType::bfloat16:
        return save(double_to_bfloat16(x));
      case DType::float32:
        return save(static_cast<float>(x));
      case DType::float64:
        return save(x);
    }
  }

  void for_each(const std::function<void(const Index<Rank>&)>& visit) const {
    for (std::int64_t size : this->size)
      if (size == 0) return;
    Index<Rank> index{};
    for (int i = Rank - 1; i >= 0;) {
      visit(index);
      for (i = Rank - 1; i >= 0 && ++index[i] == this->size[i]; --i) index[i] = 0;
    }
  }

  Tensor& fill(const std::function<double()>& next) {
    for_each([&](const Index<Rank>& index) { set(index, next()); });
    return *this;
  }

  /// Size `size` in dimension `i`, all of it the same memory.
  Tensor expand(int i, std::int64_t size) const {
    Tensor wide = *this;
    wide.size[i] = size;
    wide.stride[i] = 0;
    return wide;
  }
};

/// Bit for bit the same elements.
template <int Rank>
bool same_bits(const Tensor<Rank>& a, const Tensor<Rank>& b) {
  bool same = a.size == b.size && a.dtype == b.dtype;
  if (same)
    a.for_each(
        [&](const Index<Rank>& i) { same = same && !std::memcmp(a.element(i), b.element(i), size_of(a.dtype)); });
  return same;
}

/// The largest |t| that is finite.
template <int Rank>
double largest(const Tensor<Rank>& t) {
  double most = 0;
  t.for_each([&](const Index<Rank>& i) {
    if (std::isfinite(t.at(i))) most = std::fmax(most, std::fabs(t.at(i)));
  });
  return most;
}

/// The largest |got - expected|; infinite where one of the two is not finite and the other differs.
template <int Rank>
double difference(const Tensor<Rank>& got, const Tensor<Rank>& expected) {
  double most = 0;
  expected.for_each([&](const Index<Rank>& i) {
    const double e = expected.at(i), g = got.at(i);
    if (std::isfinite(e) && std::isfinite(g))
      most = std::fmax(most, std::fabs(g - e));
    else if (g != e)
      most = kInfinity;
  });
  return most;
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  double normal() { return std::normal_distribution<double>()(engine_); }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine_); }
  std::int64_t integer(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(engine_);
  }
  template <class T>
  T pick(std::initializer_list<T> options) {
    return options.begin()[integer(0, static_cast<std::int64_t>(options.size()) - 1)];
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace flash_dmattn::test
