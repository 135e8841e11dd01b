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

using test::Random;

struct Memory {
  int* out;
  const int* in;
};

/// What launching a kernel throws.
std::string thrown(EmulatedStream& stream, const char* name, unsigned blocks, int threads, Memory memory = {}) {
  try {
    stream.launch({"", name}, {blocks}, threads, 4096, memory);
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
