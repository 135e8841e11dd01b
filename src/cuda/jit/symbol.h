// Functions of libraries that are loaded at run time.
#pragma once
#include <dlfcn.h>

#include <string>

#include "flash_dmattn/cuda.h"

namespace flash_dmattn::cuda {

template <class Function>
Function symbol(void* library, const char* name, const char* library_name) {
  void* address = dlsym(library, name);
  if (!address) throw Error(std::string(library_name) + " is too old: it has no " + name);
  return reinterpret_cast<Function>(address);
}

}  // namespace flash_dmattn::cuda
