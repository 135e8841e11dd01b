// Which instruction set runs. All that asks the machine is here, because a file in isa/ may hold no code that runs
// before its instruction set is known to be there.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#if defined(FLASH_DMATTN_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"
#include "flash_dmattn/attention.h"

namespace flash_dmattn {
namespace cpu {
namespace {

bool always() { return true; }

#if defined(FLASH_DMATTN_HAS_AVX2)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt");
}
#endif
#if defined(FLASH_DMATTN_HAS_AVX512)
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
#if defined(FLASH_DMATTN_HAS_AVX512_BF16)
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
/// AMD's dot products do two steps of the sum at the price of one; Intel's are slower than widening to float32.
bool has_fast_avx512_bf16() { return __builtin_cpu_is("amd"); }
#endif
#if defined(FLASH_DMATTN_HAS_AMX)
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & amx_bf16) || !(d & amx_tile))
    return false;
  constexpr long request_permission = 0x1023,
                 tile_data = 18;  // Linux hands tile registers to a process that asks for them
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

struct Candidate {
  InstructionSet set;
  bool (*is_supported)();
  bool (*is_worthwhile)();
};

/// Those of this build, the best first.
const Candidate kCandidates[] = {
#if defined(FLASH_DMATTN_HAS_AMX)
    {{"amx", amx_kernels}, has_amx, always},
#endif
#if defined(FLASH_DMATTN_HAS_AVX512_BF16)
    {{"avx512_bf16", avx512_bf16_kernels}, has_avx512_bf16, has_fast_avx512_bf16},
#endif
#if defined(FLASH_DMATTN_HAS_AVX512)
    {{"avx512", avx512_kernels}, has_avx512, always},
#endif
#if defined(FLASH_DMATTN_HAS_AVX2)
    {{"avx2", avx2_kernels}, has_avx2, always},
#endif
    {{"baseline", baseline_kernels}, always, always},
};

const InstructionSet& choose() {
  const char* wanted = std::getenv("FLASH_DMATTN_CPU");
  const InstructionSet* best = nullptr;
  for (const Candidate& candidate : kCandidates) {
    if (!candidate.is_supported()) continue;
    if (best == nullptr && candidate.is_worthwhile()) best = &candidate.set;
    if (wanted != nullptr && std::strcmp(wanted, candidate.set.name) == 0) return candidate.set;
  }
  if (wanted != nullptr && *wanted != 0) {
    std::fprintf(stderr, "flash_dmattn: FLASH_DMATTN_CPU is %s, takes one of:", wanted);
    for (const Candidate& candidate : kCandidates)
      if (candidate.is_supported()) std::fprintf(stderr, " %s", candidate.set.name);
    std::fprintf(stderr, "; going on with %s\n", best->name);
  }
  return *best;
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace cpu

const char* cpu_instruction_set() { return cpu::instruction_set().name; }

}  // namespace flash_dmattn
