// Where a thread is, and barriers.
#pragma once
#include "../threads.h"
#include "types.cuh"

namespace flash_dmattn::cuda {

inline int thread_index() { return emulator::self->index; }
inline int thread_index_anew() { return thread_index(); }
inline int block_index() { return emulator::self->block->index[0]; }
inline int block_index_y() { return emulator::self->block->index[1]; }
inline int block_index_z() { return emulator::self->block->index[2]; }
inline int grid_blocks() { return emulator::self->block->grid[0]; }
inline int grid_blocks_y() { return emulator::self->block->grid[1]; }

inline void sync_block() { emulator::meet_block(0, emulator::self->block->threads); }
inline void sync_threads(int id, int threads) {
  if (id < 1 || id > 15 || threads % 32 != 0) emulator::fail("sync_threads: no such barrier");
  emulator::meet_block(id, threads);
}

}  // namespace flash_dmattn::cuda
