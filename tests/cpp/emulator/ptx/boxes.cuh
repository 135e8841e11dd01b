// Copies of boxes of a tensor by the copy engine. EmulatedStream makes a map of the TensorBoxes themselves.
#pragma once
#include <cstring>

#include "../threads.h"
#include "ptx/barrier.cuh"
#include "tensor_map.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

inline TensorMap map_of(const TensorBoxes& boxes) {
  static_assert(sizeof boxes <= sizeof(TensorMap));
  TensorMap map{};
  std::memcpy(&map, &boxes, sizeof boxes);
  return map;
}

inline void prefetch_map(const TensorMap&) {}

inline void load_box(void* panel, const TensorMap& map, int column, int head, int position, int batch,
                     Barrier& barrier) {
  TensorBoxes boxes;
  std::memcpy(&boxes, &map, sizeof boxes);
  emulator::require_aligned("load_box", panel, 1024);
  emulator::require_aligned("load_box", &map, 64);
  emulator::require_shared("load_box", panel, boxes.positions * boxes.heads * kBoxColumns * 2);
  static constexpr char kZeros[16] = {};
  for (int row = 0; row < boxes.positions * boxes.heads; ++row)
    for (int chunk = 0; chunk < kBoxColumns / 8; ++chunk) {
      const int n = position + row / boxes.heads, h = head + row % boxes.heads, d = column + 8 * chunk;
      const auto is_inside = [&](int i, int x) { return x >= 0 && x < boxes.size[i]; };
      const bool exists = is_inside(0, batch) && is_inside(1, n) && is_inside(2, h) && is_inside(3, d);
      const void* const from = exists ? static_cast<const void*>(boxes.rows.at<u16>(batch, n, h) + d) : kZeros;
      emulator::load_to_barrier(static_cast<char*>(panel) + row * 128 + ((chunk ^ row % 8) << 4), from, 16, &barrier);
    }
}

}  // namespace flash_dmattn::cuda
