#include "plan.h"

#include <algorithm>
#include <array>
#include <sstream>

#include "core/shape.h"
#include "layout/repeat_params.cuh"
#include "mask/plan_params.cuh"
#include "rows.h"
#include "sizes.h"

namespace flash_dmattn::cuda {
namespace {

/// Whether query heads of one KV head have values of their own in a mask, end or bias.
template <int Rank>
bool is_per_query_head(const std::optional<View<Rank>>& view, const flash_dmattn::Shape& s) {
  return view && s.heads != s.kv_heads && without_expand(*view).size[1] == s.heads;
}

/// What the mask is, once an expand is undone: at most one of a value for each key, for each query, for each pair.
struct Masks {
  std::optional<View<4>> columns, rows, dense;

  explicit Masks(const Problem& problem) {
    if (!problem.mask) return;
    const View<4> mask = without_expand(*problem.mask);
    (mask.size[2] == 1 ? columns : mask.size[3] == 1 ? rows : dense) = mask;
  }
};

const Kernel kSurvivorLists{"mask/plan_survivors.cuh", "SurvivorLists"};
const Kernel kColumnLists{"mask/plan_columns.cuh", "ColumnLists"};
const Kernel kPackMask{"mask/plan_bits.cuh", "PackMask"}, kPackSavedMask{"mask/plan_bits.cuh", "PackSavedMask"},
    kBitLists{"mask/plan_bits.cuh", "BitLists"};
const Kernel kRepeatEnd{"layout/repeat.cuh", "Repeat<int>"}, kRepeatRows{"layout/repeat.cuh", "Repeat<unsigned char>"};

/// Readers may run past the end of a list, to the end of a tile.
constexpr std::int64_t kSlack = 128;

/// Memory for what is read of a mask, but not yet in its lists: a part of the mask's. Many lists at a time leave few
/// multiprocessors idle at their end.
std::int64_t segment_memory(std::int64_t mask_bytes) {
  constexpr std::int64_t mebibyte = 1 << 20;
  return std::clamp(mask_bytes / 4, 16 * mebibyte, 512 * mebibyte);
}

Grid grid_of(std::int64_t blocks) { return {static_cast<unsigned>(blocks)}; }

/// A plan in the making.
class Planner {
 public:
  Planner(const Problem& problem, const Shape& shape, const Runs& runs, Stream& stream, const MaskBits& mask_bits)
      : sizes_(problem), masks_(problem), mask_bits_(mask_bits), shape_(shape), stream_(stream) {
    if (problem.end) end_ = without_expand(*problem.end);
    if (problem.survivors) survivors_ = without_expand(*problem.survivors);
    plan_.runs = runs;
    plan_.is_causal = problem.is_causal;
    longest_ = shape.key_len;
  }

  MadePlan make() {
    if (shape_.batch > 0 && shape_.query_len > 0 && shape_.key_len > 0) {
      if (masks_.rows) {
        const View<4>& rows = *masks_.rows;
        const auto each = per_unit<unsigned char>(rows, rows.stride[2], shape_.query_len, kRepeatRows);
        plan_.visible_rows = each.from;
        plan_.rows_batch = each.batch;
        plan_.rows_unit = each.head;
        plan_.rows_query = each.element;
      }
      if (end_ && !masks_.dense) {
        const auto each = per_unit<int>(*end_, end_->stride[2], shape_.key_len, kRepeatEnd);
        plan_.end = each.from;
        plan_.end_batch = each.batch;
        plan_.end_unit = each.head;
        plan_.end_key = each.element;
      }
      if (masks_.dense)
        list_bits();
      else if (has_survivors())
        list_survivors();
      else if (masks_.columns || end_)
        list_columns();
    }
    return {plan_, longest_};
  }

 private:
  /// The values of each unit: where several units share a head, rows of their own, which strides alone can reach.
  template <class T, int Rank>
  RepeatParams<T> per_unit(const View<Rank>& view, std::int64_t stride, int count, const Kernel& repeat) {
    const int units = shape_.units(), heads = static_cast<int>(view.size[1]);
    RepeatParams<T> params{.from = static_cast<const T*>(view.data),
                           .batch = view.stride[0],
                           .head = view.stride[1],
                           .element = stride,
                           .heads_per_head = units / heads,
                           .to = nullptr,
                           .heads = units,
                           .count = count};
    if (heads == 1 || heads == units) return params;
    const std::int64_t rows = view.size[0] * units;
    params.to = stream_.allocate_array<T>(static_cast<std::size_t>(rows * count));
    stream_.launch(repeat, grid_of(rows * divide_up_wide(count, RepeatConfig::kElements)), RepeatConfig::kThreads, 0,
                   params);
    return {.from = params.to,
            .batch = view.size[0] == 1 ? 0 : static_cast<i64>(units) * count,
            .head = count,
            .element = 1,
            .heads_per_head = 1,
            .to = nullptr,
            .heads = units,
            .count = count};
  }

  /// Lists exist for (list_batch_, list_heads_): what any of the views is not broadcast over.
  template <int Rank>
  void list_for(const std::optional<View<Rank>>& view) {
    if (!view) return;
    list_batch_ = std::max(list_batch_, static_cast<int>(view->size[0]));
    list_heads_ = std::max(list_heads_, static_cast<int>(view->size[1]));
  }
  template <class T, int Rank>
  Masking<T> masking(const std::optional<View<Rank>>& view) const {
    if (!view) return {.data = nullptr, .batch = 0, .head = 0, .query = 0, .key = 0, .heads_per_head = 1};
    return {.data = static_cast<T*>(view->data),
            .batch = view->stride[0],
            .head = view->stride[1],
            .query = Rank == 4 ? view->stride[2] : 0,
            .key = view->stride[Rank - 1],
            .heads_per_head = list_heads_ / static_cast<int>(view->size[1])};
  }

  /// Room for the lists, to which the plan refers from now on.
  ListsParams make_room(std::int64_t positions) {
    const int list_units = list_heads_ == 1 ? 1 : shape_.units();
    const std::int64_t lists = static_cast<std::int64_t>(list_batch_) * list_units * plan_.runs.count;
    auto* const made = stream_.allocate_array<KeyList>(static_cast<std::size_t>(lists));
    auto* const keys = stream_.allocate_array<int>(static_cast<std::size_t>(positions + kSlack));
    plan_.lists = made;
    plan_.lists_unit = list_heads_ == 1 ? 0 : plan_.runs.count;
    plan_.lists_batch = list_batch_ == 1 ? 0 : static_cast<i64>(list_units) * plan_.runs.count;
    plan_.positions = keys;
    return {.columns = masking<const unsigned char>(masks_.columns),
            .end = masking<const int>(end_),
            .heads = list_heads_,
            .copies = list_units / list_heads_,
            .key_len = shape_.key_len,
            .runs = plan_.runs,
            .is_causal = plan_.is_causal,
            .lists = made,
            .positions = keys};
  }
  std::int64_t list_rows() const { return static_cast<std::int64_t>(list_batch_) * list_heads_; }

  /// Whether there are survivors, and they tell the length of their chunks. A window that is as long as the keys does
  /// not, for there are no more slots than keys.
  bool has_survivors() const {
    if (!survivors_ || !end_ || !plan_.is_causal || plan_.runs.length > SurvivorListsConfig::kLongestRun) return false;
    const auto& size = survivors_->size;
    if (size[2] == 0 || size[3] == 0) return false;
    const auto fits = [&](int i, std::int64_t count) { return size[i] == 1 || size[i] == count; };
    if (survivors_->dtype == DType::int32 && fits(0, sizes_.batch) &&
        (fits(1, sizes_.heads) || fits(1, sizes_.kv_heads))) {
      if (size[3] >= shape_.key_len) return false;
      if (size[2] == divide_up_wide(shape_.key_len, survivor_chunk(size[3]))) return true;
    }
    std::ostringstream message;
    message << "survivors: is " << name_of(survivors_->dtype) << " (" << size[0] << ", " << size[1] << ", " << size[2]
            << ", " << size[3] << "), takes what make_dynamic_mask gives for " << shape_.key_len << " keys";
    throw InvalidArgument(message.str());
  }

  void list_survivors() {
    using Config = SurvivorListsConfig;
    list_for(masks_.columns);
    list_for(end_);
    list_for(survivors_);
    const int slots = static_cast<int>(survivors_->size[3]), chunk = static_cast<int>(survivor_chunk(slots));
    // A run sees what survives at its start, and its own keys.
    longest_ = std::min<std::int64_t>(shape_.key_len, slots + plan_.runs.length);
    const std::int64_t capacity = round_up_wide(longest_, kSlack);
    const int runs_per_block = Config::runs_per_block(plan_.runs.length, slots, chunk);
    const SurvivorListsParams params{.lists = make_room(list_rows() * plan_.runs.count * capacity),
                                     .survivors = masking<const int>(survivors_),
                                     .slots = slots,
                                     .chunk = chunk,
                                     .runs_per_block = runs_per_block,
                                     .blocks = static_cast<int>(divide_up_wide(plan_.runs.count, runs_per_block)),
                                     .capacity = static_cast<int>(capacity)};
    stream_.launch(kSurvivorLists, grid_of(list_rows() * params.blocks), Config::kThreads,
                   Config::shared_bytes(plan_.runs.length, runs_per_block), params);
  }

  void list_columns() {
    using Config = ColumnListsConfig;
    list_for(masks_.columns);
    list_for(end_);
    const std::int64_t capacity = round_up_wide(shape_.key_len, kSlack);
    const std::int64_t few = Config::kFewStages * Config::kStage;
    const std::int64_t slice = shape_.key_len <= few ? few : 2 * Config::kStage;
    ColumnListsParams params{.lists = make_room(list_rows() * capacity),
                             .slices = static_cast<int>(divide_up_wide(shape_.key_len, slice)),
                             .slice = static_cast<int>(slice),
                             .counts = nullptr,
                             .is_counting = false,
                             .capacity = capacity};
    const auto launch = [&] {
      stream_.launch(kColumnLists, grid_of(list_rows() * params.slices), Config::kThreads, Config::kSharedBytes,
                     params);
    };
    if (params.slices > 1) {
      params.counts = stream_.allocate_array<int>(static_cast<std::size_t>(2 * list_rows() * params.slices));
      params.is_counting = true;
      launch();
      params.is_counting = false;
    }
    launch();
  }

  void list_bits() {
    using Config = BitListsConfig;
    if (plan_.runs.length > kMostBits)
      throw std::invalid_argument("a run of " + std::to_string(plan_.runs.length) + " positions has too many bits");
    list_for(masks_.dense);
    list_for(end_);
    std::optional<View<4>> saved = mask_bits_.saved ? mask_bits_.saved : mask_bits_.to_save;
    if (saved) saved = without_expand(*saved);
    const int words = static_cast<int>(divide_up_wide(plan_.runs.length, 32)), segment = Config::segment(words);
    const std::int64_t entries = room_for_bits().start(plan_.runs.count), all = list_rows() * entries;
    BitListsParams params{.lists = make_room(all),
                          .mask = masking<const unsigned char>(masks_.dense),
                          .saved = masking<u32>(saved),
                          .is_aligned = is_aligned(mask_bits_.saved ? *saved : *masks_.dense),
                          .words = words,
                          .segment = segment,
                          .bits = stream_.allocate_array<u32>(static_cast<std::size_t>((all + kSlack) * words)),
                          .room = room_for_bits(),
                          .segments = static_cast<int>(divide_up_wide(shape_.key_len, segment)),
                          .first_list = 0,
                          .counts = nullptr,
                          .segment_positions = nullptr,
                          .segment_bits = nullptr};
    plan_.bits = params.bits;
    plan_.words = words;

    const std::int64_t lists = list_rows() * plan_.runs.count,
                       keys = static_cast<std::int64_t>(params.segments) * segment;
    const std::int64_t memory = segment_memory(list_rows() * shape_.query_len * shape_.key_len);
    const std::int64_t at_a_time = std::clamp<std::int64_t>(memory / (keys * (words + 1) * 4), 1, lists);
    params.counts = stream_.allocate_array<int>(static_cast<std::size_t>(at_a_time * params.segments * 2));
    params.segment_positions = stream_.allocate_array<int>(static_cast<std::size_t>(at_a_time * keys));
    params.segment_bits = stream_.allocate_array<u32>(static_cast<std::size_t>(at_a_time * keys * words));
    if (mask_bits_.to_save && !params.runs_have_whole_words())
      stream_.zero(saved->data, static_cast<std::size_t>(product(saved->size)) * sizeof(u32));
    const Kernel& pack = mask_bits_.saved ? kPackSavedMask : kPackMask;
    for (; params.first_list < lists; params.first_list += at_a_time) {
      const Grid grid = grid_of(std::min<std::int64_t>(at_a_time, lists - params.first_list) * params.segments);
      stream_.launch(pack, grid, Config::kThreads, Config::shared_bytes(words, segment), params);
      stream_.launch(kBitLists, grid, Config::kThreads, 0, params);
    }
  }

  /// A run may list all keys that causality lets its last position see. Lists start at multiples of 4 entries.
  Staircase room_for_bits() const {
    if (!plan_.is_causal) return {.first = round_up_wide(shape_.key_len, 4), .step = 0, .empty = 0};
    const std::int64_t run = plan_.runs.length, first = shape_.first_position() - plan_.runs.missing;
    const std::int64_t empty = first < 0 ? -first / run : 0;
    return {.first = round_up_wide(first + (empty + 1) * run, 4),
            .step = round_up_wide(run, 4),
            .empty = static_cast<int>(empty)};
  }

  static bool is_aligned(const View<4>& view) {
    const auto elements = static_cast<std::int64_t>(16 / size_of(view.dtype));
    bool aligned =
        view.stride[3] == 1 && view.size[3] % elements == 0 && reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
    for (int i = 0; i < 3; ++i) aligned = aligned && view.stride[i] % elements == 0;
    return aligned;
  }

  const flash_dmattn::Shape sizes_;
  const Masks masks_;
  std::optional<View<3>> end_;
  std::optional<View<4>> survivors_;
  const MaskBits& mask_bits_;
  const Shape& shape_;
  Stream& stream_;
  int list_batch_ = 1, list_heads_ = 1;
  Plan plan_{};
  std::int64_t longest_;
};

}  // namespace

Shape make_shape(const Problem& problem, int rows) {
  const flash_dmattn::Shape s(problem);
  const bool alone = is_per_query_head(problem.mask, s) || is_per_query_head(problem.end, s) ||
                     (bias_kind(problem) == BiasKind::per_key && is_per_query_head(problem.bias, s));
  int pack = alone ? 1 : static_cast<int>(std::min<std::int64_t>(s.group(), rows));
  while (s.group() % pack != 0) --pack;
  return {.batch = static_cast<int>(s.batch),
          .query_len = static_cast<int>(s.query_len),
          .key_len = static_cast<int>(s.key_len),
          .heads = static_cast<int>(s.heads),
          .kv_heads = static_cast<int>(s.kv_heads),
          .head_dim = static_cast<int>(s.head_dim),
          .pack = pack};
}

BiasKind bias_kind(const Problem& problem) {
  if (!problem.bias) return BiasKind::none;
  return without_expand(*problem.bias).size[2] == 1 ? BiasKind::per_key : BiasKind::full;
}

Bias make_bias(const Problem& problem) {
  const flash_dmattn::Shape s(problem);
  const View<4> bias = without_expand(*problem.bias);
  return {.data = bias.data,
          .batch = bias.stride[0],
          .head = bias.stride[1],
          .query = bias.stride[2],
          .key = bias.stride[3],
          .heads_per_head = static_cast<int>(s.heads / std::max<std::int64_t>(bias.size[1], 1)),
          .is_float32 = bias.dtype == DType::float32};
}

Test test_of(const Problem& problem) { return Masks(problem).dense ? Test::bits : Test::interval; }

std::array<std::int64_t, 4> mask_bits_size(const Problem& problem) {
  const auto dense = Masks(problem).dense;
  if (!dense) return {};
  const auto& size = dense->size;
  return {size[0], size[1], divide_up_wide(size[2], 32), size[3]};
}

MadePlan make_plan(const Problem& problem, const Shape& shape, const Runs& runs, Stream& stream,
                   const MaskBits& mask_bits) {
  return Planner(problem, shape, runs, stream, mask_bits).make();
}

void list_plan_kernels(const Selection& selection, std::vector<ListedKernel>& kernels) {
  for (const Kernel& kernel : {kSurvivorLists, kColumnLists, kPackMask, kPackSavedMask, kBitLists})
    kernels.push_back({kernel, {}});
  kernels.push_back({kRepeatEnd, {sizeof(int)}});
  kernels.push_back({kRepeatRows, {sizeof(unsigned char)}});
  list_rows_kernels(selection, kernels);
}

}  // namespace flash_dmattn::cuda
