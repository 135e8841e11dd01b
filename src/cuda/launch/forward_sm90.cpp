#include "forward_sm90.h"

#include <algorithm>
#include <string>

#include "cuda/launch/family.h"
#include "cuda/launch/kernel_list.h"
#include "cuda/launch/options.h"
#include "cuda/launch/plan.h"
#include "cuda/launch/rows.h"
#include "cuda/launch/scores.h"
#include "sm90/forward_params.cuh"

namespace flash_dmattn::cuda {
namespace {

Kernel kernel(const HopperForwardOptions& o) {
  return {
      "sm90/forward.cuh",
      "HopperForward<" + options_text("HopperForwardOptions", o.head_dim, o.number, o.test, o.bias, o.softcap) + ">"};
}

HopperForwardOptions options_of(const Problem& problem) {
  return {.head_dim = static_cast<int>(padded_dim(problem.query.size[3])),
          .number = number_of(problem),
          .test = test_of(problem),
          .bias = bias_kind(problem),
          .softcap = problem.softcap > 0};
}

/// Tiles of rows.
i64 count_works(const Shape& shape, const HopperForwardConfig& config) {
  return divide_up_wide(shape.query_len, config.rows / shape.pack) * shape.units() * shape.batch;
}

/// The generic kernels are faster where tiles of rows would be half empty (they have smaller ones), and where there are
/// few for each multiprocessor (they cut lists into parts).
constexpr double kFullTile = 0.5, kFewWorks = 0.6;

}  // namespace

bool takes_hopper_forward(const Problem& problem, const Stream& stream) {
  // Rows change sign in the generic kernels alone.
  if (stream.arch() != 90 || problem.scale < 0 || family() == Family::generic) return false;
  if (family() == Family::hopper) return true;
  const HopperForwardConfig config = hopper_forward_config(options_of(problem));
  const Shape shape = make_shape(problem, config.rows);
  return static_cast<double>(shape.query_len) * shape.pack >= kFullTile * config.rows &&
         static_cast<double>(count_works(shape, config)) >= kFewWorks * stream.multiprocessors();
}

void hopper_forward(const Problem& problem, const Output& output, Stream& stream) {
  const HopperForwardOptions options = options_of(problem);
  const HopperForwardConfig config = hopper_forward_config(options);
  Shape shape = make_shape(problem, config.rows);
  shape.head_dim = options.head_dim;
  const MadePlan made = make_plan(problem, shape, Runs::short_first(shape.query_len, config.rows / shape.pack), stream,
                                  {.to_save = output.mask_bits});
  const i64 works = count_works(shape, config);
  if (works > kLargest)
    throw InvalidArgument("query: is " + std::to_string(works) + " tiles of rows, takes at most 2147483647 on a GPU");
  const Rows out = aligned_output(output.out, stream);
  const ScoresParams scores = make_scores(problem, shape, made.plan, stream);
  const int query_parts = 64 % shape.pack == 0 ? config.consumers() : 1;
  const Rows value = key_rows("value", problem.value, stream);
  HopperForwardParams params{.scores = scores,
                             .value = value,
                             .out = out,
                             .lse = row_numbers(output.lse),
                             .works = static_cast<u32>(works),
                             .units = shape.units(),
                             .units_per_kv_head = shape.units() / shape.kv_heads,
                             .inverse_pack = static_cast<u32>((1 << 16) / shape.pack + 1),
                             .query_parts = query_parts,
                             .part_positions = made.plan.runs.length / query_parts,
                             .by_boxes = !made.plan.positions && shape.key_len > 0 &&
                                         has_boxes(scores.key, problem.key) && has_boxes(value, problem.value),
                             .query_boxes = {},
                             .key_boxes = {},
                             .value_boxes = {}};
  const auto boxes = [&](const Rows& rows, const View<4>& view, int positions, int heads) {
    return stream.tensor_map(boxes_of(rows, view, positions, heads));
  };
  params.query_boxes =
      boxes(boxed_input(scores.query, problem.query, stream), problem.query, params.part_positions, shape.pack);
  if (params.by_boxes) {
    params.key_boxes = boxes(scores.key, problem.key, config.keys, 1);
    params.value_boxes = boxes(value, problem.value, config.keys, 1);
  }
  stream.launch(kernel(options), {static_cast<unsigned>(std::min<i64>(works, stream.multiprocessors()))},
                config.threads(), config.shared_bytes, params);
  write_back(out, output.out, stream);
}

void list_hopper_forward_kernels(const Selection& selection, std::vector<ListedKernel>& kernels) {
  if (selection.arch != 90) return;
  for (const Number number : selection.dtypes)
    for (const int head_dim : selection.head_dims)
      for (const Test test : {Test::interval, Test::bits})
        for (const BiasKind bias : {BiasKind::none, BiasKind::per_key, BiasKind::full})
          for (const bool softcap : {false, true})
            kernels.push_back(
                {kernel(HopperForwardOptions{head_dim, number, test, bias, softcap}),
                 {head_dim, static_cast<int>(number), static_cast<int>(test), static_cast<int>(bias), softcap}});
}

}  // namespace flash_dmattn::cuda
