#include "cuda/jit/cubin.h"

#include <elf.h>

#include <algorithm>
#include <cstring>

namespace flash_dmattn::cuda {
namespace {

template <class T>
T read(std::string_view bytes, std::size_t offset) {
  T value;
  if (offset > bytes.size() || bytes.size() - offset < sizeof(T)) throw Error("A compiled kernel is cut off");
  std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return value;
}

std::string_view part(std::string_view bytes, std::size_t offset, std::size_t size) {
  if (offset > bytes.size() || bytes.size() - offset < size) throw Error("A compiled kernel is cut off");
  return bytes.substr(offset, size);
}

// .nv.info is a sequence of attributes: format and name, one byte each, then two bytes that are the value, or (format
// 4) the size of what follows: here the index of a function, and a number.
void read_attributes(std::string_view info, Resources& resources) {
  constexpr int kSized = 0x04, kFrameSize = 0x11, kMinStackSize = 0x12, kRegisters = 0x2f;
  for (std::size_t at = 0; at + 4 <= info.size();) {
    const int format = read<unsigned char>(info, at), name = read<unsigned char>(info, at + 1);
    const std::size_t size = format == kSized ? read<unsigned short>(info, at + 2) : 0;
    if (format == kSized && size == 8) {
      const int value = read<int>(info, at + 8);
      if (name == kRegisters) resources.registers = std::max(resources.registers, value);
      if (name == kFrameSize || name == kMinStackSize) resources.local_bytes = std::max(resources.local_bytes, value);
    }
    at += 4 + size;
  }
}

}  // namespace

Resources resources(std::string_view cubin) {
  const auto elf = read<Elf64_Ehdr>(cubin, 0);
  if (std::memcmp(elf.e_ident, ELFMAG, SELFMAG) != 0) throw Error("A compiled kernel is no cubin");
  const auto section = [&](int i) { return read<Elf64_Shdr>(cubin, elf.e_shoff + i * sizeof(Elf64_Shdr)); };
  const Elf64_Shdr names = section(elf.e_shstrndx);
  const std::string_view all_names = part(cubin, names.sh_offset, names.sh_size);
  Resources resources{};
  for (int i = 0; i < elf.e_shnum; ++i) {
    const Elf64_Shdr header = section(i);
    const std::string_view name = all_names.substr(std::min<std::size_t>(header.sh_name, all_names.size()));
    if (name.substr(0, name.find('\0')) == ".nv.info")
      read_attributes(part(cubin, header.sh_offset, header.sh_size), resources);
  }
  return resources;
}

}  // namespace flash_dmattn::cuda
