// All kernels that the launchers can choose, for compiling them ahead of time and in tests.
#pragma once
#include <vector>

#include "flash_dmattn/cuda.h"
#include "types.cuh"

namespace flash_dmattn::cuda {

/// What to compile for.
struct Selection {
  int arch;                    ///< compute capability: 80, 90, 120, …
  std::vector<Number> dtypes;  ///< some of Number::float16, Number::bfloat16
  std::vector<int> head_dims;  ///< some of 8, 16, …, 256
};

struct ListedKernel {
  Kernel kernel;
  /// The values of its options, arch among them, bool and enum as int: as many, and in the same order, for all
  /// instances of one template. The covering subset is chosen from them.
  std::vector<int> options;
  int arch = 0;  ///< list_kernels fills it in
};

// Each appends what its launcher can choose for the selection; one stands beside each launcher.
void list_mask_kernels(const Selection& selection, std::vector<ListedKernel>& kernels);
void list_plan_kernels(const Selection& selection, std::vector<ListedKernel>& kernels);
void list_rows_kernels(const Selection& selection, std::vector<ListedKernel>& kernels);
void list_forward_kernels(const Selection& selection, std::vector<ListedKernel>& kernels);
void list_hopper_forward_kernels(const Selection& selection, std::vector<ListedKernel>& kernels);
void list_probabilities_kernels(const Selection& selection, std::vector<ListedKernel>& kernels);
void list_backward_kernels(const Selection& selection, std::vector<ListedKernel>& kernels);

/// All of them, each once.
std::vector<ListedKernel> list_kernels(const Selection& selection);

/// A small subset (of kernels for one arch or several) in which, for every template, each value of each option and each
/// pair of values of two options that `kernels` has is there. The same input gives the same output.
std::vector<ListedKernel> covering(const std::vector<ListedKernel>& kernels);

}  // namespace flash_dmattn::cuda
