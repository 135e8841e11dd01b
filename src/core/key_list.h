// The keys that a chunk of queries loads: what a plan tells a kernel.
#pragma once
#include <cstdint>

namespace flash_dmattn {

struct KeyList {
  std::int64_t count = 0;
  const std::int32_t* positions = nullptr;  ///< null: the keys 0, 1, 2, …
  const std::uint64_t* bits = nullptr;      ///< with a dense mask: `words` words for each of the chunk's queries
  std::int64_t words = 0;
};

}  // namespace flash_dmattn
