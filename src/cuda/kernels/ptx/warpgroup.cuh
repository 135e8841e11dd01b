// The matrix product of four warps (wgmma, sm_90a): C (64 x kColumns, float32) += A (64 x 16) B (16 x kColumns).
//
// Products run in the background: fence_products, some multiply, commit_products; after wait_products the sums are
// there, and what the products read may be written again. Until then nobody touches the accumulators, nor the registers
// of A.
//
// Thread t of the 128 holds, with g = t / 32 * 16 + t % 32 / 4 and i = 2 (t % 4):
//   A: a[0] = row g, columns i, i + 1; a[1] = row g + 8; a[2] = row g, columns i + 8, i + 9; a[3] = row g + 8, those
//   C: c[4 j], c[4 j + 1] = row g, columns 8 j + i, 8 j + i + 1; c[4 j + 2], c[4 j + 3] = row g + 8
// In shared memory a matrix lies in panels of 64 numbers to a row (128 bytes), aligned to 1024 bytes; piece p (16
// bytes) of row r stands at 128 r + 16 (p ^ r % 8).
#pragma once
#include "ptx/memory.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

constexpr int kWarpgroup = 128;

/// How many registers each thread of the warpgroup has from now on: a multiple of 8 in 24..256. Growing waits until
/// another warpgroup has shrunk.
template <int kRegisters>
__forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// A matrix in shared memory.
struct Operand {
  u32 low, high;  // of its descriptor; where it is stands in `low`
  /// `bytes` further on: a multiple of 16.
  __forceinline__ Operand operator+(int bytes) const { return {low + static_cast<u32>(bytes >> 4), high}; }
  __forceinline__ u64 descriptor() const { return static_cast<u64>(high) << 32 | low; }
};

/// Which of an operand's dimensions is contiguous in shared memory: the one that is summed over, or that of C.
enum class Major { k, mn };

/// `stride_bytes` from 8 rows of a panel to the next 8. Major::k: rows are M or N, and 16 further along K is 32 bytes.
/// Major::mn: rows are K, and `leading_bytes` from a panel to the next 64 of M or N.
__forceinline__ Operand operand(const void* shared, int leading_bytes, int stride_bytes) {
  constexpr u32 kSwizzle128 = u32{1} << 30;
  return {static_cast<u32>(leading_bytes >> 4) << 16 | shared_address(shared) >> 4,
          kSwizzle128 | static_cast<u32>(stride_bytes >> 4)};
}

/// Major::k, without panels: of each row 16 bytes stand together, which are 8 numbers, and the other 8 `leading_bytes`
/// further on.
__forceinline__ Operand plain_operand(const void* shared, int leading_bytes) {
  constexpr u32 kEightRows = 8 * 16;
  return {static_cast<u32>(leading_bytes >> 4) << 16 | shared_address(shared) >> 4, kEightRows >> 4};
}

/// Before products whose registers were touched.
__forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// Ends a group of products.
__forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most kPending groups are under way.
template <int kPending>
__forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Whatever computes these registers comes before it, and whatever takes them after it.
template <int kCount>
__forceinline__ void fence_registers(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// The text of an asm statement has its operands by number: `half` = kColumns / 2 accumulators, then the others.
#define TEXT_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TEXT_32 TEXT_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TEXT_40 TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define TEXT_48 TEXT_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define TEXT_56 TEXT_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define TEXT_64 TEXT_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define TEXT_80 TEXT_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define TEXT_96 TEXT_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TEXT_112 TEXT_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define TEXT_128 \
  TEXT_112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define EIGHT(i)                                                                                              \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])
#define OUT_16 EIGHT(0), EIGHT(8)
#define OUT_32 OUT_16, EIGHT(16), EIGHT(24)
#define OUT_40 OUT_32, EIGHT(32)
#define OUT_48 OUT_40, EIGHT(40)
#define OUT_56 OUT_48, EIGHT(48)
#define OUT_64 OUT_56, EIGHT(56)
#define OUT_96 OUT_64, EIGHT(64), EIGHT(72), EIGHT(80), EIGHT(88)
#define OUT_128 OUT_96, EIGHT(96), EIGHT(104), EIGHT(112), EIGHT(120)

template <class T, int kColumns>
struct Product;

#define PRODUCT(type, text, columns, half, n0, n1, n2, n3, n4, n5, n6)                                                 \
  template <>                                                                                                          \
  struct Product<type, columns> {                                                                                      \
    template <Major kA, Major kB>                                                                                      \
    static __forceinline__ void run(float (&c)[half], Operand a, Operand b, bool add) {                                \
      asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #n2 ", 0; wgmma.mma_async.sync.aligned.m64n" #columns        \
                   "k16.f32." text "." text " {" TEXT_##half "}, %" #n0 ", %" #n1 ", add, 1, 1, %" #n3 ", %" #n4 "; }" \
                   : OUT_##half                                                                                        \
                   : "l"(a.descriptor()), "l"(b.descriptor()), "r"(static_cast<int>(add)),                             \
                     "n"(kA == Major::mn ? 1 : 0), "n"(kB == Major::mn ? 1 : 0));                                      \
    }                                                                                                                  \
    template <Major kB>                                                                                                \
    static __forceinline__ void run(float (&c)[half], const u32 (&a)[4], Operand b, bool add) {                        \
      asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #n5 ", 0; wgmma.mma_async.sync.aligned.m64n" #columns        \
                   "k16.f32." text "." text " {" TEXT_##half "}, {%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 "}, %" #n4      \
                                                             ", add, 1, 1, %" #n6 "; }"                                \
                   : OUT_##half                                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()), "r"(static_cast<int>(add)),      \
                     "n"(kB == Major::mn ? 1 : 0));                                                                    \
    }                                                                                                                  \
  };
#define PRODUCTS(...)                    \
  PRODUCT(bfloat16, "bf16", __VA_ARGS__) \
  PRODUCT(float16, "f16", __VA_ARGS__)
PRODUCTS(32, 16, 16, 17, 18, 19, 20, 21, 22)
PRODUCTS(64, 32, 32, 33, 34, 35, 36, 37, 38)
PRODUCTS(80, 40, 40, 41, 42, 43, 44, 45, 46)
PRODUCTS(96, 48, 48, 49, 50, 51, 52, 53, 54)
PRODUCTS(112, 56, 56, 57, 58, 59, 60, 61, 62)
PRODUCTS(128, 64, 64, 65, 66, 67, 68, 69, 70)
PRODUCTS(192, 96, 96, 97, 98, 99, 100, 101, 102)
PRODUCTS(256, 128, 128, 129, 130, 131, 132, 133, 134)

/// C += A B, or without `add` C = A B: A in shared memory, or in registers.
template <class T, int kColumns, Major kA, Major kB>
__forceinline__ void multiply(float (&c)[kColumns / 2], Operand a, Operand b, bool add) {
  Product<T, kColumns>::template run<kA, kB>(c, a, b, add);
}
template <class T, int kColumns, Major kB>
__forceinline__ void multiply(float (&c)[kColumns / 2], const u32 (&a)[4], Operand b, bool add) {
  Product<T, kColumns>::template run<kB>(c, a, b, add);
}

}  // namespace flash_dmattn::cuda
