// Products of a warpgroup: they run in the background, on operands in shared memory.
#pragma once
#include <deque>
#include <memory>
#include <vector>

#include "types.cuh"

namespace flash_dmattn::cuda::emulator {

/// C (64 x columns) += A (64 x 16) B (16 x columns), or C = A B.
struct Product {
  Number number;
  int columns;
  bool a_in_registers;
  bool a_is_mn_major, b_is_mn_major;
  u64 a, b;  ///< descriptors
  bool add;

  bool operator==(const Product&) const = default;
};

/// Of all threads, while products on them are under way.
struct Accumulators {
  int columns;
  float* of[128] = {};
  std::vector<float> sums;  // 64 x columns
};

/// One product. Operands are read when it is issued, and again when somebody waits for it: what has changed in between
/// is undefined.
struct Operation {
  Product product;
  int group;
  std::shared_ptr<Accumulators> accumulators;
  u16 a[64 * 16], b[16 * 256];  // 64 x 16, 16 x columns
};

struct Warpgroup {
  std::deque<Operation> operations;
  i64 executed = 0;
};

void multiply(const Product& product, float* c, const u32* a);
void commit_products();
void wait_products(int pending);

/// At the thread's end.
void require_no_products();

}  // namespace flash_dmattn::cuda::emulator
