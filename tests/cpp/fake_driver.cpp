// A CUDA driver with one GPU that only takes notes. The linker gives it the name of the real one, libcuda.so.1.
#include "fake_driver.h"

#include <cstring>
#include <mutex>
#include <set>
#include <utility>

using CUresult = int;

namespace {

std::mutex mutex;
std::vector<std::string> notes;

void note(const std::string& text) {
  const std::lock_guard lock(mutex);
  notes.push_back(text);
}

// What a CUfunction points to.
const char* keep(const std::string& name) {
  static auto& names = *new std::set<std::string>;
  const std::lock_guard lock(mutex);
  return names.insert(name).first->c_str();
}

}  // namespace

std::vector<std::string> fake_driver_notes() {
  const std::lock_guard lock(mutex);
  return std::exchange(notes, {});
}

extern "C" {

CUresult cuInit(unsigned) { return 0; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, 0; }
CUresult cuGetErrorName(CUresult, const char** name) { return *name = "CUDA_ERROR_FAKE", 0; }
CUresult cuGetErrorString(CUresult, const char** text) { return *text = "a fake", 0; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, 0; }
CUresult cuDeviceGet(int* device, int index) { return *device = index, 0; }
CUresult cuDeviceGetName(char* name, int size, int) { return std::strncpy(name, "Fake", size), 0; }
CUresult cuDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int kMajor = 75, kMinor = 76;
  return *value = attribute == kMajor ? 8 : attribute == kMinor ? 0 : 100000, 0;
}
CUresult cuDevicePrimaryCtxRetain(void** context, int) { return *context = &notes, 0; }
CUresult cuCtxGetCurrent(void** context) { return *context = nullptr, 0; }
CUresult cuCtxPushCurrent_v2(void*) { return 0; }
CUresult cuCtxPopCurrent_v2(void**) { return 0; }
CUresult cuThreadExchangeStreamCaptureMode(int*) { return 0; }
CUresult cuModuleLoadData(const void** module, const void* image) { return *module = image, 0; }
CUresult cuModuleGetFunction(const char** function, const void*, const char* name) {
  return *function = keep(name), note("load " + std::string(name)), 0;
}
CUresult cuFuncSetAttribute(const char*, int, int) { return 0; }
CUresult cuLaunchKernel(const char* function, unsigned grid, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        void*, void** params, void**) {
  int first;
  std::memcpy(&first, params[0], sizeof first);
  return note(std::string(function) + " " + std::to_string(grid) + " " + std::to_string(first)), 0;
}
CUresult cuMemsetD8Async(unsigned long long, unsigned char, std::size_t bytes, void*) {
  return note("zero " + std::to_string(bytes)), 0;
}
CUresult cuTensorMapEncodeTiled(void* map, int, unsigned, void*, const void*, const void*, const unsigned*,
                                const unsigned*, int, int, int, int) {
  return std::memset(map, 0, 128), 0;
}

// NVRTC asks for it.
CUresult cuGetExportTable(const void**, const void*) {
  constexpr int kNotSupported = 801;
  return kNotSupported;
}

}  // extern "C"
