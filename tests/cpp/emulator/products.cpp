#include "products.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ptx/number.cuh"
#include "threads.h"

namespace flash_dmattn::cuda::emulator {

namespace {

constexpr int kRows = 64, kDepth = 16, kThreads = 128, kMostColumns = 256;

// Where thread t has its accumulators: c[i] is at this row and column.
int row_of(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
int column_of(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

// An operand of kDepth x `count` numbers; number (k, i) goes to to[k * k_step + i * i_step].
void read_operand(u64 descriptor, int count, bool is_mn_major, u16* to, int k_step, int i_step) {
  const auto field = [&](int shift) { return static_cast<int>(descriptor >> shift & 0x3fff) << 4; };
  const int start = field(0), leading = field(16), stride = field(32);
  const Block& block = *self->block;
  const auto read_numbers = [&](int address, int k, int i, int step) {
    if (address + 16 > block.shared_bytes) fail("multiply: outside the block's shared memory");
    u16 numbers[8];
    std::memcpy(numbers, block.shared + address, sizeof numbers);
    for (int j = 0; j < 8; ++j) to[k * k_step + i * i_step + j * step] = numbers[j];
  };
  if (descriptor >> 62 == 0 && !is_mn_major) {  // plain_operand()
    for (int i = 0; i < count; ++i)
      for (int k = 0; k < kDepth; k += 8)
        read_numbers(start + i / 8 * stride + i % 8 * 16 + k / 8 * leading, k, i, k_step);
    return;
  }
  if (descriptor >> 62 != 1) fail("multiply: no operand()");
  // The swizzle is that of addresses, so that a panel starts at a multiple of 1024 bytes; within a row one may start at
  // another number, and then the row is shorter.
  const int row_bytes = 2 * (is_mn_major ? least(count, 64) : kDepth);
  if (start % 1024 + row_bytes > 128) fail("multiply: an operand starts at byte %d of a panel", start % 1024);
  const auto read = [&](int address, int k, int i, int step) {
    read_numbers(address ^ (address >> 7 & 7) << 4, k, i, step);
  };
  if (is_mn_major) {
    for (int k = 0; k < kDepth; ++k)
      for (int i = 0; i < count; i += 8)
        read(start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128, k, i, i_step);
  } else {
    for (int i = 0; i < count; ++i)
      for (int k = 0; k < kDepth; k += 8) read(start + i / 8 * stride + i % 8 * 128 + k * 2, k, i, k_step);
  }
}

void read_operands(const Product& product, u16* a, u16* b) {
  if (!product.a_in_registers) read_operand(product.a, kRows, product.a_is_mn_major, a, 1, kDepth);
  read_operand(product.b, product.columns, product.b_is_mn_major, b, product.columns, 1);
}

template <class T>
void convert_as(const u16* before, const u16* now, int count, float* numbers) {
  for (int i = 0; i < count; ++i) numbers[i] = before[i] == now[i] ? to_float(T{now[i]}) : NAN;
}

void execute(const Operation& operation) {
  const Product& product = operation.product;
  const int columns = product.columns;
  u16 a_now[kRows * kDepth], b_now[kDepth * kMostColumns];
  read_operands(product, a_now, b_now);
  float a[kRows * kDepth], b[kDepth * kMostColumns];
  const auto convert = product.number == Number::bfloat16 ? convert_as<bfloat16> : convert_as<float16>;
  convert(operation.a, product.a_in_registers ? operation.a : a_now, kRows * kDepth, a);
  convert(operation.b, b_now, kDepth * columns, b);
  float* const sums = operation.accumulators->sums.data();
  if (!product.add) std::fill_n(sums, kRows * columns, 0.0f);
  // Parts of a row that lie in vector registers; all of them are multiples of 16 columns.
  using Vector [[gnu::vector_size(16)]] = float;
  for (int column = 0; column < columns; column += 16)
    for (int row = 0; row < kRows; ++row) {
      Vector part[4] = {};
      for (int k = 0; k < kDepth; ++k)
        for (int i = 0; i < 4; ++i) {
          Vector numbers;
          std::memcpy(&numbers, b + k * columns + column + 4 * i, sizeof numbers);
          part[i] += a[row * kDepth + k] * numbers;
        }
      for (int i = 0; i < 16; ++i) sums[row * columns + column + i] += part[i / 4][i % 4];
    }
}

// The threads have their sums back.
void deliver(const Accumulators& accumulators) {
  for (int t = 0; t < kThreads; ++t) {
    float* const c = accumulators.of[t];
    for (int i = 0; i < accumulators.columns / 2; ++i) {
      if (bits_of(c[i]) != static_cast<u32>(kPoison))
        fail("accumulators of thread %d of the warpgroup were written while products ran", t);
      c[i] = accumulators.sums[static_cast<std::size_t>(row_of(t, i) * accumulators.columns + column_of(t, i))];
    }
  }
}

std::shared_ptr<Accumulators> accumulators_at(const Warpgroup& warpgroup, int t, const float* c, int columns) {
  for (const Operation& operation : warpgroup.operations)
    if (operation.accumulators->of[t] == c) return operation.accumulators;
  auto accumulators = std::make_shared<Accumulators>();
  accumulators->columns = columns;
  accumulators->sums.resize(static_cast<std::size_t>(kRows * columns));
  return accumulators;
}

}  // namespace

void multiply(const Product& product, float* c, const u32* a) {
  Thread& thread = *self;
  const int t = thread.index % kThreads, columns = product.columns;
  Warpgroup& warpgroup = thread.block->warpgroups[static_cast<std::size_t>(thread.index / kThreads)];
  if (!thread.products_are_fenced) fail("multiply: no fence_products since products were waited for");

  // The first of the threads starts the operation.
  const auto at = static_cast<std::size_t>(thread.products++ - warpgroup.executed);
  if (at == warpgroup.operations.size()) {
    warpgroup.operations.push_back({product, thread.product_groups, accumulators_at(warpgroup, t, c, columns), {}, {}});
    Operation& operation = warpgroup.operations.back();
    read_operands(product, operation.a, operation.b);
  }
  Operation& operation = warpgroup.operations[at];
  if (operation.product != product || operation.group != thread.product_groups)
    fail("multiply: not the same in all threads of the warpgroup");
  Accumulators& accumulators = *operation.accumulators;
  if (accumulators.columns != columns || (accumulators.of[t] && accumulators.of[t] != c))
    fail("multiply: other accumulators than other threads");
  if (!accumulators.of[t]) {
    accumulators.of[t] = c;
    for (int i = 0; i < columns / 2; ++i)
      accumulators.sums[static_cast<std::size_t>(row_of(t, i) * columns + column_of(t, i))] = c[i];
    poison(c, sizeof(float) * static_cast<std::size_t>(columns / 2));
  }
  if (product.a_in_registers)
    for (int part = 0; part < 4; ++part) {
      const int row = row_of(t, 2 * part), k = part / 2 * 8 + t % 4 * 2;
      std::memcpy(&operation.a[static_cast<std::size_t>(row * kDepth + k)], &a[part], 4);
    }
}

void commit_products() { ++self->product_groups; }

void wait_products(int pending) {
  struct Given {
    Thread& thread;
    int pending;
  } given{*self, pending};
  meet_warpgroup("wait_products", &given, [](void* const* all) {
    const auto of = [&](int t) { return *static_cast<const Given*>(all[t]); };
    const Thread& first = of(0).thread;
    for (int t = 1; t < kThreads; ++t)
      if (of(t).pending != of(0).pending || of(t).thread.products != first.products ||
          of(t).thread.product_groups != first.product_groups)
        fail("wait_products: threads of the warpgroup wait for different products");
    Warpgroup& warpgroup = first.block->warpgroups[static_cast<std::size_t>(first.index / kThreads)];
    auto& operations = warpgroup.operations;
    for (; !operations.empty() && operations.front().group < first.product_groups - of(0).pending;
         operations.pop_front(), ++warpgroup.executed) {
      execute(operations.front());
      if (operations.front().accumulators.use_count() == 1) deliver(*operations.front().accumulators);
    }
  });
  self->products_are_fenced = false;
}

void require_no_products() {
  const Warpgroup& warpgroup = self->block->warpgroups[static_cast<std::size_t>(self->index / kThreads)];
  if (self->products > warpgroup.executed) fail("ended without waiting for its products");
}

}  // namespace flash_dmattn::cuda::emulator
