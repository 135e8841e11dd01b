// What wgmma reads: tiles of 16-bit numbers in shared memory, in panels, and operands in registers.
#pragma once
#include "ptx/memory.cuh"
#include "ptx/number.cuh"
#include "ptx/warpgroup.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

constexpr int kPanelColumns = 64, kPanelRowBytes = 128;

template <int kRowCount, int kPanelCount>
struct alignas(1024) Panels {
  static constexpr int kRows = kRowCount, kPanels = kPanelCount, kPanelBytes = kRows * kPanelRowBytes;
  char bytes[kPanels * kPanelBytes];

  /// 16 bytes: 8 columns of a row, from 8 * chunk on.
  char* chunk(int row, int chunk) {
    return bytes + chunk / 8 * kPanelBytes + row * kPanelRowBytes + ((chunk % 8 ^ row % 8) << 4);
  }

  char* panel(int index) { return bytes + index * kPanelBytes; }

  /// As an operand whose rows are those of A, or the columns of B, from `first` on.
  Operand rows(int first = 0) const { return operand(bytes + first * kPanelRowBytes, 16, 8 * kPanelRowBytes); }
  /// From there to 16 * step further along the columns.
  static constexpr int along_columns(int step) { return step / 4 * kPanelBytes + step % 4 * 32; }

  /// As an operand B whose rows are the tile's rows, with the columns of `panel` and those after it.
  Operand transposed(int panel = 0) const {
    return operand(bytes + panel * kPanelBytes, kPanelBytes, 8 * kPanelRowBytes);
  }
  static constexpr int along_rows(int step) { return step * 16 * kPanelRowBytes; }
};

constexpr int kGatherLanes = 8;  // threads that share a row

/// kThreads (a multiple of 64) start copying `kChunks` times 16 bytes of each row: a thread has a part of some rows.
/// `row_at(row, i)` says where a row is, the thread's i-th, or (not kEveryRow) null: zeros.
template <int kChunks, int kThreads = kWarpgroup, bool kEveryRow = false, class AnyPanels, class RowAt>
void gather_rows(AnyPanels& to, int thread, const RowAt& row_at) {
  constexpr int kRowsAtOnce = kThreads / kGatherLanes;
  const int first = thread / kGatherLanes, lane = thread % kGatherLanes;
#pragma unroll 16
  for (int row = 0; row < AnyPanels::kRows; row += kRowsAtOnce) {
    if (AnyPanels::kRows % kRowsAtOnce != 0 && first + row >= AnyPanels::kRows) break;
    const u16* const from = row_at(first + row, row / kRowsAtOnce);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += kGatherLanes)
      if (kChunks % kGatherLanes == 0 || lane + chunk < kChunks)
        copy_async_16(to.chunk(first, lane + chunk) + row * kPanelRowBytes, from + (lane + chunk) * 8,
                      kEveryRow || from != nullptr);
  }
}

struct alignas(16) SixteenZeros {
  u32 words[4] = {};
};
/// Zeros in the chunks from `kChunks` on that products read: nothing is ever copied there.
template <int kChunks, int kDim, class AnyPanels>
void zero_padding(AnyPanels& tile, int thread, int threads) {
  for (int row = thread; row < AnyPanels::kRows; row += threads)
    for (int chunk = kChunks; chunk < kDim / 8; ++chunk)
      *reinterpret_cast<SixteenZeros*>(tile.chunk(row, chunk)) = SixteenZeros{};
}
/// Zeros in the rows from `first` on.
template <class AnyPanels>
void zero_rows(AnyPanels& tile, int first, int thread, int threads) {
  constexpr int kChunks = AnyPanels::kPanels * 8;
  for (int i = first * kChunks + thread; i < AnyPanels::kRows * kChunks; i += threads)
    *reinterpret_cast<SixteenZeros*>(tile.chunk(i / kChunks, i % kChunks)) = SixteenZeros{};
}

/// Accumulators as operand A of the next products, 16 columns after the other.
template <class T, int kSteps>
void pack_operand(u32 (&a)[kSteps][4], const float (&accumulators)[2 * kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const from = accumulators[2 * step + i / 2] + i % 2 * 2;
      a[step][i] = pack<T>(from[0], from[1]);
    }
}

}  // namespace flash_dmattn::cuda
