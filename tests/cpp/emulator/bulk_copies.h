// Copies from shared to global memory by the copy engine.
#pragma once

namespace flash_dmattn::cuda::emulator {

void start_bulk_copy(const char* operation, void* global, const void* shared, int bytes, bool adds);
void commit_bulk_copies();
/// Until at most `pending` groups of this thread read shared memory, or are under way.
void wait_bulk_copies(int pending, bool lands);

/// At the thread's end.
void end_bulk_copies();

}  // namespace flash_dmattn::cuda::emulator
