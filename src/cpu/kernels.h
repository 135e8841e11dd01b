// What the scheduler asks of the kernels: the part of the work that one task does, whatever the instruction set.
//
// Plain data throughout: a kernel's translation unit is compiled for one instruction set, so it must share no inline
// code with any other.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/key_list.h"
#include "flash_dmattn/tensor.h"

namespace flash_dmattn::cpu {

/// Rows of head_dim numbers in the caller's memory: element (i, head) begins at data + i * row + head * head_step
/// (bytes).
struct Rows {
  char* data;
  std::int64_t row, head;
  DType dtype;
};

/// The bias (or its gradient) that a chunk sees: element (query, head of the chunk, key), steps in bytes.
struct Bias {
  char* data;  ///< null: none
  std::int64_t query, head, key;
  DType dtype;
  bool per_query, per_head;  ///< whether queries, heads of the chunk have values of their own
};

/// The queries of one chunk and the `pack` query heads that share its key list.
struct Chunk {
  std::int64_t queries, pack, head_dim;
  Rows query;       ///< (query of the chunk, head of the chunk)
  Rows key, value;  ///< (absolute position, 0)
  Bias bias;
  KeyList keys;
  double scale, softcap;
  const void* plan;  ///< for the two functions below
  std::int64_t batch, unit, first_query;
};

/// The absolute position of every query of the chunk (before all intervals where the query sees nothing).
void read_positions(const Chunk& chunk, std::int32_t* positions);
/// Keys [first, first + count) of the chunk's list, and the intervals [start, end) of positions that see them.
void read_intervals(const Chunk& chunk, std::int64_t first, std::int64_t count, std::int32_t* keys, std::int32_t* start,
                    std::int32_t* end);

/// Where a pass over a part of the keys leaves its result, in the kernel's type: for every row the sum of
/// exp2(logit - largest) * value, the largest logit, and the sum of exp2(logit - largest).
struct ForwardTask {
  Chunk chunk;
  std::int64_t first_key, last_key;  ///< of the chunk's list
  Rows out;                          ///< no data: write to `partial`
  char* lse;                         ///< (query, head), steps in bytes, the kernel's type
  std::int64_t lse_query, lse_head;
  void* partial;  ///< rows x (head_dim + 2)
};

struct BackwardTask {
  Chunk chunk;
  Rows out, grad_out, grad_query;
  const char* lse;  ///< (query, head), steps in bytes, the kernel's type
  std::int64_t lse_query, lse_head;
  const char* grad_lse;  ///< null: none; as lse
  std::int64_t grad_lse_query, grad_lse_head;
  Rows key_sum, value_sum;  ///< (absolute position, 0): sums over the chunks, in the kernel's type
  Bias bias_sum;            ///< the same for a bias: its gradient, in the kernel's type
};

struct ProbabilitiesTask {
  Chunk chunk;
  const char* lse;
  std::int64_t lse_query, lse_head;
  Bias probabilities;  ///< (query, head, absolute position)
};

/// The kernels for one dtype of query, key and value. Scratch memory is aligned to 64 bytes.
struct Kernels {
  DType sum;  ///< the kernel's own type
  std::size_t (*forward_scratch)(const Chunk& largest);
  void (*forward)(const ForwardTask&, void* scratch);
  /// Puts `count` partial results together, `stride` bytes apart.
  void (*combine)(const ForwardTask&, const void* partials, std::int64_t count, std::size_t stride);
  std::size_t (*backward_scratch)(const Chunk& largest);
  /// Writes the gradient of the queries; leaves the key sums of this chunk in `scratch`.
  void (*backward)(const BackwardTask&, void* scratch);
  /// Adds what `backward` left in `scratch` to key_sum, value_sum and, without per_query, to bias_sum.
  void (*add_key_sums)(const BackwardTask&, void* scratch);
  std::size_t (*probabilities_scratch)(const Chunk& largest);
  void (*probabilities)(const ProbabilitiesTask&, void* scratch);
  /// out[i] = in[i], from the kernel's own type to another.
  void (*convert)(const void* in, std::int64_t count, DType dtype, void* out);
};

/// One for each file in src/cpu/isa.
const Kernels& baseline_kernels(DType dtype);
const Kernels& avx2_kernels(DType dtype);
const Kernels& avx512_kernels(DType dtype);
const Kernels& avx512_bf16_kernels(DType dtype);
const Kernels& amx_kernels(DType dtype);

struct InstructionSet {
  const char* name;
  const Kernels& (*kernels)(DType dtype);
};

/// The one in use: the best that this build and this machine have, or what FLASH_DMATTN_CPU names.
const InstructionSet& instruction_set();

}  // namespace flash_dmattn::cpu
