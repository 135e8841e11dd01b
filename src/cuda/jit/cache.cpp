#include "cuda/jit/cache.h"

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <mutex>
#include <system_error>
#include <utility>

#include "cuda/jit/hash.h"
#include "flash_dmattn/cuda_kernels.h"

namespace flash_dmattn::cuda {
namespace {

// A file is a header, "flash_dmattn kernel 1\n<key>\n<checksum of the image>\n<its length>\n", and the image. The key
// tells a file that was renamed; the length one that was cut or appended to; the checksum, all else.
std::string header(const std::string& key, const std::string& image) {
  return "flash_dmattn kernel 1\n" + key + "\n" + Hash().add(image).text() + "\n" + std::to_string(image.size()) + "\n";
}

std::filesystem::path file_of(const std::string& key) {
  return std::filesystem::path(cache_directory()) / (key + kCacheSuffix);
}

struct WarningHandler {
  std::mutex mutex;
  std::function<void(const std::string&)> handler;
};

WarningHandler& warning_handler() {
  static WarningHandler& handler = *new WarningHandler;
  return handler;
}

void warn_once(const std::string& reason) {
  static std::atomic_flag warned;
  if (warned.test_and_set()) return;
  const std::string text = "compiled CUDA kernels are not kept: " + reason +
                           ". Every process compiles them again; FLASH_DMATTN_CACHE_DIR can name another folder.";
  std::function<void(const std::string&)> handler;
  {
    const std::lock_guard lock(warning_handler().mutex);
    handler = warning_handler().handler;
  }
  if (handler)
    handler(text);
  else
    std::fprintf(stderr, "flash_dmattn: %s\n", text.c_str());
}

}  // namespace

void set_warning_handler(std::function<void(const std::string& text)> handler) {
  const std::lock_guard lock(warning_handler().mutex);
  warning_handler().handler = std::move(handler);
}

std::string cache_directory() {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::filesystem::path(value ? value : "");
  };
  if (const auto folder = variable("FLASH_DMATTN_CACHE_DIR"); !folder.empty()) return folder;
  if (const auto folder = variable("XDG_CACHE_HOME"); !folder.empty()) return folder / "flash_dmattn";
  if (const auto folder = variable("HOME"); !folder.empty()) return folder / ".cache" / "flash_dmattn";
  return "";
}

std::optional<std::string> read_cached(const std::string& key) {
  if (cache_directory().empty()) return std::nullopt;
  std::ifstream file(file_of(key), std::ios::binary);
  std::string content{std::istreambuf_iterator(file), {}};
  // The header is as long whatever the image, but for the digits of its length.
  std::size_t start = 0;
  for (int line = 0; line < 4; ++line) {
    start = content.find('\n', start);
    if (start == std::string::npos) return std::nullopt;
    ++start;
  }
  std::string image = content.substr(start);
  content.resize(start);
  if (content != header(key, image)) return std::nullopt;
  return image;
}

void write_cached(const std::string& key, const std::string& image) {
  static std::atomic<int> counter = 0;
  if (cache_directory().empty()) return warn_once("neither FLASH_DMATTN_CACHE_DIR nor HOME is set");
  const std::filesystem::path path = file_of(key);
  std::error_code error;
  std::filesystem::create_directories(path.parent_path(), error);
  if (error) return warn_once("cannot make the folder " + path.parent_path().string() + ": " + error.message());
  // Others see the file when it is complete: it is written under a name that nobody else uses, then renamed.
  const std::filesystem::path temporary =
      path.string() + "." + std::to_string(getpid()) + "." + std::to_string(counter++) + ".tmp";
  errno = 0;
  {
    std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
    file << header(key, image) << image;
    file.close();
    if (!file) error.assign(errno ? errno : EIO, std::generic_category());
  }
  if (!error) std::filesystem::rename(temporary, path, error);
  if (error) {
    const std::string reason = error.message();
    std::filesystem::remove(temporary, error);
    warn_once("cannot write to the folder " + path.parent_path().string() + ": " + reason);
  }
}

}  // namespace flash_dmattn::cuda
