// A task's working memory: arrays laid out one after the other in a block that the scheduler provides.
#pragma once
#include "cpu/kernel/vector.h"

namespace flash_dmattn::cpu::FLASH_DMATTN_ISA {

class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}
  /// The next array of `count` numbers; with no base, only the size grows.
  template <class E>
  E* take(std::int64_t count) {
    E* array = reinterpret_cast<E*>(base_ + size_);
    size_ += (static_cast<std::size_t>(count) * sizeof(E) + 63) / 64 * 64;
    return array;
  }
  std::size_t size() const { return size_; }

 private:
  char* base_;
  std::size_t size_ = 0;
};

FLASH_DMATTN_INLINE std::int64_t round_up(std::int64_t x, std::int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

}  // namespace flash_dmattn::cpu::FLASH_DMATTN_ISA
