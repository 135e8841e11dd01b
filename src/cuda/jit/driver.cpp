#include "cuda/jit/driver.h"

#include <dlfcn.h>

#include "cuda/jit/symbol.h"
#include "flash_dmattn/cuda.h"

namespace flash_dmattn::cuda {
namespace {

Driver load() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  if (!library) throw Error(std::string("The CUDA driver is missing: ") + dlerror());
  Driver driver;
// Some functions have a newer form under the same name in the manual.
#define FLASH_DMATTN_LOAD(name, suffix) \
  driver.name = symbol<decltype(driver.name)>(library, #name suffix, "The CUDA driver")
  FLASH_DMATTN_LOAD(cuInit, "");
  FLASH_DMATTN_LOAD(cuDriverGetVersion, "");
  FLASH_DMATTN_LOAD(cuGetErrorName, "");
  FLASH_DMATTN_LOAD(cuGetErrorString, "");
  FLASH_DMATTN_LOAD(cuDeviceGetCount, "");
  FLASH_DMATTN_LOAD(cuDeviceGet, "");
  FLASH_DMATTN_LOAD(cuDeviceGetName, "");
  FLASH_DMATTN_LOAD(cuDeviceGetAttribute, "");
  FLASH_DMATTN_LOAD(cuDevicePrimaryCtxRetain, "");
  FLASH_DMATTN_LOAD(cuCtxGetCurrent, "");
  FLASH_DMATTN_LOAD(cuCtxPushCurrent, "_v2");
  FLASH_DMATTN_LOAD(cuCtxPopCurrent, "_v2");
  FLASH_DMATTN_LOAD(cuThreadExchangeStreamCaptureMode, "");
  FLASH_DMATTN_LOAD(cuModuleLoadData, "");
  FLASH_DMATTN_LOAD(cuModuleGetFunction, "");
  FLASH_DMATTN_LOAD(cuFuncSetAttribute, "");
  FLASH_DMATTN_LOAD(cuLaunchKernel, "");
  FLASH_DMATTN_LOAD(cuMemsetD8Async, "");
  FLASH_DMATTN_LOAD(cuTensorMapEncodeTiled, "");
#undef FLASH_DMATTN_LOAD
  driver.check(driver.cuInit(0), "The CUDA driver does not start");
  return driver;
}

}  // namespace

const Driver& Driver::get() {
  static const Driver driver = load();
  return driver;
}

void Driver::fail(CUresult result, const std::string& what) const {
  const char *name = nullptr, *text = nullptr;
  cuGetErrorName(result, &name);
  cuGetErrorString(result, &text);
  throw Error(what + ": " + (name ? name : "error " + std::to_string(result)) + (text ? ", " : "") +
              (text ? text : ""));
}

std::string Driver::version() const {
  int version = 0;
  cuDriverGetVersion(&version);
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace flash_dmattn::cuda
