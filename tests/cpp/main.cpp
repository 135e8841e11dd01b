// engine_tests [--cases N] [--instruction-set NAME] [name ...]: runs the tests whose "file.test" begins with one of the
// names, or all. With an instruction set that this machine has not it exits with 77, which CTest counts as skipped.
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstring>
#include <exception>
#include <filesystem>
#include <iostream>
#include <vector>

#include "check.h"
#include "flash_dmattn/attention.h"

namespace flash_dmattn::test {
namespace {

struct Test {
  std::string name;
  void (*run)();
};

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

std::vector<std::string> contexts;
int failures = 0;
int cases = 200;

#if defined(__x86_64__)
bool machine_has_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned tile = 1u << 24, bf16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & tile) || !(edx & bf16)) return false;
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

/// Asked of the compiler's run time, not of the engine, so that a set which the engine wrongly leaves out is seen.
bool machine_has([[maybe_unused]] const std::string& instruction_set) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (instruction_set == "avx2") return avx2;
  if (instruction_set == "avx512") return avx512;
  if (instruction_set == "avx512_bf16") return avx512_bf16;
  if (instruction_set == "amx") return avx512_bf16 && machine_has_amx();
#endif
  return true;
}

}  // namespace

Registered::Registered(const char* file, const char* name, void (*run)()) {
  tests().push_back({std::filesystem::path(file).stem().string() + "." + name, run});
}

Context::Context(std::string text) { contexts.push_back(std::move(text)); }
Context::~Context() { contexts.pop_back(); }

void fail(const char* file, int line, const std::string& message) {
  ++failures;
  std::cerr << file << ":" << line << ": " << message << "\n";
  for (const std::string& context : contexts) std::cerr << "    in " << context << "\n";
}

int random_cases() { return cases; }

}  // namespace flash_dmattn::test

int main(int count, char** arguments) {
  using namespace flash_dmattn::test;
  std::vector<std::string> names;
  std::string instruction_set;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "--cases") == 0 && i + 1 < count)
      cases = std::stoi(arguments[++i]);
    else if (std::strcmp(arguments[i], "--instruction-set") == 0 && i + 1 < count)
      instruction_set = arguments[++i];
    else
      names.emplace_back(arguments[i]);
  }

  if (!machine_has(instruction_set)) return 77;
  std::cout << "instruction set: " << flash_dmattn::cpu_instruction_set() << std::endl;
  if (!instruction_set.empty()) CHECK_EQUAL(flash_dmattn::cpu_instruction_set(), instruction_set);
  int passed = 0, failed = 0;
  for (const Test& test : tests()) {
    bool wanted = names.empty();
    for (const std::string& name : names) wanted |= test.name.rfind(name, 0) == 0;
    if (!wanted) continue;
    const int before = failures;
    try {
      test.run();
    } catch (const std::exception& error) {
      fail(test.name.c_str(), 0, std::string("threw ") + error.what());
    }
    const bool ok = failures == before;
    ++(ok ? passed : failed);
    std::cout << (ok ? "ok      " : "FAILED  ") << test.name << std::endl;
  }
  std::cout << passed << " passed, " << failed << " failed" << std::endl;
  return failures > 0 || passed == 0;
}
