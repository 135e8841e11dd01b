// Tiles of 16-bit numbers in shared memory: filled by cp.async, read as operands of mma.
#pragma once
#include "attention/chunk.cuh"
#include "ptx/block.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/warp.cuh"
#include "sm80/scores_params.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

template <int kRowCount, int kColumnCount>
struct alignas(16) Tile {
  static constexpr int kRows = kRowCount, kColumns = kColumnCount, kPitch = tile_pitch(kColumnCount);
  u16 numbers[kRows * kPitch];

  u16* at(int row, int column) { return numbers + row * kPitch + column; }
};

// Where a thread's row of load_matrices begins in the upper left corner of an operand's 16 x 16 block; all other blocks
// are at constant distances.

/// A: the rows of the tile are the rows of the operand.
template <class AnyTile>
u16* rows_operand(AnyTile& tile, int first_row, int lane) {
  return tile.at(first_row + lane % 16, lane / 16 * 8);
}
/// B: the rows of the tile are the columns of the operand. Two operands: rows 0 to 7 and rows 8 to 15 of the tile.
template <class AnyTile>
u16* columns_operand(AnyTile& tile, int lane) {
  return tile.at(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
}
/// B: the rows of the tile are the rows of the operand, by load_matrices_transposed. Two operands: columns 0 to 7 and
/// columns 8 to 15.
template <class AnyTile>
u16* transposed_operand(AnyTile& tile, int lane) {
  return tile.at(lane % 16, lane / 16 * 8);
}

/// Threads that copy one row: their chunks are neighbours.
constexpr int lanes_per_row(int chunks) {
  if (chunks % 4 == 0) return chunks % 8 == 0 ? 8 : 4;
  return chunks > 4 ? 8 : chunks > 2 ? 4 : chunks;
}

struct Source {
  const u16* numbers;
  bool is_valid;  ///< zeros, if not
};

/// Starts copying all rows of a tile. `sources` maps a row and a column to where the row's numbers from there on are.
template <int kThreads, class AnyTile, class Sources>
void copy_rows(AnyTile& tile, int thread, const Sources& sources) {
  constexpr int kChunks = AnyTile::kColumns / kChunk, kLanes = lanes_per_row(kChunks), kRowsAtOnce = kThreads / kLanes;
  const int first = thread / kLanes, lane = thread % kLanes;
  u16* const to = tile.at(first, lane * kChunk);
#pragma unroll
  for (int row = 0; row < AnyTile::kRows; row += kRowsAtOnce) {
    if (AnyTile::kRows % kRowsAtOnce != 0 && first + row >= AnyTile::kRows) break;
    const Source source = sources(first + row, lane * kChunk);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += kLanes)
      if (kChunks % kLanes == 0 || lane + chunk < kChunks)
        copy_async_16(to + row * AnyTile::kPitch + chunk * kChunk, source.numbers + chunk * kChunk, source.is_valid);
  }
}

/// Zeros in the columns between the head dim and the next multiple of 16, which are never copied to.
template <int kThreads, class AnyTile>
void zero_padding(AnyTile& tile, int thread) {
  if constexpr (AnyTile::kColumns % 16 != 0)
    for (int row = thread; row < AnyTile::kRows; row += kThreads)
      *reinterpret_cast<Chunk*>(tile.at(row, AnyTile::kColumns)) = Chunk{};
}

}  // namespace flash_dmattn::cuda
