#include "bulk_copies.h"

#include <cstring>

#include "threads.h"

namespace flash_dmattn::cuda::emulator {

void start_bulk_copy(const char* operation, void* global, const void* shared, int bytes, bool adds) {
  require_aligned(operation, global, 16);
  require_aligned(operation, shared, 16);
  require_shared(operation, shared, bytes);
  if (bytes <= 0 || bytes % 16 != 0) fail("%s: of %d bytes", operation, bytes);
  self->bulk_copies.push_back({global, shared, bytes, adds, self->bulk_groups, {}});
}

void commit_bulk_copies() { ++self->bulk_groups; }

static void land(const BulkCopy& copy) {
  if (!copy.adds) {
    std::memcpy(copy.global, copy.read.data(), copy.read.size());
    return;
  }
  auto* const sums = static_cast<float*>(copy.global);
  for (int i = 0; i < copy.bytes / 4; ++i) {
    float x;
    std::memcpy(&x, copy.read.data() + 4 * i, 4);
    sums[i] += x;
  }
}

void wait_bulk_copies(int pending, bool lands) {
  const int done = self->bulk_groups - pending;
  for (BulkCopy& copy : self->bulk_copies)
    if (copy.group < done && copy.read.empty()) {
      const char* bytes = static_cast<const char*>(copy.shared);
      copy.read.assign(bytes, bytes + copy.bytes);
    }
  for (auto& copies = self->bulk_copies; lands && !copies.empty() && copies.front().group < done; copies.pop_front())
    land(copies.front());
}

void end_bulk_copies() {
  for (const BulkCopy& copy : self->bulk_copies) {
    if (copy.read.empty()) fail("ended while a bulk copy read shared memory");
    land(copy);
  }
  self->bulk_copies.clear();
}

}  // namespace flash_dmattn::cuda::emulator
