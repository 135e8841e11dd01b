#include "flash_dmattn/cuda.h"

namespace flash_dmattn::cuda {

std::unique_ptr<Stream> gpu_stream(int, void*, std::function<void*(std::size_t bytes)>) { throw Error("not yet"); }

}  // namespace flash_dmattn::cuda
