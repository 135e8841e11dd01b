#include "cuda/jit/compiler.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <mutex>
#include <vector>

#include "cuda/jit/cache.h"
#include "cuda/jit/cubin.h"
#include "cuda/jit/hash.h"
#include "cuda/jit/nvrtc.h"
#include "cuda/jit/sources.h"
#include "flash_dmattn/cuda_kernels.h"

namespace flash_dmattn::cuda {
namespace {

std::string translation_unit(const Kernel& kernel) {
  return "#include \"" + kernel.header +
         "\"\n"
         "namespace flash_dmattn::cuda {\n"
         "using Kernel = " +
         kernel.name +
         ";\n"
         "extern \"C\" __global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerMultiprocessor)\n" +
         entry_name(kernel) +
         "(const __grid_constant__ Kernel::Params params) {\n"
         "  extern __shared__ __align__(1024) char shared[];\n"
         "  Kernel::run(params, shared);\n"
         "}\n"
         "}  // namespace flash_dmattn::cuda\n";
}

// Of all sources: simpler than knowing which ones a kernel includes, and they change together, with the library.
const std::string& hash_of_sources() {
  static const std::string text = [] {
    Hash hash;
    for (const Source& source : sources()) hash.add(source.name).add(source.text);
    return hash.text();
  }();
  return text;
}

// Whoever compiles an image holds its mutex; who waited for that takes what has been compiled.
struct Compilation {
  std::mutex mutex;
  std::weak_ptr<const std::string> image;
};

std::shared_ptr<Compilation> compilation_of(const std::string& key) {
  static std::mutex mutex;
  static auto& compilations = *new std::map<std::string, std::shared_ptr<Compilation>>;
  const std::lock_guard lock(mutex);
  auto& compilation = compilations[key];
  if (!compilation) compilation = std::make_shared<Compilation>();
  return compilation;
}

// What a GPU of that compute capability can do beyond the others of its generation is called for by an "a".
std::string cubin_arch(int arch) { return "sm_" + std::to_string(arch) + (arch == 90 ? "a" : ""); }

}  // namespace

std::string entry_name(const Kernel& kernel) { return "flash_dmattn_" + kernel.name.substr(0, kernel.name.find('<')); }

Image image_of(const Kernel& kernel, const std::string& arch) {
  const Nvrtc& nvrtc = Nvrtc::get();
  const std::string unit = translation_unit(kernel);
  const std::vector<std::string> options = {"-std=c++20", "-default-device", "-arch=" + arch};
  Hash hash;
  hash.add(hash_of_sources()).add(unit).add(nvrtc.name());
  for (const std::string& option : options) hash.add(option);
  const std::string key = hash.text();

  const std::shared_ptr<Compilation> compilation = compilation_of(key);
  const std::lock_guard lock(compilation->mutex);
  if (Image image = compilation->image.lock()) return image;
  std::optional<std::string> cached = read_cached(key);
  const bool is_new = !cached;
  const Image image = std::make_shared<const std::string>(cached ? *std::move(cached) : nvrtc.compile(unit, options));
  compilation->image = image;
  if (is_new) write_cached(key, *image);
  return image;
}

int arch_number(const std::string& arch) {
  int number = 0;
  const char *start = arch.data() + 3, *end = arch.data() + arch.size();
  const bool has_prefix = arch.starts_with("sm_");
  const auto [rest, error] = std::from_chars(has_prefix ? start : end, end, number);
  if (!has_prefix || error != std::errc() || (rest != end && std::string(rest, end) != "a"))
    throw InvalidArgument("arch: is \"" + arch + "\", takes sm_80, sm_86, sm_90a, sm_120 and the like");
  return number;
}

std::string nvrtc_arch(int arch) {
  const Nvrtc& nvrtc = Nvrtc::get();
  int newest = 0;
  for (const int known : nvrtc.archs()) {
    const bool is_tegra = known == 87 || known == 101;  // their cubins run on nothing else
    if (known == arch || (known < arch && !is_tegra)) newest = std::max(newest, known);
  }
  if (newest < kOldestArch) throw Error(nvrtc.name() + " is too old: it does not know compute capability 8.0");
  if (newest == arch || newest / 10 == arch / 10) return cubin_arch(newest);
  return "compute_" + std::to_string(newest);
}

std::string compiler() {
  const Nvrtc& nvrtc = Nvrtc::get();
  return nvrtc.name() + " (" + nvrtc.path() + ")";
}

Resources compile(const Target& target) {
  const int arch = arch_number(target.arch);
  const Nvrtc& nvrtc = Nvrtc::get();
  if (arch < kOldestArch || !std::ranges::count(nvrtc.archs(), arch)) {
    std::string known;
    for (const int number : nvrtc.archs())
      if (number >= kOldestArch) known += (known.empty() ? "" : ", ") + cubin_arch(number);
    throw Error("Kernels cannot be compiled for " + target.arch + "; " + nvrtc.name() + " can for " + known);
  }
  return resources(*image_of(target.kernel, cubin_arch(arch)));
}

}  // namespace flash_dmattn::cuda
