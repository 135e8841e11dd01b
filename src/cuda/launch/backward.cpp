#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "attention/backward_rows_params.cuh"
#include "core/check.h"
#include "core/shape.h"
#include "cuda/launch/family.h"
#include "cuda/launch/kernel_list.h"
#include "cuda/launch/options.h"
#include "cuda/launch/plan.h"
#include "cuda/launch/rows.h"
#include "cuda/launch/scores.h"
#include "cuda/launch/sizes.h"
#include "flash_dmattn/cuda.h"

namespace flash_dmattn::cuda {
namespace {

constexpr const char* kRowsHeader = "attention/backward_rows.cuh";

Kernel kernel(const BackwardOptions& o, bool is_hopper) {
  return {
      is_hopper ? "sm90/backward.cuh" : "sm80/backward.cuh",
      (is_hopper ? "HopperBackward<" : "Backward<") +
          options_text("BackwardOptions", o.arch, o.head_dim, o.number, o.test, o.bias, o.softcap, o.deterministic) +
          ">"};
}
Kernel kernel(const GradientOptions& o) {
  return {kRowsHeader,
          "WriteGradients<" + options_text("GradientOptions", o.arch, o.head_dim, o.number, o.hopper_rows) + ">"};
}
Kernel rows_kernel(const char* name, Number number) {
  return {kRowsHeader, std::string(name) + "<" + text(number) + ">"};
}

unsigned blocks_of(i64 threads) { return static_cast<unsigned>(divide_up_wide(threads, kRowThreads)); }

/// Lists whose tiles of keys are worked at together: as few as their rows and sums of dQ stay in the L2 cache, and
/// deterministic, where tiles of a list wait for each other, more.
constexpr int kGroup = 8, kGroupInOrder = 16;

/// What the pass has to know of a gradient of the bias; its sizes are the bias's own, expanded or not.
struct BiasPass {
  BiasKind kind;
  std::optional<View<4>> gradient;  ///< to sum; none where it is the same for all keys, which takes no pass
  bool per_query_head;              ///< it has values of its own for heads that could share a tile
  bool is_shared;                   ///< several (batch, head)s add to one element of a full bias

  BiasPass(const Problem& problem, const InputGradient& input_gradient) : kind(bias_kind(problem)) {
    if (input_gradient.bias && input_gradient.bias->size[3] > 1) gradient = input_gradient.bias;
    if (gradient && gradient->size[2] > 1) kind = BiasKind::full;
    const std::int64_t batch = problem.query.size[0], heads = problem.query.size[2];
    per_query_head = gradient && kind == BiasKind::per_key && gradient->size[1] == heads;
    is_shared = gradient && kind == BiasKind::full && (gradient->size[0] < batch || gradient->size[1] < heads);
  }
};

class Pass {
 public:
  Pass(const Problem& problem, const Output& output, const OutputGradient& output_gradient,
       const InputGradient& input_gradient, bool deterministic, Stream& stream)
      : problem_(problem),
        output_(output),
        output_gradient_(output_gradient),
        input_gradient_(input_gradient),
        bias_(problem, input_gradient),
        stream_(stream),
        options_{.arch = stream.arch(),
                 .head_dim = static_cast<int>(padded_dim(problem.query.size[3])),
                 .number = number_of(problem),
                 .test = test_of(problem),
                 .bias = bias_.kind,
                 .softcap = problem.softcap > 0,
                 .deterministic = deterministic},
        is_hopper_(takes_hopper()),
        blocks_(is_hopper_ ? hopper_backward_config(options_).blocks()
                           : backward_config(options_.arch, options_.head_dim, options_.bias).blocks()),
        shape_(make_shape(problem, blocks_.tiles.rows)) {
    if (bias_.per_query_head || (deterministic && bias_.is_shared)) shape_.pack = 1;
    shape_.head_dim = options_.head_dim;
    tile_positions_ = positions_of_tile(blocks_.tiles.rows, shape_.pack);
    const int tiles_of_run = choose_tiles_of_run();
    run_ = tiles_of_run * tile_positions_;
    tiles_ = divide_up(shape_.query_len, run_) * tiles_of_run;
    row_tiles_ = static_cast<i64>(shape_.batch) * shape_.units() * tiles_;
  }

  void run() {
    grad_key_out_ = aligned_output(input_gradient_.key, stream_);
    grad_value_out_ = aligned_output(input_gradient_.value, stream_);
    if (row_tiles_ > 0 && shape_.key_len > 0) {
      const MadePlan made =
          make_plan(problem_, shape_, Runs::short_last(shape_.query_len, run_), stream_, {.saved = output_.mask_bits});
      plan_ = made.plan;
      key_tiles_have_one_block_ = !made.plan.lists && made.plan.runs.count == 1 && shape_.units() == shape_.kv_heads;
      allocate_sums();
      read_rows();
      add_up(made);
    } else {
      allocate_sums();
      stream_.zero(sums_.data, static_cast<std::size_t>(sums_.all) * sizeof(float));
    }
    write_gradients();
  }

 private:
  /// Long runs load and add up what belongs to a tile of keys seldom; but they list more keys than their positions see
  /// at a time, and there must be work for all multiprocessors.
  int choose_tiles_of_run() const {
    const i64 units = static_cast<i64>(shape_.batch) * shape_.units();
    const i64 window = problem_.survivors ? problem_.survivors->size[3] : kLargest;
    const i64 longest = options_.test == Test::bits ? (is_hopper_ ? kMostBits : kShortRun)
                        : problem_.survivors        ? std::clamp<i64>(window, kShortRun, kLongRun)
                                                    : kLargest;
    const int all = std::max(divide_up(shape_.query_len, tile_positions_), 1);
    const int least_tiles = std::max(1, kRunRows / blocks_.tiles.rows);
    const i64 most_tiles = std::max<i64>(least_tiles, longest / tile_positions_);
    int tiles = static_cast<int>(std::min<i64>(std::min(kMostRowTiles, all), most_tiles));
    const auto leaves_little_work = [&] {
      const i64 run = static_cast<i64>(tiles) * tile_positions_, runs = divide_up_wide(shape_.query_len, run);
      const i64 keys = std::min<i64>(shape_.key_len, window + run);
      return units * runs * divide_up_wide(keys, blocks_.tiles.keys) < kRounds * stream_.multiprocessors();
    };
    while (tiles > least_tiles && leaves_little_work()) --tiles;
    return divide_up(all, divide_up(all, tiles));  // as many in each run
  }
  static constexpr int kRunRows = 1024, kShortRun = 512, kLongRun = 2048;  // the last two in positions
  static constexpr int kRounds = 8;                                        // of blocks on a multiprocessor

  /// With full biases, whose reading and writing takes most of the time, the generic kernels are as fast or faster.
  bool takes_hopper() const {
    if (options_.arch != 90 || family() == Family::generic) return false;
    return family() == Family::hopper || options_.bias != BiasKind::full || options_.head_dim > 128;
  }

  void allocate_sums() {
    const i64 query = row_tiles_ * blocks_.query_tile.size();
    const i64 key_rows =
        key_tiles_have_one_block_ ? 0 : static_cast<i64>(shape_.batch) * shape_.key_len * shape_.kv_heads;
    i64 bias = 0;
    if (bias_.gradient) {
      const View<4>& gradient = *bias_.gradient;
      if (bias_.kind == BiasKind::per_key)
        bias = static_cast<i64>(shape_.batch) * shape_.units() * shape_.key_len;
      else if (!is_contiguous(gradient) || (gradient.dtype != DType::float32 && bias_.is_shared))
        bias = product(gradient.size);
    }
    sums_ = {.data = nullptr,
             .query = query,
             .key_rows = key_rows,
             .padded_dim = blocks_.tiles.dim,
             .all = round_up_wide(query + 2 * key_rows * blocks_.tiles.dim + bias, 4)};
    sums_.data = stream_.allocate_array<float>(static_cast<std::size_t>(sums_.all));
    bias_sums_ = sums_.grad_bias();
    if (bias_.gradient && bias_.kind == BiasKind::full && bias == 0) {
      const View<4>& gradient = *bias_.gradient;
      bias_sums_ = gradient.dtype == DType::float32 ? static_cast<float*>(gradient.data) : nullptr;
      bias_numbers_ = bias_sums_ ? nullptr : static_cast<u16*>(gradient.data);
      stream_.zero(gradient.data, static_cast<std::size_t>(product(gradient.size)) * size_of(gradient.dtype));
    }
  }

  void read_rows() {
    const i64 rows = row_tiles_ * blocks_.tiles.rows;
    lse_ = stream_.allocate_array<float>(static_cast<std::size_t>(2 * rows));
    delta_ = lse_ + rows;
    const auto of_block = [&](i64 count) { return static_cast<int>(divide_up_wide(count, row_tiles_)); };
    const i64 bias_sums = sums_.data + sums_.all - sums_.grad_bias();
    grad_out_ = is_hopper_ ? boxed_input(output_gradient_.out, stream_) : aligned_input(output_gradient_.out, stream_);
    stream_.launch(rows_kernel("BackwardRows", options_.number), {static_cast<unsigned>(row_tiles_)}, kRowThreads, 0,
                   BackwardRowsParams{.shape = shape_,
                                      .plan = plan_,
                                      .sums = sums_,
                                      .zeros = {.query = of_block(sums_.query / 4),
                                                .bias = of_block(bias_sums / 4),
                                                .key_rows = of_block(sums_.key_rows)},
                                      .tile_rows = blocks_.tiles.rows,
                                      .tile_positions = tile_positions_,
                                      .tiles = tiles_,
                                      .out = aligned_input(output_.out, stream_),
                                      .grad_out = grad_out_,
                                      .lse = row_numbers(output_.lse),
                                      .grad_lse = grad_lse(),
                                      .base_2_lse = lse_,
                                      .delta = delta_});
  }
  RowNumbers grad_lse() const { return output_gradient_.lse ? row_numbers(*output_gradient_.lse) : RowNumbers{}; }

  void add_up(const MadePlan& made) {
    const ScoresParams scores = make_scores(problem_, shape_, made.plan, stream_);
    BackwardParams params{};
    params.shape = shape_;
    params.plan = made.plan;
    params.query = scores.query;
    params.key = scores.key;
    params.value = aligned_input(problem_.value, stream_);
    params.grad_out = grad_out_;
    params.lse = lse_;
    params.delta = delta_;
    params.bias = scores.bias;
    params.logits = scores.logits;
    params.factor = scores.logits.factor * static_cast<float>(scores.logits.sign);
    params.grad_query = sums_.data;
    params.grad_key = sums_.grad_key();
    params.grad_value = sums_.grad_value();
    if (key_tiles_have_one_block_) {
      params.key_out = grad_key_out_;
      params.value_out = grad_value_out_;
      params.scale = static_cast<float>(problem_.scale);
    }
    if (bias_.gradient && bias_.kind == BiasKind::per_key) params.grad_key_bias = bias_sums_;
    if (bias_.gradient && bias_.kind == BiasKind::full) {
      const auto& size = bias_.gradient->size;
      params.grad_bias = {.sums = bias_sums_,
                          .numbers = bias_numbers_,
                          .batch = size[0] > 1 ? size[1] * size[2] * size[3] : 0,
                          .head = size[1] > 1 ? size[2] * size[3] : 0,
                          .query = size[2] > 1 ? size[3] : 0,
                          .key = 1,
                          .heads_per_head = static_cast<int>(shape_.heads / size[1])};
    }
    params.key_tiles = static_cast<int>(divide_up_wide(made.longest, blocks_.tiles.keys));
    params.tile_positions = tile_positions_;
    params.inverse_pack = static_cast<u32>((1 << 16) / shape_.pack + 1);

    // Deterministic: what adds to the same element of a full bias's gradient comes one after the other.
    const bool in_order = options_.deterministic && bias_.is_shared;
    const int batches = in_order && bias_.gradient->size[0] < shape_.batch ? 1 : shape_.batch;
    const int step = in_order ? params.grad_bias.heads_per_head : 1;
    for (int batch = 0; batch < shape_.batch; batch += batches)
      for (int unit = 0; unit < step; ++unit) {
        params.part = {.first_batch = batch,
                       .batches = Divisor::of(batches),
                       .first_unit = unit,
                       .units = Divisor::of(shape_.units() / step),
                       .unit_step = step};
        launch(params);
      }
  }

  void launch(BackwardParams& params) {
    const i64 lists_of_run = static_cast<i64>(params.part.batches.value) * params.part.units.value;
    const i64 lists = lists_of_run * params.plan.runs.count;
    // Deterministic: lists of a KV head, whose keys may be the same, are in different groups.
    const bool in_turn = options_.deterministic && params.plan.lists;
    const int group = !in_turn                            ? (options_.deterministic ? kGroupInOrder : kGroup)
                      : shape_.units() == shape_.kv_heads ? static_cast<int>(lists_of_run)
                                                          : 1;
    params.group = Divisor::of(group);
    params.group_blocks = Divisor::of(group * params.key_tiles);
    if (options_.deterministic) {
      const i64 key_turns =
          static_cast<i64>(shape_.batch) * shape_.kv_heads * (params.plan.lists ? 1 : params.key_tiles);
      const std::size_t count = static_cast<std::size_t>(1 + row_tiles_ + key_turns);
      params.ticket = stream_.allocate_array<int>(count);
      params.query_turn = params.ticket + 1;
      params.key_turn = params.query_turn + row_tiles_;
      stream_.zero(params.ticket, count * sizeof(int));
    }
    const Grid grid{static_cast<unsigned>(divide_up_wide(lists, group) * group * params.key_tiles)};
    const auto launch_with = [&](const auto& all) {
      stream_.launch(kernel(options_, is_hopper_), grid, blocks_.threads, blocks_.shared_bytes, all);
    };
    if (!is_hopper_) return launch_with(params);
    const auto boxes = [&](const Rows& rows, const View<4>& view) {
      return stream_.tensor_map(boxes_of(rows, view, tile_positions_, shape_.pack));
    };
    launch_with(HopperBackwardParams{params, boxes(boxed_input(params.query, problem_.query, stream_), problem_.query),
                                     boxes(grad_out_, output_gradient_.out)});
  }

  void write_gradients() {
    const GradientOptions options{options_.arch, options_.head_dim, options_.number,
                                  is_hopper_ ? blocks_.tiles.rows : 0};
    const float scale = static_cast<float>(problem_.scale);
    const Rows query = aligned_output(input_gradient_.query, stream_);
    const i64 key_rows = sums_.key_rows, bias_elements = has_bias_sums() ? product(input_gradient_.bias->size) : 0;
    GradientsParams params{
        .query = {.shape = shape_,
                  .tile_positions = tile_positions_,
                  .tiles = tiles_,
                  .sums = sums_.data,
                  .out = query,
                  .scale = scale},
        .keys = {.shape = shape_,
                 .plan = plan_,
                 .sums = sums_,
                 .key_out = grad_key_out_,
                 .value_out = grad_value_out_,
                 .scale = scale},
        .bias = has_bias_sums() ? summed_bias(*input_gradient_.bias) : BiasGradientParams{},
        .query_blocks = static_cast<int>(row_tiles_),
        .key_blocks = static_cast<int>(blocks_of(key_rows * blocks_.tiles.dim / 16)),
    };
    stream_.launch(kernel(options),
                   {static_cast<unsigned>(params.query_blocks + params.key_blocks) + blocks_of(bias_elements)},
                   kRowThreads, query_gradient_shared_bytes(options), params);
    write_back(query, input_gradient_.query, stream_);
    write_back(grad_key_out_, input_gradient_.key, stream_);
    write_back(grad_value_out_, input_gradient_.value, stream_);
    if (input_gradient_.bias && !bias_.gradient) write_row_bias_gradient(*input_gradient_.bias);
  }

  /// Whether the bias's gradient is not summed, or written, where it belongs.
  bool has_bias_sums() const { return bias_.gradient && !bias_numbers_ && bias_sums_ != input_gradient_.bias->data; }

  BiasGradientParams summed_bias(const View<4>& out) const {
    BiasGradientParams params{};
    params.sums = bias_sums_;
    for (int i = 0; i < 4; ++i) {
      params.size[i] = static_cast<int>(out.size[static_cast<std::size_t>(i)]);
      params.stride[i] = out.stride[static_cast<std::size_t>(i)];
    }
    params.out = out.data;
    params.is_float32 = out.dtype == DType::float32;
    params.sums_key = 1;
    if (bias_.kind == BiasKind::per_key) {
      params.sums_head = out.size[3];
      params.sums_batch = shape_.units() * out.size[3];
      params.batches = out.size[0] > 0 ? shape_.batch / params.size[0] : 0;
      params.heads = shape_.units() / params.size[1];
    } else {
      params.sums_query = out.size[3];
      params.sums_head = out.size[2] * out.size[3];
      params.sums_batch = out.size[1] * params.sums_head;
      params.batches = params.heads = 1;
    }
    return params;
  }

  void write_row_bias_gradient(const View<4>& out) {
    const auto size = [&](int i) { return static_cast<int>(out.size[static_cast<std::size_t>(i)]); };
    stream_.launch(rows_kernel("WriteRowBiasGradient", options_.number), {static_cast<unsigned>(product(out.size))},
                   kRowThreads, kRowThreads / 32 * 4,
                   RowBiasGradientParams{.shape = shape_,
                                         .lse = row_numbers(output_.lse),
                                         .grad_lse = grad_lse(),
                                         .size = {size(0), size(1), size(2)},
                                         .out = out.data,
                                         .stride = {out.stride[0], out.stride[1], out.stride[2]},
                                         .is_float32 = out.dtype == DType::float32});
  }

  const Problem& problem_;
  const Output& output_;
  const OutputGradient& output_gradient_;
  const InputGradient& input_gradient_;
  const BiasPass bias_;
  Stream& stream_;
  const BackwardOptions options_;
  const bool is_hopper_;
  const BackwardBlocks blocks_;
  Shape shape_;
  int tile_positions_, run_;
  int tiles_;                    ///< of rows, of a unit: those of whole runs
  i64 row_tiles_;                ///< of all units
  u16* bias_numbers_ = nullptr;  ///< in place of sums
  Rows grad_key_out_{}, grad_value_out_{};
  bool key_tiles_have_one_block_ = false;  ///< which then has all of their dK and dV
  Plan plan_{};
  GradientSums sums_{};
  float* bias_sums_ = nullptr;
  float *lse_ = nullptr, *delta_ = nullptr;
  Rows grad_out_{};
};

}  // namespace

void backward(const Problem& problem, const Output& output, const OutputGradient& output_gradient,
              const InputGradient& input_gradient, bool deterministic, Stream& stream) {
  check(problem);
  check(problem, output);
  if (output.mask_bits) {
    // What keeps tensors between the passes may have copied a mask that was expanded.
    auto size = mask_bits_size(problem);
    for (std::size_t i = 0; i < 2; ++i)
      if (output.mask_bits->size[i] == 1) size[i] = std::min<std::int64_t>(size[i], 1);
    check_mask_bits(*output.mask_bits, size);
  }
  check(problem, output_gradient);
  check(problem, input_gradient);
  stream.together([&] { Pass(problem, output, output_gradient, input_gradient, deterministic, stream).run(); });
}

void list_backward_kernels(const Selection& selection, std::vector<ListedKernel>& kernels) {
  for (const Number number : selection.dtypes) {
    for (const char* name : {"BackwardRows", "WriteRowBiasGradient"})
      kernels.push_back({rows_kernel(name, number), {selection.arch, static_cast<int>(number)}});
    for (const int head_dim : selection.head_dims) {
      for (const int hopper_rows : {0, 64, 128})
        if (hopper_rows == 0 || (selection.arch == 90 && (hopper_rows == 64 || head_dim <= 64)))
          kernels.push_back({kernel(GradientOptions{selection.arch, head_dim, number, hopper_rows}),
                             {selection.arch, head_dim, static_cast<int>(number), hopper_rows}});
      for (const Test test : {Test::interval, Test::bits})
        for (const BiasKind bias : {BiasKind::none, BiasKind::per_key, BiasKind::full})
          for (const bool softcap : {false, true})
            for (const bool deterministic : {false, true})
              for (const bool is_hopper : {false, true}) {
                const BackwardOptions o{selection.arch, head_dim, number, test, bias, softcap, deterministic};
                if (is_hopper && o.arch != 90) continue;
                kernels.push_back({kernel(o, is_hopper),
                                   {o.arch, head_dim, static_cast<int>(number), static_cast<int>(test),
                                    static_cast<int>(bias), softcap, deterministic}});
              }
    }
  }
}

}  // namespace flash_dmattn::cuda
