#include "family.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "flash_dmattn/attention.h"

namespace flash_dmattn::cuda {
namespace {

Family from_environment() {
  const char* const value = std::getenv("FLASH_DMATTN_CUDA_FAMILY");
  const std::string name = value ? value : "";
  if (name.empty() || name == "automatic") return Family::automatic;
  if (name == "generic") return Family::generic;
  if (name == "hopper") return Family::hopper;
  throw InvalidArgument("FLASH_DMATTN_CUDA_FAMILY: is \"" + name + "\", takes automatic, generic or hopper");
}

std::atomic<Family>& chosen() {
  static std::atomic<Family> family = from_environment();
  return family;
}

}  // namespace

Family family() { return chosen().load(std::memory_order_relaxed); }
void set_family(Family family) { chosen() = family; }

}  // namespace flash_dmattn::cuda
