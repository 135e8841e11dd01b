// Compiled kernels on disk, each in a file named by its key. Any number of processes share the folder. A file that is
// not what was written is as good as none; a folder that cannot be written to costs one warning.
#pragma once
#include <optional>
#include <string>

namespace flash_dmattn::cuda {

std::optional<std::string> read_cached(const std::string& key);
void write_cached(const std::string& key, const std::string& image);

}  // namespace flash_dmattn::cuda
