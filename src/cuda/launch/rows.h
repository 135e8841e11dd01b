// Rows that kernels load and store 16 bytes at a time, whatever the layout of the caller's tensors.
#pragma once
#include <vector>

#include "flash_dmattn/cuda.h"
#include "kernel_list.h"
#include "problem.cuh"
#include "sizes.h"
#include "tensor_map.cuh"

namespace flash_dmattn::cuda {

/// Elements of a row as kernels see it: the head dim, padded with zeros.
constexpr std::int64_t padded_dim(std::int64_t head_dim) { return round_up_wide(head_dim, 8); }

/// A tensor of 16-bit numbers (B, N, H, D): itself where rows of padded_dim(D) start at multiples of 16 bytes, else a
/// copy in memory of `stream`.
Rows aligned_input(const View<4>& view, Stream& stream);

/// The same for what the copy engine reads; `aligned`: where aligned_input has found or put it.
Rows boxed_input(const View<4>& view, Stream& stream);
Rows boxed_input(const Rows& aligned, const View<4>& view, Stream& stream);
/// Whether the copy engine takes the strides: none is 0 or below.
bool has_boxes(const Rows& rows, const View<4>& view);
TensorBoxes boxes_of(const Rows& rows, const View<4>& view, int positions, int heads);

/// Where a kernel writes what is meant for `view`: the view itself, or memory of `stream`.
Rows aligned_output(const View<4>& view, Stream& stream);
/// Brings to `view` what was written to its aligned_output.
void write_back(const Rows& rows, const View<4>& view, Stream& stream);

void list_rows_kernels(const Selection& selection, std::vector<ListedKernel>& kernels);

}  // namespace flash_dmattn::cuda
