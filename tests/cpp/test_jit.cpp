// CUDA kernels from source to disk: the cache, the compiler (where there is one), what is listed. No GPU is needed.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "check.h"
#include "cuda/jit/cache.h"
#include "cuda/jit/compiler.h"
#include "cuda/jit/cubin.h"
#include "cuda/launch/kernel_list.h"
#include "fake_driver.h"
#include "flash_dmattn/cuda_kernels.h"

namespace flash_dmattn::cuda {
namespace {

/// A new cache folder while it lives.
class CacheFolder {
 public:
  CacheFolder() : path_(std::filesystem::temp_directory_path() / ("flash_dmattn_test_" + std::to_string(getpid()))) {
    std::filesystem::remove_all(path_);
    set(path_);
  }
  CacheFolder(const CacheFolder&) = delete;
  ~CacheFolder() { std::filesystem::remove_all(path_); }

  static void set(const std::string& path) { setenv("FLASH_DMATTN_CACHE_DIR", path.c_str(), 1); }
  std::vector<std::filesystem::path> files() const {
    std::vector<std::filesystem::path> files;
    for (const auto& entry : std::filesystem::directory_iterator(path_)) files.push_back(entry.path());
    return files;
  }

 private:
  std::filesystem::path path_;
};

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator(file), {}};
}
void write(const std::filesystem::path& path, const std::string& content) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << content;
}

void in_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

const std::string kKey(32, 'a');
// What an image may hold: every byte.
const std::string kImage = [] {
  std::string image;
  for (int i = 0; i < 600; ++i) image += static_cast<char>(i * 7);
  return image;
}();

TEST(cache_gives_what_was_written) {
  const CacheFolder folder;
  CHECK(!read_cached(kKey));
  write_cached(kKey, kImage);
  CHECK(read_cached(kKey) == kImage);
  write_cached(kKey, "");
  CHECK(read_cached(kKey) == "");
  CHECK_EQUAL(folder.files().size(), 1u);
}

TEST(cache_takes_a_damaged_file_for_none) {
  const CacheFolder folder;
  write_cached(kKey, kImage);
  const std::filesystem::path path = folder.files().at(0);
  const std::string content = read(path);
  for (std::size_t i = 0; i < content.size(); ++i) {
    std::string damaged = content;
    damaged[i] ^= 1 << i % 8;
    write(path, damaged);
    CHECK(!read_cached(kKey));
    write(path, content.substr(0, i));
    CHECK(!read_cached(kKey));
  }
  write(path, content + " ");
  CHECK(!read_cached(kKey));

  write(path, content);
  const std::string other(32, 'b');
  std::filesystem::copy_file(path, path.parent_path() / (other + kCacheSuffix));
  CHECK(!read_cached(other));
  write_cached(other, kImage);
  CHECK(read_cached(other) == kImage);
}

TEST(cache_is_shared_by_threads) {
  const CacheFolder folder;
  in_threads(8, [](int thread) {
    for (int i = 0; i < 50; ++i) {
      const std::string key(32, static_cast<char>('a' + (thread + i) % 3));
      write_cached(key, kImage + key);
      CHECK(read_cached(key) == kImage + key);
    }
  });
  CHECK_EQUAL(folder.files().size(), 3u);
}

TEST(cache_that_cannot_be_written_costs_one_warning) {
  std::vector<std::string> warnings;
  set_warning_handler([&](const std::string& text) { warnings.push_back(text); });
  CacheFolder::set("/dev/null/folder");
  for (int i = 0; i < 2; ++i) {
    write_cached(kKey, kImage);
    CHECK(!read_cached(kKey));
  }
  set_warning_handler({});
  CHECK_EQUAL(warnings.size(), 1u);
  if (!warnings.empty()) CHECK(warnings[0].find("/dev/null/folder: Not a directory") != std::string::npos);
}

TEST(cache_folder_follows_the_environment) {
  setenv("XDG_CACHE_HOME", "/xdg", 1);
  setenv("HOME", "/home", 1);
  CacheFolder::set("/own");
  CHECK_EQUAL(cache_directory(), "/own");
  CacheFolder::set("");
  CHECK_EQUAL(cache_directory(), "/xdg/flash_dmattn");
  unsetenv("XDG_CACHE_HOME");
  CHECK_EQUAL(cache_directory(), "/home/.cache/flash_dmattn");
  unsetenv("HOME");
  CHECK_EQUAL(cache_directory(), "");
  CHECK(!read_cached(kKey));
}

TEST(archs) {
  CHECK_EQUAL(arch_number("sm_90a"), 90);
  CHECK_EQUAL(arch_number("sm_120"), 120);
  for (const std::string arch : {"", "sm_", "90", "sm_9x", "sm_90aa", "compute_80", "sm_99999999999"})
    CHECK_REFUSED(arch_number(arch), "arch", "sm_80");
}

TEST(kernels_for_nothing_sensible_are_refused) {
  CHECK_REFUSED(kernels({"sm_80"}, {DType::float32}, {64}), "dtypes", "float32");
  for (const int head_dim : {0, -8, 7, 12, 264})
    CHECK_REFUSED(kernels({"sm_80"}, {DType::float16}, {head_dim}), "head_dims", std::to_string(head_dim));
}

std::set<std::tuple<std::string, int, int, int, int>> pairs(const std::vector<ListedKernel>& kernels) {
  std::set<std::tuple<std::string, int, int, int, int>> pairs;
  for (const ListedKernel& kernel : kernels)
    for (int i = 0; i < static_cast<int>(kernel.options.size()); ++i)
      for (int j = 0; j <= i; ++j) {
        const std::string& name = kernel.kernel.name;
        pairs.emplace(name.substr(0, name.find('<')), i, kernel.options[i], j, kernel.options[j]);
      }
  return pairs;
}

TEST(covering_has_all_pairs_with_few_kernels) {
  std::vector<ListedKernel> all = {{{"a.cuh", "Single"}, {}}};
  for (int a = 0; a < 10; ++a)
    for (int b = 0; b < 3; ++b)
      for (int c = 0; c < 2; ++c)
        for (int d = 0; d < 2; ++d)
          if (a != 3 || d == 0) all.push_back({{"a.cuh", "Many<" + std::to_string(all.size()) + ">"}, {a, b, c, d}});
  const std::vector<ListedKernel> few = covering(all);
  CHECK(pairs(few) == pairs(all));
  CHECK(few.size() < 40);
  CHECK_EQUAL(std::ranges::count(few, "Single", [](const ListedKernel& kernel) { return kernel.kernel.name; }), 1);
  CHECK(covering({}).empty());
}

TEST(cubin_that_is_none_is_refused) {
  for (const std::string& bytes : {std::string(), std::string(3, '\0'), std::string(500, 'x')}) {
    std::string message;
    try {
      resources(bytes);
    } catch (const Error& error) {
      message = error.what();
    }
    CHECK(message.starts_with("A compiled kernel"));
  }
}

/// One that the compiler needs little time for; nothing, with a word on it, where there is no compiler.
std::vector<Target> small_kernel() {
  try {
    std::cout << "        " << compiler() << std::endl;
  } catch (const Error& error) {
    std::cout << "skipped: " << error.what() << std::endl;
    return {};
  }
  std::vector<Target> targets = kernels({"sm_80"}, {DType::bfloat16}, {64});
  CHECK(!targets.empty());
  targets.resize(std::min<std::size_t>(targets.size(), 1));
  return targets;
}

TEST(threads_compile_a_kernel_once) {
  const CacheFolder folder;
  for (const Target& target : small_kernel()) {
    std::vector<Image> images(8);
    in_threads(8, [&](int thread) { images[thread] = image_of(target.kernel, target.arch); });
    for (const Image& image : images) CHECK(image == images[0]);
    CHECK_EQUAL(folder.files().size(), 1u);
    CHECK(resources(*images[0]).registers > 0);
    // No part of it is read as if it were there.
    for (std::size_t size = 0; size < images[0]->size(); size += 97) {
      try {
        resources(images[0]->substr(0, size));
      } catch (const Error&) {
      }
    }
  }
}

TEST(damaged_kernel_is_compiled_again) {
  const CacheFolder folder;
  for (const Target& target : small_kernel()) {
    const Resources first = compile(target);
    const std::filesystem::path path = folder.files().at(0);
    const std::string content = read(path);
    write(path, content.substr(0, content.size() / 2));
    CHECK_EQUAL(compile(target).registers, first.registers);
    CHECK_EQUAL(read(path).size(), content.size());
    CHECK_EQUAL(folder.files().size(), 1u);
  }
}

TEST(what_cannot_be_compiled_is_said) {
  const CacheFolder folder;
  for (Target target : small_kernel()) {
    const auto message = [&] {
      try {
        compile(target);
      } catch (const Error& error) {
        return std::string(error.what());
      }
      return std::string();
    };
    target.arch = "sm_75";
    CHECK(message().find("cannot be compiled for sm_75") != std::string::npos);
    target.arch = "sm_80";
    target.kernel.name = "NoSuchKernel";
    CHECK(message().find("identifier \"NoSuchKernel\" is undefined") != std::string::npos);
    CHECK(!std::filesystem::exists(cache_directory()));
  }
}

TEST(gpus_get_what_the_compiler_has_for_them) {
  if (small_kernel().empty()) return;
  CHECK_EQUAL(nvrtc_arch(80), "sm_80");
  CHECK_EQUAL(nvrtc_arch(90), "sm_90a");
  CHECK(nvrtc_arch(990).starts_with("compute_"));
}

// Two that launchers have, and that are compiled in no time.
const Kernel kCopy{"layout/copy_rows.cuh", "CopyRows"}, kZero{"sm80/probabilities.cuh", "ZeroMatrix"};

void launch(Stream& stream, const Kernel& kernel, unsigned blocks, int param) {
  stream.launch(kernel, {blocks}, 32, 0, param);
}

TEST(new_kernels_are_launched_in_order) {
  if (small_kernel().empty()) return;
  const CacheFolder folder;
  const auto stream = gpu_stream(0, nullptr, {});
  fake_driver_notes();
  const auto body = [&] {
    stream->zero(stream.get(), 1);
    launch(*stream, kCopy, 1, 10);
    launch(*stream, kZero, 2, 20);
    stream->zero(stream.get(), 2);
    launch(*stream, kCopy, 3, 30);
  };
  const std::vector<std::string> launches = {"flash_dmattn_CopyRows 1 10", "flash_dmattn_ZeroMatrix 2 20", "zero 2",
                                             "flash_dmattn_CopyRows 3 30"};
  std::vector<std::string> expected = {"zero 1", "load flash_dmattn_CopyRows", "load flash_dmattn_ZeroMatrix"};
  expected.insert(expected.end(), launches.begin(), launches.end());
  stream->together(body);
  CHECK(fake_driver_notes() == expected);
  CHECK_EQUAL(folder.files().size(), 2u);
  // Nothing waits for what is there.
  expected = {"zero 1"};
  expected.insert(expected.end(), launches.begin(), launches.end());
  stream->together([&] {
    body();
    CHECK(fake_driver_notes() == expected);
  });
  CHECK(fake_driver_notes().empty());
}

TEST(kernels_that_cannot_be_compiled_stop_what_comes_after_them) {
  if (small_kernel().empty()) return;
  const CacheFolder folder;
  const auto stream = gpu_stream(0, nullptr, {});
  fake_driver_notes();
  std::string message;
  try {
    stream->together([&] {
      launch(*stream, {kCopy.header, "NoSuchKernel"}, 1, 0);
      launch(*stream, kCopy, 1, 0);
      stream->zero(stream.get(), 1);
    });
  } catch (const Error& error) {
    message = error.what();
  }
  CHECK(message.find("identifier \"NoSuchKernel\" is undefined") != std::string::npos);
  try {
    stream->together([&] {
      launch(*stream, {kCopy.header, "NoSuchKernel"}, 1, 0);
      throw InvalidArgument("says the launcher");
    });
  } catch (const InvalidArgument& error) {
    message = error.what();
  }
  CHECK_EQUAL(message, "says the launcher");
  CHECK(fake_driver_notes().empty());
  launch(*stream, kCopy, 1, 0);
  CHECK_EQUAL(fake_driver_notes().back(), "flash_dmattn_CopyRows 1 0");
}

TEST(threads_share_what_is_loaded) {
  if (small_kernel().empty()) return;
  const CacheFolder folder;
  fake_driver_notes();
  in_threads(8, [](int thread) {
    const auto stream = gpu_stream(0, nullptr, {});
    for (int i = 0; i < 50; ++i)
      stream->together([&] {
        launch(*stream, kZero, 1, thread);
        launch(*stream, kCopy, 1, thread);
      });
  });
  std::vector<std::string> notes = fake_driver_notes();
  std::erase_if(notes, [](const std::string& note) { return note.starts_with("load"); });
  CHECK_EQUAL(notes.size(), 800u);
  launch(*gpu_stream(0, nullptr, {}), kZero, 1, 0);
  CHECK_EQUAL(fake_driver_notes().size(), 1u);
}

TEST(missing_gpu_is_said) {
  CHECK(missing(1000) != "");
  bool thrown = false;
  try {
    gpu_stream(1000, nullptr, {});
  } catch (const Error& error) {
    thrown = true;
    CHECK_EQUAL(error.what(), missing(1000));
  }
  CHECK(thrown);
}

}  // namespace
}  // namespace flash_dmattn::cuda
