#include <algorithm>

#include "core/check.h"
#include "cuda/launch/forward_sm90.h"
#include "cuda/launch/kernel_list.h"
#include "cuda/launch/options.h"
#include "cuda/launch/plan.h"
#include "cuda/launch/rows.h"
#include "cuda/launch/scores.h"
#include "cuda/launch/sizes.h"
#include "flash_dmattn/cuda.h"
#include "sm80/forward_params.cuh"

namespace flash_dmattn::cuda {
namespace {

Kernel kernel(const ForwardOptions& o) {
  return {"sm80/forward.cuh",
          "Forward<" +
              options_text("ForwardOptions", o.arch, o.head_dim, o.number, o.test, o.bias, o.softcap, o.rows, o.split) +
              ">"};
}

Kernel kernel(const CombineOptions& o) {
  return {"sm80/combine.cuh", "Combine<" + options_text("CombineOptions", o.arch, o.number) + ">"};
}

/// How many parts to cut every list into: as many as fill the GPU, of whole tiles of keys. It follows from sizes alone,
/// so that results do not depend on what a mask holds.
int split_count(i64 blocks, i64 key_tiles, i64 capacity) {
  if (4 * blocks > 3 * capacity) return 1;
  return static_cast<int>(std::clamp<i64>(std::min(capacity / blocks, key_tiles), 1, kMostSplits));
}

void launch(const Problem& problem, const Output& output, Stream& stream) {
  const int arch = stream.arch(), head_dim = static_cast<int>(padded_dim(problem.query.size[3]));
  const i64 group = problem.query.size[2] / problem.key.size[2];
  ForwardOptions options{.arch = arch,
                         .head_dim = head_dim,
                         .number = number_of(problem),
                         .test = test_of(problem),
                         .bias = bias_kind(problem),
                         .softcap = problem.softcap > 0,
                         .rows = forward_rows(arch, head_dim, problem.query.size[1] * group)};
  ForwardConfig config = forward_config(options);
  Shape shape = make_shape(problem, options.rows);
  shape.head_dim = head_dim;
  const MadePlan made = make_plan(problem, shape, Runs::short_first(shape.query_len, options.rows / shape.pack), stream,
                                  {.to_save = output.mask_bits});
  const i64 blocks = static_cast<i64>(made.plan.runs.count) * shape.units() * shape.batch;
  const i64 key_tiles = divide_up_wide(made.longest, config.scores.keys);
  const i64 wanted = split_count(blocks, key_tiles, static_cast<i64>(stream.multiprocessors()) * config.blocks);
  const i64 split_tiles = std::max<i64>(divide_up_wide(key_tiles, wanted), 1);
  const i64 splits = std::max<i64>(divide_up_wide(key_tiles, split_tiles), 1);
  options.split = splits > 1;

  const Rows out = aligned_output(output.out, stream);
  ForwardParams params{.scores = make_scores(problem, shape, made.plan, stream),
                       .value = key_rows("value", problem.value, stream),
                       .out = out,
                       .lse = row_numbers(output.lse),
                       .split_tiles = static_cast<int>(split_tiles)};
  if (options.split) {
    const i64 rows = static_cast<i64>(shape.batch) * shape.heads * shape.query_len;
    params.split_out = stream.allocate_array<float>(static_cast<std::size_t>(splits * rows * head_dim));
    params.split_sums = stream.allocate_array<PartialSum>(static_cast<std::size_t>(splits * rows));
    stream.launch(kernel(options), {static_cast<unsigned>(blocks), static_cast<unsigned>(splits)},
                  config.scores.threads(), config.shared_bytes, params);
    stream.launch(kernel(CombineOptions{arch, options.number}), {static_cast<unsigned>(rows)}, kCombineThreads,
                  CombineParams::kSharedBytes,
                  CombineParams{.shape = shape,
                                .out = out,
                                .lse = params.lse,
                                .splits = static_cast<int>(splits),
                                .split_out = params.split_out,
                                .split_sums = params.split_sums});
  } else {
    stream.launch(kernel(options), {static_cast<unsigned>(blocks)}, config.scores.threads(), config.shared_bytes,
                  params);
  }
  write_back(out, output.out, stream);
}

}  // namespace

void forward(const Problem& problem, const Output& output, Stream& stream) {
  check(problem);
  check(problem, output);
  if (output.mask_bits) check_mask_bits(*output.mask_bits, mask_bits_size(problem));
  if (problem.query.size[0] == 0 || problem.query.size[1] == 0) return;
  const auto launch_family = takes_hopper_forward(problem, stream) ? hopper_forward : launch;
  stream.together([&] { launch_family(problem, output, stream); });
}

void list_forward_kernels(const Selection& selection, std::vector<ListedKernel>& kernels) {
  for (const Number number : selection.dtypes) {
    const CombineOptions combine{selection.arch, number};
    kernels.push_back({kernel(combine), {combine.arch, static_cast<int>(combine.number)}});
    for (const int head_dim : selection.head_dims)
      for (const Test test : {Test::interval, Test::bits})
        for (const BiasKind bias : {BiasKind::none, BiasKind::per_key, BiasKind::full})
          for (const bool softcap : {false, true})
            for (const int rows : {16, 64, 128})
              for (const bool split : {false, true}) {
                const ForwardOptions o{selection.arch, head_dim, number, test, bias, softcap, rows, split};
                if (forward_rows(o.arch, head_dim, rows) == rows)
                  kernels.push_back({kernel(o),
                                     {o.arch, head_dim, static_cast<int>(number), static_cast<int>(test),
                                      static_cast<int>(bias), softcap, rows, split}});
              }
  }
}

}  // namespace flash_dmattn::cuda
