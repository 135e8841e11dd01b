#include "core/check.h"
#include "cuda/launch/kernel_list.h"
#include "cuda/launch/options.h"
#include "cuda/launch/plan.h"
#include "cuda/launch/rows.h"
#include "cuda/launch/scores.h"
#include "cuda/launch/sizes.h"
#include "flash_dmattn/cuda.h"
#include "sm80/probabilities_params.cuh"

namespace flash_dmattn::cuda {
namespace {

Kernel kernel(const ProbabilitiesOptions& o) {
  return {"sm80/probabilities.cuh",
          "Probabilities<" +
              options_text("ProbabilitiesOptions", o.arch, o.head_dim, o.number, o.test, o.bias, o.softcap) + ">"};
}
const Kernel kZeroMatrix{"sm80/probabilities.cuh", "ZeroMatrix"};

void zero(const View<4>& view, Stream& stream) {
  const auto [batch, heads, queries, keys] = view.size;
  const std::int64_t rows = batch * heads * queries;
  if (view.stride == std::array<std::int64_t, 4>{heads * queries * keys, queries * keys, keys, 1})
    stream.zero(view.data, static_cast<std::size_t>(rows * keys) * 2);
  else
    stream.launch(kZeroMatrix, {static_cast<unsigned>(rows)}, kZeroThreads, 0,
                  ZeroMatrixParams{.to = {view.data, view.stride[0], view.stride[1], view.stride[2], view.stride[3]},
                                   .heads = static_cast<int>(heads),
                                   .queries = static_cast<int>(queries),
                                   .keys = keys});
}

void launch(const Problem& problem, const View<3>& lse, const View<4>& probs, Stream& stream) {
  const ProbabilitiesOptions options{.arch = stream.arch(),
                                     .head_dim = static_cast<int>(padded_dim(problem.query.size[3])),
                                     .number = number_of(problem),
                                     .test = test_of(problem),
                                     .bias = bias_kind(problem),
                                     .softcap = problem.softcap > 0};
  zero(probs, stream);
  const ScoresConfig config = probabilities_config(options);
  Shape shape = make_shape(problem, config.rows);
  shape.head_dim = options.head_dim;
  const MadePlan made = make_plan(problem, shape, Runs::short_first(shape.query_len, config.rows / shape.pack), stream);
  const std::int64_t blocks = std::int64_t{made.plan.runs.count} * shape.units() * shape.batch,
                     keys_of_block = std::int64_t{kProbabilitiesTiles} * config.keys;
  stream.launch(
      kernel(options),
      {static_cast<unsigned>(blocks), static_cast<unsigned>(divide_up_wide(made.longest, keys_of_block))},
      config.threads(), probabilities_shared_bytes(config),
      ProbabilitiesParams{.scores = make_scores(problem, shape, made.plan, stream),
                          .lse = row_numbers(lse),
                          .probs = {probs.data, probs.stride[0], probs.stride[1], probs.stride[2], probs.stride[3]}});
}

}  // namespace

void probabilities(const Problem& problem, const View<3>& lse, const View<4>& probs, Stream& stream) {
  check(problem);
  check_probabilities(problem, lse, probs);
  for (const std::int64_t size : probs.size)
    if (size == 0) return;
  stream.together([&] { launch(problem, lse, probs, stream); });
}

void list_probabilities_kernels(const Selection& selection, std::vector<ListedKernel>& kernels) {
  kernels.push_back({kZeroMatrix, {}});
  for (const Number number : selection.dtypes)
    for (const int head_dim : selection.head_dims)
      for (const Test test : {Test::interval, Test::bits})
        for (const BiasKind bias : {BiasKind::none, BiasKind::per_key, BiasKind::full})
          for (const bool softcap : {false, true}) {
            const ProbabilitiesOptions o{selection.arch, head_dim, number, test, bias, softcap};
            kernels.push_back({kernel(o),
                               {o.arch, head_dim, static_cast<int>(number), static_cast<int>(test),
                                static_cast<int>(bias), softcap}});
          }
}

}  // namespace flash_dmattn::cuda
