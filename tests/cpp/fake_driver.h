// A CUDA driver with one GPU (compute capability 8.0) that only takes notes, for what is between a launcher and a GPU.
#pragma once
#include <string>
#include <vector>

/// What has been asked since the last call: "load <kernel>", "zero <bytes>", "<kernel> <grid> <first int of params>".
std::vector<std::string> fake_driver_notes();
