// The emulator itself, with tiny kernels: what it computes, and what it reports.
#include "check.h"
#include "emulator.h"
#include "ptx/block.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/number.cuh"
#include "ptx/warp.cuh"
#include "tensor.h"

namespace flash_dmattn::cuda {
namespace {

struct Numbers {
  int* out;
};

/// Sums over a block, by shuffles, shared memory and barriers.
struct BlockSum {
  static constexpr int kThreads = 128, kBlocksPerMultiprocessor = 2;
  using Params = Numbers;
  static void run(const Params& params, char* shared) {
    int* sums = reinterpret_cast<int*>(shared);
    int x = thread_index() * (block_index() + 1);
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    if (thread_index() % kWarp == 0) sums[thread_index() / kWarp] = x;
    sync_block();
    if (thread_index() == 0) params.out[block_index()] = sums[0] + sums[1] + sums[2] + sums[3];
  }
};
EMULATE(BlockSum);

TEST(sums_over_blocks) {
  EmulatedStream stream;
  int* out = stream.allocate_array<int>(20);
  stream.launch({"", "BlockSum"}, {20}, 128, 16, Numbers{out});
  for (int i = 0; i < 20; ++i) CHECK_EQUAL(out[i], 127 * 64 * (i + 1));
}

}  // namespace
}  // namespace flash_dmattn::cuda
