// The emulator itself, with tiny kernels: what it computes, and what it reports.
#include "check.h"
#include "emulator.h"
#include "ptx/barrier.cuh"
#include "ptx/block.cuh"
#include "ptx/bulk.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/number.cuh"
#include "ptx/warp.cuh"
#include "ptx/warpgroup.cuh"
#include "tensor.h"

namespace flash_dmattn::cuda {
namespace {

using test::Random;

struct Memory {
  int* out;
  const int* in;
};

/// What launching a kernel throws.
std::string thrown(EmulatedStream& stream, const char* name, unsigned blocks, int threads, Memory memory = {},
                   int shared_bytes = 4096) {
  try {
    stream.launch({"", name}, {blocks}, threads, shared_bytes, memory);
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing";
}

#define CHECK_HAS(text, part)                                                                                       \
  do {                                                                                                              \
    const std::string text_ = text;                                                                                 \
    if (text_.find(part) == std::string::npos) test::fail(__FILE__, __LINE__, "\"" + text_ + "\" is not: " + part); \
  } while (false)

template <int kWarps>
struct Warps {
  static constexpr int kThreads = 32 * kWarps, kBlocksPerMultiprocessor = 2;
  using Params = Memory;
};

struct BlockSum : Warps<4> {
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

TEST(shuffles_and_barriers_sum_over_a_block) {
  EmulatedStream stream;
  int* out = stream.allocate_array<int>(20);
  stream.launch({"", "BlockSum"}, {20}, 128, 16, Memory{out, nullptr});
  for (int i = 0; i < 20; ++i) CHECK_EQUAL(out[i], 127 * 64 * (i + 1));
}

struct WarpFunctions : Warps<2> {
  static void run(const Params& params, char*) {
    const int t = thread_index(), lane = t % kWarp;
    int* out = params.out + 8 * t;
    out[0] = shuffle(10 * t, 7);
    out[1] = shuffle_up(10 * t, 3);
    out[2] = static_cast<int>(ballot(lane % 5 == 0));
    out[3] = shuffle_xor(1.5f * t, 2) == 1.5f * (t ^ 2);
    out[4] = shuffle(i64{t} << 40, lane + 1) == i64{t - lane + (lane + 1) % 32} << 40;
    out[5] = count_ones(0xf0f0u);
    out[6] = leading_zeros(1u);
    out[7] = 10 * lowest_one(0u) + lowest_one(8u);
  }
};
EMULATE(WarpFunctions);

TEST(threads_of_a_warp_tell_each_other) {
  EmulatedStream stream;
  int* out = stream.allocate_array<int>(8 * 64);
  stream.launch({"", "WarpFunctions"}, {1}, 64, 0, Memory{out, nullptr});
  for (int t = 0; t < 64; ++t, out += 8) {
    CHECK_EQUAL(out[0], 10 * (t / 32 * 32 + 7));
    CHECK_EQUAL(out[1], 10 * (t % 32 < 3 ? t : t - 3));
    CHECK_EQUAL(out[2], 0x42108421);
    CHECK(out[3] && out[4]);
    CHECK_EQUAL(out[5], 8);
    CHECK_EQUAL(out[6], 31);
    CHECK_EQUAL(out[7], -7);
  }
}

/// C = A B of 16 x 16, 16 x 16 by one warp, through shared memory: A and B lie in it as they are, or transposed.
template <class T, bool kTransposed>
struct Product : Warps<1> {
  static void run(const Params& params, char* shared) {
    T* a = reinterpret_cast<T*>(shared);
    T* b = a + 256;
    const T* in = reinterpret_cast<const T*>(params.in);
    const int t = thread_index();
    for (int i = t; i < 64; i += 32) copy_async_16(shared + 16 * i, in + 8 * i, true);
    commit_copies();
    wait_copies<0>();
    sync_warp();
    u32 left[4], right[4];
    const int row = t % 16, column = t / 16 * 8;
    // The four matrices in the order of A's parts: top left, bottom left, top right, bottom right. Of B^T they are two
    // parts of the first 8 columns of B, then two of the others.
    if constexpr (kTransposed) {
      load_matrices_transposed(left, a + (t % 8 + column) * 16 + t / 8 % 2 * 8);
      load_matrices_transposed(right, b + row * 16 + column);
    } else {
      load_matrices(left, a + row * 16 + column);
      load_matrices(right, b + (t % 8 + column) * 16 + t / 8 % 2 * 8);
    }
    float* out = reinterpret_cast<float*>(params.out);
    for (int half = 0; half < 2; ++half) {
      float c[4] = {1, 1, 1, 1};
      mma<T>(c, left, right[2 * half], right[2 * half + 1]);
      for (int i = 0; i < 4; ++i) out[(t / 4 + i / 2 * 8) * 16 + 8 * half + t % 4 * 2 + i % 2] = c[i];
    }
  }
};
EMULATE(Product<float16, false>);
EMULATE(Product<float16, true>);
EMULATE(Product<bfloat16, false>);
EMULATE(Product<bfloat16, true>);

template <class T>
void check_product(const char* name, bool is_transposed) {
  test::Context context(name);
  EmulatedStream stream;
  T* in = stream.allocate_array<T>(512);
  float* out = stream.allocate_array<float>(256);
  Random random(1);
  for (int i = 0; i < 512; ++i) in[i] = from_float<T>(static_cast<float>(random.normal()));
  stream.launch({"", name}, {1}, 32, 1024, Memory{reinterpret_cast<int*>(out), reinterpret_cast<int*>(in)});
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      double sum = 1;
      for (int k = 0; k < 16; ++k)
        sum += is_transposed ? to_float(in[k * 16 + i]) * to_float(in[256 + k * 16 + j])
                             : to_float(in[i * 16 + k]) * to_float(in[256 + j * 16 + k]);
      CHECK(std::fabs(out[i * 16 + j] - sum) < 1e-5);
    }
}

TEST(load_matrices_and_mma_multiply) {
  check_product<float16>("Product<float16, false>", false);
  check_product<float16>("Product<float16, true>", true);
  check_product<bfloat16>("Product<bfloat16, false>", false);
  check_product<bfloat16>("Product<bfloat16, true>", true);
}

TEST(numbers_of_16_bits_round_to_nearest_even) {
  for (u32 bits = 0; bits < 0x10000; ++bits) {
    const auto x = static_cast<u16>(bits);
    const double half = test::half_to_double(x), brain = test::bfloat16_to_double(x);
    CHECK(std::isnan(half) ? std::isnan(to_float(float16{x})) : to_float(float16{x}) == half);
    CHECK(std::isnan(brain) ? std::isnan(to_float(bfloat16{x})) : to_float(bfloat16{x}) == brain);
    CHECK(std::isnan(half) || from_float<float16>(to_float(float16{x})).bits == x);
  }
  Random random(2);
  for (int i = 0; i < 100000; ++i) {
    // Any float32, and one whose last places lie near a tie.
    auto bits = static_cast<u32>(random.integer(0, 0xffffffffll));
    if (i % 2) bits = (bits & 0xffffe000u) + static_cast<u32>(random.integer(0xffe, 0x1002));
    const float x = float_of(bits);
    if (std::isnan(x)) continue;
    const u32 both = pack<float16>(x, -x);
    CHECK_EQUAL(both & 0xffff, u32{test::double_to_half(x)});
    CHECK_EQUAL(both >> 16, u32{test::double_to_half(-x)});
    CHECK_EQUAL(pack<bfloat16>(-x, x) >> 16, u32{test::double_to_bfloat16(x)});
  }
  CHECK(to_float(from_float<float16>(float_of(0x7fc00000u))) != 0 && std::isnan(to_float(from_float<bfloat16>(NAN))));
  CHECK_EQUAL(fast_exp2(-kInfinity), 0.0f);
  CHECK_EQUAL(fast_exp2(-130.0f), 0.0f);
  CHECK_EQUAL(fast_log2(0.0f), -kInfinity);
  CHECK_EQUAL(fast_reciprocal(kInfinity), 0.0f);
}

/// Three groups of copies; what is there after waiting for all but kPending of them.
template <int kPending>
struct Copies : Warps<1> {
  static void run(const Params& params, char* shared) {
    const int* numbers = reinterpret_cast<const int*>(shared);
    for (int group = 0; group < 3; ++group) {
      if (thread_index() == 0) copy_async_16(shared + 16 * group, params.in + 4 * group, group != 1);
      commit_copies();
    }
    wait_copies<kPending>();
    sync_block();
    if (thread_index() < 16) params.out[thread_index()] = numbers[thread_index()];
  }
};
EMULATE(Copies<0>);
EMULATE(Copies<1>);
EMULATE(Copies<3>);

TEST(copies_land_when_they_are_waited_for) {
  for (int pending : {0, 1, 3}) {
    EmulatedStream stream;
    int *in = stream.allocate_array<int>(12), *out = stream.allocate_array<int>(16);
    for (int i = 0; i < 12; ++i) in[i] = i;
    stream.launch({"", "Copies<" + std::to_string(pending) + ">"}, {1}, 32, 64, Memory{out, in});
    for (int i = 0; i < 16; ++i) CHECK_EQUAL(out[i], i / 4 >= 3 - pending ? emulator::kPoison : i / 4 == 1 ? 0 : i);
  }
}

/// Copies over what was read before, without a barrier between: somebody may read late.
struct EarlyCopy : Warps<2> {
  static void run(const Params& params, char* shared) {
    int* numbers = reinterpret_cast<int*>(shared);
    numbers[thread_index()] = 1;
    sync_block();
    params.out[thread_index()] = numbers[63 - thread_index()];
    if (thread_index() % 4 == 0) copy_async_16(numbers + thread_index(), params.in, false);
    wait_copies<0>();
  }
};
EMULATE(EarlyCopy);

TEST(a_copy_that_starts_too_early_is_seen) {
  EmulatedStream stream;
  int *in = stream.allocate_array<int>(4), *out = stream.allocate_array<int>(64);
  stream.launch({"", "EarlyCopy"}, {1}, 64, 256, Memory{out, in});
  CHECK(std::any_of(out, out + 64, [](int x) { return x != 1; }));
}

/// Takes a ticket; then blocks write one after another, the last one first or, as they must, the first one first.
template <bool kReverse>
struct Turns : Warps<1> {
  static void run(const Params& params, char* shared) {
    int* ticket = reinterpret_cast<int*>(shared);
    int* counters = params.out;
    if (thread_index() == 0) {
      *ticket = fetch_add(&counters[0], 1);
      const int turn = kReverse ? grid_blocks() - 1 - *ticket : *ticket;
      while (load_acquired(&counters[1]) < turn) {
      }
    }
    sync_block();
    if (thread_index() == 1) counters[2] = counters[2] * 3 % 1000 + *ticket;
    sync_block();
    if (thread_index() == 0) add_released(&counters[1], 1);
  }
};
EMULATE(Turns<false>);
EMULATE(Turns<true>);

TEST(blocks_wait_for_each_other) {
  EmulatedStream stream(90, 2);  // four blocks at a time
  int* counters = stream.allocate_array<int>(3);
  for (unsigned blocks : {1, 4, 30}) {
    stream.zero(counters, 12);
    CHECK_EQUAL(thrown(stream, "Turns<false>", blocks, 32, {counters, nullptr}), "nothing");
    int expected = 0;
    for (unsigned i = 0; i < blocks; ++i) expected = expected * 3 % 1000 + static_cast<int>(i);
    CHECK_EQUAL(counters[2], expected);
  }
  stream.zero(counters, 12);
  CHECK_EQUAL(thrown(stream, "Turns<true>", 4, 32, {counters, nullptr}), "nothing");
  stream.zero(counters, 12);
  CHECK_HAS(thrown(stream, "Turns<true>", 5, 32, {counters, nullptr}), "thread 0 waits for another block");
}

struct Sums : Warps<2> {
  static void run(const Params& params, char*) {
    float* sums = reinterpret_cast<float*>(params.out);
    add_to(sums, 1);
    add_to(sums, 1, 2);
    add_to(sums, 1, 2, 3, 4);
  }
};
EMULATE(Sums);

TEST(sums_in_global_memory) {
  EmulatedStream stream;
  float* sums = stream.allocate_array<float>(4);
  CHECK(std::isnan(sums[0]));
  stream.zero(sums, 16);
  stream.launch({"", "Sums"}, {5}, 64, 0, Memory{reinterpret_cast<int*>(sums), nullptr});
  for (int i = 0; i < 4; ++i) CHECK_EQUAL(sums[i], i % 2 ? 4 * 320.0f : 3 * 320.0f);
}

/// A stage that one warp fills, in all ways, and two others read: 64 numbers copied one by one, 64 by the copy engine,
/// and one plain one. Stages are filled again as soon as they are free.
struct Pipeline : Warps<3> {
  static constexpr int kStages = 2, kRounds = 7;
  struct Shared {
    int copied[kStages][64], loaded[kStages][64], plain[kStages];
    Barrier full[kStages], empty[kStages];
  };
  static void run(const Params& params, char* shared) {
    Shared& memory = *reinterpret_cast<Shared*>(shared);
    const int t = thread_index();
    if (t == 95) {
      for (int stage = 0; stage < kStages; ++stage) {
        init(memory.full[stage], 32 + 1);
        init(memory.empty[stage], 64);
      }
      fence_barriers();
    }
    sync_block();
    for (int round = 0; round < kRounds; ++round) {
      const int stage = round % kStages, parity = round / kStages % 2;
      if (t >= 64) {
        wait(memory.empty[stage], parity ^ 1);
        if (t % 2 == 0)
          copy_async_16(&memory.copied[stage][2 * (t - 64)], params.in + 128 * round + 2 * (t - 64), true);
        arrive_after_copies(memory.full[stage]);
        if (t == 70) {
          memory.plain[stage] = 1000 * round;
          arrive_expecting(memory.full[stage], 256);
          for (int half = 0; half < 64; half += 32)
            bulk_load(&memory.loaded[stage][half], params.in + 128 * round + 64 + half, 128, memory.full[stage]);
        }
      } else {
        wait(memory.full[stage], parity);
        params.out[64 * round + t] = memory.copied[stage][t] + 2 * memory.loaded[stage][63 - t] + memory.plain[stage];
        arrive(memory.empty[stage]);
      }
    }
  }
};
EMULATE(Pipeline);

TEST(barriers_count_threads_and_what_lands) {
  constexpr int kRounds = Pipeline::kRounds;
  EmulatedStream stream;
  int *in = stream.allocate_array<int>(128 * kRounds), *out = stream.allocate_array<int>(64 * kRounds);
  for (int i = 0; i < 128 * kRounds; ++i) in[i] = i;
  for (unsigned seed = 0; seed < 30; ++seed) {
    stream.seed(seed);
    CHECK_EQUAL(thrown(stream, "Pipeline", 1, 96, {out, in}), "nothing");
    for (int round = 0; round < kRounds; ++round)
      for (int t = 0; t < 64; ++t)
        CHECK_EQUAL(out[64 * round + t], 128 * round + t + 2 * (128 * round + 64 + 63 - t) + 1000 * round);
  }
}

/// Frees numbers before having read them; the other warp overwrites them when they are free.
struct EarlyArrival : Warps<2> {
  static void run(const Params& params, char* shared) {
    int* numbers = reinterpret_cast<int*>(shared);
    Barrier& empty = *reinterpret_cast<Barrier*>(shared + 128);
    const int t = thread_index();
    if (t == 0) {
      init(empty, 32);
      fence_barriers();
    }
    if (t < 32) numbers[t] = 1;
    sync_block();
    if (t < 32) {
      arrive(empty);
      params.out[t] = numbers[t];
    } else {
      wait(empty, 0);
      numbers[t - 32] = 2;
    }
  }
};
EMULATE(EarlyArrival);

TEST(an_arrival_that_comes_too_early_is_seen) {
  EmulatedStream stream;
  int* out = stream.allocate_array<int>(32);
  int wrong = 0;
  for (unsigned seed = 0; seed < 10; ++seed) {
    stream.seed(seed);
    CHECK_EQUAL(thrown(stream, "EarlyArrival", 1, 64, {out, nullptr}), "nothing");
    wrong += std::any_of(out, out + 32, [](int x) { return x != 1; });
  }
  CHECK(wrong > 0);
}

/// Two copies that are on their way to the same place.
struct RacingCopies : Warps<1> {
  static void run(const Params& params, char* shared) {
    if (thread_index() > 0) return;
    for (int i = 0; i < 2; ++i) {
      copy_async_16(shared, params.in + 4 * i, true);
      commit_copies();
    }
    wait_copies<1>();
    params.out[0] = *reinterpret_cast<const int*>(shared);
    wait_copies<0>();
    params.out[1] = *reinterpret_cast<const int*>(shared);
  }
};
EMULATE(RacingCopies);

TEST(a_copy_over_a_copy_is_seen) {
  EmulatedStream stream;
  int *in = stream.allocate_array<int>(8), *out = stream.allocate_array<int>(2);
  for (int i = 0; i < 8; ++i) in[i] = i;
  CHECK_EQUAL(thrown(stream, "RacingCopies", 1, 32, {out, in}), "nothing");
  CHECK_EQUAL(out[0], emulator::kPoison);
  CHECK_EQUAL(out[1], 4);
}

/// Sums of 16 floats, and 16 numbers; what is written over them before or after they are read.
template <bool kWaits>
struct BulkCopies : Warps<1> {
  static void run(const Params& params, char* shared) {
    float* numbers = reinterpret_cast<float*>(shared);
    float* out = reinterpret_cast<float*>(params.out);
    const int t = thread_index();
    numbers[t] = static_cast<float>(t);
    fence_for_bulk();
    sync_block();
    if (t == 0) {
      bulk_add(out, numbers, 64);
      commit_bulk();
      bulk_store(out + 16, numbers + 16, 64);
      commit_bulk();
      if (kWaits) wait_bulk_read<0>();
      for (int i = 0; i < 32; ++i) numbers[i] = -1;
      wait_bulk<1>();
      wait_bulk_read<0>();
    }
  }
};
EMULATE(BulkCopies<false>);
EMULATE(BulkCopies<true>);

TEST(bulk_copies_read_shared_memory_late) {
  for (bool waits : {false, true}) {
    EmulatedStream stream;
    float* out = stream.allocate_array<float>(32);
    stream.zero(out, 128);
    const std::string name = std::string("BulkCopies<") + (waits ? "true>" : "false>");
    for (int i = 0; i < 2; ++i) stream.launch({"", name}, {1}, 32, 128, Memory{reinterpret_cast<int*>(out), nullptr});
    for (int i = 0; i < 16; ++i) {
      CHECK_EQUAL(out[i], waits ? 2.0f * static_cast<float>(i) : -2.0f);
      CHECK_EQUAL(out[16 + i], waits ? static_cast<float>(16 + i) : -1.0f);
    }
  }
}

// Matrices of small integers, whose products are exact: A is 64 x 64, B has 64 rows.
constexpr int kInner = 64;
constexpr int a_at(int row, int k) { return (row * 7 + k * 5 + row * k) % 9 - 4; }
constexpr int b_at(int k, int column) { return (k * 3 + column * 11 + k * column) % 7 - 3; }
int product_at(int row, int column) {
  int sum = 0;
  for (int k = 0; k < kInner; ++k) sum += a_at(row, k) * b_at(k, column);
  return sum;
}
constexpr int kLargestProduct = (64 + 256) * kInner * 2;  // bytes of shared memory

/// C = 1 + 2 A B with each layout of the operands in turn, and each with A in shared memory and in registers.
template <class T, int kColumns>
struct Products : Warps<4> {
  static constexpr int kBytesA = 64 * kInner * 2;

  /// Number `i` (of the contiguous dimension) of row `row`, in panels of `rows` rows.
  static T& number(char* panels, int rows, int row, int i) {
    char* const panel = panels + i / 64 * rows * 128;
    return *reinterpret_cast<T*>(panel + row * 128 + ((i % 64 / 8) ^ (row % 8)) * 16 + i % 8 * 2);
  }
  static u32 pair(int row, int k) {
    return pack<T>(static_cast<float>(a_at(row, k)), static_cast<float>(a_at(row, k + 1)));
  }

  template <Major kA, Major kB, bool kRegisters>
  static void run(float* out, char* shared) {
    char *const left = shared, *const right = shared + kBytesA;
    const int t = thread_index(), g = t / 32 * 16 + t % 32 / 4, i = t % 4 * 2;
    sync_block();
    for (int k = 0; k < kInner; ++k) {
      for (int row = t; row < 64; row += 128)
        (kA == Major::k ? number(left, 64, row, k) : number(left, kInner, k, row)) =
            from_float<T>(static_cast<float>(a_at(row, k)));
      for (int column = t; column < kColumns; column += 128)
        (kB == Major::k ? number(right, kColumns, column, k) : number(right, kInner, k, column)) =
            from_float<T>(static_cast<float>(b_at(k, column)));
    }
    fence_for_bulk();
    sync_block();
    const Operand a = operand(left, 16, 1024), b = operand(right, kInner * 128, 1024);
    float c[kColumns / 2];
    for (float& x : c) x = 1;
    fence_products();
    for (int twice = 0; twice < 2; ++twice) {
      for (int step = 0; step < kInner / 16; ++step) {
        const Operand b_step = b + step * (kB == Major::k ? 32 : 2048);
        if constexpr (kRegisters) {
          const int k = 16 * step + i;
          const u32 registers[4] = {pair(g, k), pair(g + 8, k), pair(g, k + 8), pair(g + 8, k + 8)};
          multiply<T, kColumns, kB>(c, registers, b_step, true);
        } else {
          multiply<T, kColumns, kA, kB>(c, a + step * (kA == Major::k ? 32 : 2048), b_step, true);
        }
      }
      commit_products();
    }
    wait_products<1>();
    wait_products<0>();
    for (int j = 0; j < kColumns / 2; ++j) out[(g + j / 2 % 2 * 8) * kColumns + j / 4 * 8 + i + j % 2] = c[j];
  }
  static void run(const Params& params, char* shared) {
    float* out = reinterpret_cast<float*>(params.out);
    constexpr int kSize = 64 * kColumns;
    run<Major::k, Major::k, false>(out, shared);
    run<Major::k, Major::mn, false>(out + kSize, shared);
    run<Major::mn, Major::k, false>(out + 2 * kSize, shared);
    run<Major::mn, Major::mn, false>(out + 3 * kSize, shared);
    run<Major::k, Major::k, true>(out + 4 * kSize, shared);
    run<Major::k, Major::mn, true>(out + 5 * kSize, shared);
  }
};
#define EMULATE_PRODUCTS(columns)       \
  EMULATE(Products<bfloat16, columns>); \
  EMULATE(Products<float16, columns>)
EMULATE_PRODUCTS(32);
EMULATE_PRODUCTS(64);
EMULATE_PRODUCTS(80);
EMULATE_PRODUCTS(96);
EMULATE_PRODUCTS(112);
EMULATE_PRODUCTS(128);
EMULATE_PRODUCTS(192);
EMULATE_PRODUCTS(256);

TEST(warpgroups_multiply) {
  for (const char* type : {"bfloat16", "float16"})
    for (int columns : {32, 64, 80, 96, 112, 128, 192, 256}) {
      const std::string name = std::string("Products<") + type + ", " + std::to_string(columns) + ">";
      test::Context context(name);
      EmulatedStream stream;
      float* out = stream.allocate_array<float>(static_cast<std::size_t>(6 * 64 * columns));
      stream.launch({"", name}, {1}, 128, kLargestProduct, Memory{reinterpret_cast<int*>(out), nullptr});
      for (int layout = 0; layout < 6; ++layout)
        for (int row = 0; row < 64; ++row)
          for (int column = 0; column < columns; ++column)
            CHECK_EQUAL(out[(layout * 64 + row) * columns + column],
                        static_cast<float>(1 + 2 * product_at(row, column)));
    }
}

/// C = A B where rows of 16 numbers stand in two halves, the second ones far from the first.
struct PlainProduct : Warps<4> {
  static constexpr int kColumns = 32, kFar = 4096;
  static void run(const Params& params, char* shared) {
    char *const left = shared, *const right = shared + 1024;
    const int t = thread_index(), g = t / 32 * 16 + t % 32 / 4, i = t % 4 * 2;
    const auto put = [&](char* rows, int row, int k, int x) {
      *reinterpret_cast<bfloat16*>(rows + k / 8 * kFar + row * 16 + k % 8 * 2) =
          from_float<bfloat16>(static_cast<float>(x));
    };
    for (int k = 0; k < 16; ++k) {
      if (t < 64) put(left, t, k, static_cast<int>(a_at(t, k)));
      if (t < kColumns) put(right, t, k, static_cast<int>(b_at(k, t)));
    }
    fence_for_bulk();
    sync_block();
    float c[kColumns / 2];
    fence_products();
    multiply<bfloat16, kColumns, Major::k, Major::k>(c, plain_operand(left, kFar), plain_operand(right, kFar), false);
    commit_products();
    wait_products<0>();
    float* const out = reinterpret_cast<float*>(params.out);
    for (int j = 0; j < kColumns / 2; ++j) out[(g + j / 2 % 2 * 8) * kColumns + j / 4 * 8 + i + j % 2] = c[j];
  }
};
EMULATE(PlainProduct);

TEST(warpgroups_multiply_rows_in_halves) {
  EmulatedStream stream;
  float* out = stream.allocate_array<float>(64 * PlainProduct::kColumns);
  stream.launch({"", "PlainProduct"}, {1}, 128, 8192, Memory{reinterpret_cast<int*>(out), nullptr});
  for (int row = 0; row < 64; ++row)
    for (int column = 0; column < PlainProduct::kColumns; ++column) {
      double exact = 0;
      for (int k = 0; k < 16; ++k) exact += static_cast<double>(a_at(row, k)) * b_at(k, column);
      CHECK_EQUAL(out[row * PlainProduct::kColumns + column], static_cast<float>(exact));
    }
}

/// What programs do wrong with a product of ones (16 everywhere).
enum class Wrong { nothing, reads_early, overwrites, writes_late, touches, no_fence, no_wait, differs, strays, tilted };
template <Wrong kWrong>
struct OneProduct : Warps<4> {
  static void run(const Params& params, char* shared) {
    float16* numbers = reinterpret_cast<float16*>(shared);
    const int t = thread_index();
    const auto write = [&](float x) {
      for (int i = t; i < 64 * 64; i += 128) numbers[i] = from_float<float16>(x);
    };
    write(kWrong == Wrong::writes_late ? 0 : 1);
    sync_block();
    const Operand a = operand(shared + (kWrong == Wrong::tilted ? 128 : 0), 16, 1024);
    const Operand b = operand(shared + (kWrong == Wrong::strays ? 4096 : 0), 16, 1024);
    float c[32];
    if (kWrong != Wrong::no_fence) fence_products();
    multiply<float16, 64, Major::k, Major::k>(c, a, kWrong == Wrong::differs ? b + t / 32 * 32 : b, false);
    commit_products();
    if (kWrong == Wrong::overwrites || kWrong == Wrong::writes_late) write(1 + (kWrong == Wrong::overwrites));
    if (kWrong == Wrong::touches) c[3] = 1;
    if (kWrong == Wrong::no_wait) return;
    if (kWrong == Wrong::reads_early) {
      for (int i = 0; i < 32; ++i) reinterpret_cast<float*>(params.out)[32 * t + i] = c[i];
      wait_products<0>();
    } else {
      sync_block();
      wait_products<0>();
      for (int i = 0; i < 32; ++i) reinterpret_cast<float*>(params.out)[32 * t + i] = c[i];
    }
  }
};
EMULATE(OneProduct<Wrong::nothing>);
EMULATE(OneProduct<Wrong::reads_early>);
EMULATE(OneProduct<Wrong::overwrites>);
EMULATE(OneProduct<Wrong::writes_late>);
EMULATE(OneProduct<Wrong::touches>);
EMULATE(OneProduct<Wrong::no_fence>);
EMULATE(OneProduct<Wrong::no_wait>);
EMULATE(OneProduct<Wrong::differs>);
EMULATE(OneProduct<Wrong::strays>);
EMULATE(OneProduct<Wrong::tilted>);

TEST(wrong_products_are_seen) {
  EmulatedStream stream;
  float* out = stream.allocate_array<float>(64 * 64);
  const auto run = [&](const char* wrong) {
    const std::string name = std::string("OneProduct<Wrong::") + wrong + ">";
    return thrown(stream, name.c_str(), 1, 128, {reinterpret_cast<int*>(out), nullptr}, 64 * 64 * 2);
  };
  const auto all = [&](auto holds) { return std::all_of(out, out + 64 * 64, holds); };
  const auto is_nan = [](float x) { return std::isnan(x); };
  CHECK_EQUAL(run("nothing"), "nothing");
  CHECK(all([](float x) { return x == 16; }));
  for (const char* wrong : {"reads_early", "overwrites", "writes_late"}) {
    test::Context context(wrong);
    CHECK_EQUAL(run(wrong), "nothing");
    CHECK(all(is_nan));
  }
  CHECK_HAS(run("touches"), "were written while products ran");
  CHECK_HAS(run("no_fence"), "no fence_products");
  CHECK_HAS(run("no_wait"), "ended without waiting for its products");
  CHECK_HAS(run("differs"), "not the same in all threads");
  CHECK_HAS(run("strays"), "multiply: outside the block's shared memory");
  CHECK_HAS(run("tilted"), "starts at byte 128 of a panel");
}

/// What programs do wrong at a barrier of one arrival.
enum class Misuse { forgets_init, forgets_fence, never_arrives, arrives_twice, reads_early, forgets_bulk, odd_bytes };
template <Misuse kMisuse>
struct OneBarrier : Warps<1> {
  static void run(const Params& params, char* shared) {
    Barrier& barrier = *reinterpret_cast<Barrier*>(shared + 64);
    int* numbers = reinterpret_cast<int*>(shared);
    if (thread_index() > 0) return;
    if (kMisuse != Misuse::forgets_init) init(barrier, 1);
    if (kMisuse == Misuse::forgets_fence) sync_block();
    if (kMisuse == Misuse::arrives_twice) {
      arrive_expecting(barrier, 16);
      arrive(barrier);
    }
    if (kMisuse == Misuse::reads_early) {
      copy_async_16(numbers, params.in, true);
      arrive_after_copies(barrier);
      params.out[0] = numbers[0];
      wait(barrier, 0);
      params.out[1] = numbers[0];
      bulk_load(numbers, params.in + 4, 16, barrier);
      arrive_expecting(barrier, 16);
      params.out[2] = numbers[0];
      wait(barrier, 1);
      params.out[3] = numbers[0];
      return;
    }
    if (kMisuse == Misuse::forgets_bulk) {
      bulk_store(params.out, numbers, 16);
      commit_bulk();
      return;
    }
    if (kMisuse == Misuse::odd_bytes) bulk_load(numbers, params.in, 8, barrier);
    wait(barrier, 1);
    wait(barrier, 0);
  }
};
EMULATE(OneBarrier<Misuse::forgets_init>);
EMULATE(OneBarrier<Misuse::forgets_fence>);
EMULATE(OneBarrier<Misuse::never_arrives>);
EMULATE(OneBarrier<Misuse::arrives_twice>);
EMULATE(OneBarrier<Misuse::reads_early>);
EMULATE(OneBarrier<Misuse::forgets_bulk>);
EMULATE(OneBarrier<Misuse::odd_bytes>);

TEST(misused_barriers_are_seen) {
  EmulatedStream stream;
  int *in = stream.allocate_array<int>(16), *out = stream.allocate_array<int>(16);
  for (int i = 0; i < 16; ++i) in[i] = i + 1;
  const auto run = [&](const char* misuse) {
    const std::string name = std::string("OneBarrier<Misuse::") + misuse + ">";
    return thrown(stream, name.c_str(), 1, 32, {out, in});
  };
  CHECK_HAS(run("forgets_init"), "wait: at a Barrier without init");
  CHECK_HAS(run("forgets_fence"), "is at barrier 0 between init and fence_barriers");
  CHECK_HAS(run("never_arrives"),
            "1 threads (thread 0 first) for parity 0 of the Barrier at byte 64 of shared memory (which lacks 1 of 1 "
            "arrivals and 0 bytes)");
  CHECK_HAS(run("arrives_twice"), "arrive: more than 1 arrivals in a phase");
  CHECK_HAS(run("forgets_bulk"), "ended while a bulk copy read shared memory");
  CHECK_HAS(run("odd_bytes"), "bulk_load: of 8 bytes");
  CHECK_EQUAL(run("reads_early"), "nothing");
  const int expected[4] = {emulator::kPoison, 1, emulator::kPoison, 5};
  for (int i = 0; i < 4; ++i) CHECK_EQUAL(out[i], expected[i]);
}

struct HalfBarrier : Warps<2> {
  static void run(const Params&, char*) {
    if (thread_index() < 32) sync_threads(3, 64);
  }
};
EMULATE(HalfBarrier);

struct SplitWarp : Warps<1> {
  static void run(const Params&, char*) { thread_index() < 16 ? sync_warp() : void(ballot(true)); }
};
EMULATE(SplitWarp);

struct HalfWarp : Warps<1> {
  static void run(const Params&, char*) {
    if (thread_index() != 5) sync_warp();
  }
};
EMULATE(HalfWarp);

struct Misaligned : Warps<1> {
  static void run(const Params& params, char* shared) { copy_async_16(shared, params.in + 1, true); }
};
EMULATE(Misaligned);

struct FarRow : Warps<1> {
  static void run(const Params&, char* shared) {
    u32 m[4];
    load_matrices(m, shared + 4096);
  }
};
EMULATE(FarRow);

struct PastShared : Warps<1> {
  static void run(const Params&, char* shared) { shared[4096] = 1; }
};
EMULATE(PastShared);

struct PastMemory : Warps<1> {
  static void run(const Params& params, char*) { params.out[-1] = 0; }
};
EMULATE(PastMemory);

TEST(mistakes_are_reported) {
  EmulatedStream stream;
  int* memory = stream.allocate_array<int>(16);
  CHECK_HAS(thrown(stream, "HalfBarrier", 1, 64), "32 of 64 threads at barrier 3");
  CHECK_HAS(thrown(stream, "SplitWarp", 1, 32), "while thread ");
  CHECK_HAS(thrown(stream, "HalfWarp", 1, 32), "31 threads of warp 0 at sync_warp");
  CHECK_HAS(thrown(stream, "Misaligned", 1, 32, {nullptr, memory}), "no multiple of 16");
  CHECK_HAS(thrown(stream, "FarRow", 1, 32), "load_matrices: outside the block's shared memory");
  CHECK_HAS(thrown(stream, "PastShared", 1, 32), "past the end of its shared memory");
  CHECK_HAS(thrown(stream, "BlockSum", 1, 64), "number of threads");
  CHECK_HAS(thrown(stream, "Nothing<1>", 1, 32), "not emulated: EMULATE(Nothing<1>);");
  CHECK_HAS(thrown(stream, "PastMemory", 1, 32, {memory, nullptr}), "wrote outside of 64 bytes");
}

}  // namespace
}  // namespace flash_dmattn::cuda
