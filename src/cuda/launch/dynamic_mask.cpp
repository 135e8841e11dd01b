// The dynamic mask on the device, and the selection of keys where each query has scores of its own.
#include <algorithm>
#include <bit>
#include <string>
#include <vector>

#include "core/check.h"
#include "flash_dmattn/cuda.h"
#include "kernel_list.h"
#include "mask/dynamic_mask_params.cuh"
#include "mask/select_params.cuh"
#include "sizes.h"

namespace flash_dmattn::cuda {
namespace {

const char* const kHeader = "mask/dynamic_mask.cuh";
constexpr ScoreType kScoreTypes[] = {ScoreType::float16, ScoreType::bfloat16, ScoreType::float32, ScoreType::float64};

// A node of the tree has kFan children, the root at most kWidestRoot: it takes them one after the other.
constexpr std::int64_t kFan = 8, kWidestRoot = 16;

std::string text(ScoreType type) {
  static const char* const names[] = {"float16", "bfloat16", "float32", "float64"};
  return std::string("ScoreType::") + names[static_cast<int>(type)];
}
Kernel scored(const char* header, const char* name, ScoreType type) {
  return {header, std::string(name) + "<" + text(type) + ">"};
}
Kernel keep_best(bool is_wide) { return {kHeader, is_wide ? "KeepBest<u64>" : "KeepBest<u32>"}; }
Kernel scan_lists(bool is_wide, bool in_shared) {
  return {kHeader, std::string("ScanLists<") + (is_wide ? "u64" : "u32") + (in_shared ? ", true>" : ", false>")};
}

ScoreType score_type(DType dtype) { return kScoreTypes[static_cast<int>(dtype) - static_cast<int>(DType::float16)]; }

Keys make_keys(const DynamicMask& mask) {
  const View<3>& score = mask.score;
  Keys keys{score.data,
            score.stride[0],
            score.stride[1],
            score.stride[2],
            nullptr,
            0,
            0,
            static_cast<int>(score.size[1]),
            static_cast<int>(score.size[2])};
  if (mask.key_padding_mask) {
    const View<2>& padding = *mask.key_padding_mask;
    keys.padding = static_cast<const unsigned char*>(padding.data);
    keys.padding_batch = padding.size[0] == 1 ? 0 : padding.stride[0];
    keys.padding_key = padding.stride[1];
  }
  return keys;
}

/// What all of a row is cut into, from groups of keys up to the children of the root.
template <class Score>
struct Level {
  std::int64_t length;  ///< keys of a node
  std::int64_t nodes;   ///< of a row
  Lists<Score> best;    ///< of each node
  Lists<Score> starts;  ///< what survives at the start of each node, as far as its keys can beat it; none: nothing
};

template <class Score>
class DynamicMaskMaker {
 public:
  DynamicMaskMaker(const DynamicMask& mask, const Ends& end, const Survivors& survivors, Stream& stream)
      : keys_(make_keys(mask)),
        end_(end),
        survivors_(survivors),
        stream_(stream),
        type_(score_type(mask.score.dtype)),
        rows_(mask.score.size[0] * mask.score.size[1]),
        keep_(mask.keep_window_size),
        chunk_(survivor_chunk(keep_)) {
    const std::int64_t length = mask.score.size[2];
    levels_.push_back(level(kGroup, divide_up_wide(length, kGroup)));
    while (levels_.back().nodes > kWidestRoot)
      levels_.push_back(level(levels_.back().length * kFan, divide_up_wide(levels_.back().nodes, kFan)));
  }

  void make() {
    Lists<Score> chunk_lists{};
    if (end_.is_causal) chunk_lists = best_lists(levels_[0].nodes * kChunksPerGroup, kChunk);
    stream_.launch(scored(kHeader, "SortKeys", type_), grid(levels_[0].nodes), kSortThreads, sizeof(SortBuffers<Score>),
                   SortKeysParams<Score>{keys_, groups(), chunk_lists, levels_[0].best, end_});
    for (std::size_t i = 1; i < levels_.size(); ++i)
      scan(levels_[i - 1], false, levels_[i].nodes, levels_[i].best.size, {}, levels_[i].best);
    Level<Score>& top = levels_.back();
    if (!end_.is_causal) {
      Lists<Score> best = top.best;
      if (top.nodes > 1) {
        best = lists(1, keep_);
        scan(top, false, 1, keep_, {}, best);
      }
      stream_.launch(keep_best(is_wide()), grid(1), kKeepThreads, 0, KeepBestParams<Score>{best, end_, keys_.count});
      return;
    }
    if (top.nodes > 1) scan(top, true, 1, keep_, {}, {});
    for (std::size_t i = levels_.size() - 1; i > 0; --i)
      scan(levels_[i - 1], true, levels_[i].nodes, levels_[i].best.size, levels_[i].starts, {});
    const std::int64_t chunks = divide_up_wide(keys_.count, kChunk);
    stream_.launch(
        scored(kHeader, "FindEnds", type_), grid(chunks), kFindThreads,
        find_ends_shared_bytes(static_cast<int>(keep_), sizeof(Score)),
        FindEndsParams<Score>{keys_, groups(), static_cast<int>(chunks), static_cast<int>(keep_), chunk_lists,
                              levels_[0].starts, end_, keep_ <= kGroup ? survivors_ : Survivors{},
                              static_cast<int>(chunk_ / kChunk)});
  }

 private:
  static constexpr bool is_wide() { return sizeof(Score) == 8; }
  int groups() const { return static_cast<int>(levels_[0].nodes); }
  Grid grid(std::int64_t blocks_of_row) const { return {static_cast<unsigned>(rows_ * blocks_of_row)}; }

  /// The best of that many keys.
  Lists<Score> best_lists(std::int64_t count_of_row, std::int64_t keys) const {
    return lists(count_of_row, std::min(keep_, keys));
  }
  Lists<Score> lists(std::int64_t count_of_row, std::int64_t size) const {
    const std::int64_t entries = rows_ * count_of_row * size;
    Score* score = static_cast<Score*>(stream_.allocate(static_cast<std::size_t>(entries) * (sizeof(Score) + 4)));
    return {{score, reinterpret_cast<int*>(score + entries)}, static_cast<int>(size)};
  }
  Level<Score> level(std::int64_t length, std::int64_t nodes) const {
    return {length, nodes, best_lists(nodes, length),
            end_.is_causal && nodes > 1 ? best_lists(nodes, length) : Lists<Score>{}};
  }

  /// One block a node takes its children in turn. Writes what survives at their starts, or the node's best.
  void scan(const Level<Score>& children, bool writes_starts, std::int64_t nodes, std::int64_t capacity,
            const Lists<Score>& node_starts, const Lists<Score>& best) {
    const std::int64_t shared_bytes = scan_shared_bytes(capacity, children.best.size, sizeof(Score));
    const bool in_shared = shared_bytes <= shared_capacity(stream_.arch());
    // Where a child can beat some of the survivors only, all of them are in no list: this is where they pass.
    const bool writes_survivors = writes_starts && capacity == keep_ && children.best.size < keep_;
    stream_.launch(
        scan_lists(is_wide(), in_shared), grid(nodes), kScanThreads, in_shared ? static_cast<int>(shared_bytes) : 0,
        ScanListsParams<Score>{children.best, static_cast<int>(children.nodes), static_cast<int>(nodes),
                               static_cast<int>(nodes == 1 ? children.nodes : kFan), static_cast<int>(capacity),
                               node_starts, writes_starts ? children.starts : Lists<Score>{}, best,
                               writes_survivors ? survivors_ : Survivors{},
                               static_cast<int>(std::max<std::int64_t>(chunk_ / children.length, 1)),
                               in_shared ? Lists<Score>{} : lists(2 * nodes, list_slots(capacity))});
  }

  Keys keys_;
  Ends end_;
  Survivors survivors_;
  Stream& stream_;
  ScoreType type_;
  std::int64_t rows_, keep_, chunk_;
  std::vector<Level<Score>> levels_;
};

template <ScoreType kType>
void select_keys(const View<4>& score, const std::optional<View<4>>& visible, std::int64_t keep_window_size,
                 bool is_causal, const View<4>& selected, Stream& stream) {
  using Bits = typename Ranking<kType>::Bits;
  const auto pairs = [&]<class T>(const View<4>& view, T* data) {
    const auto step = [&](int i) -> i64 { return view.size[i] == 1 ? 0 : view.stride[i]; };
    return Pairs<T>{data, step(0), step(1), step(2), step(3)};
  };
  const auto [batch, heads, queries, keys] = selected.size;
  const std::int64_t rows = keys > 0 ? batch * heads * queries : 0;
  const std::int64_t shared_bytes = select_shared_bytes(keys, sizeof(Bits));
  const bool in_shared = shared_bytes <= shared_capacity(stream.arch());
  stream.launch(scored("mask/select.cuh", "SelectKeys", kType),
                {static_cast<unsigned>(std::min<std::int64_t>(rows, 1 << 30))}, kSelectThreads,
                in_shared ? static_cast<int>(shared_bytes) : static_cast<int>(select_shared_bytes(0, 0)),
                SelectKeysParams<kType>{pairs(score, static_cast<const Bits*>(score.data)),
                                        visible ? pairs(*visible, static_cast<const unsigned char*>(visible->data))
                                                : Pairs<const unsigned char>{},
                                        pairs(selected, static_cast<unsigned char*>(selected.data)), rows,
                                        static_cast<int>(heads), static_cast<int>(queries), static_cast<int>(keys),
                                        static_cast<int>(std::min(keep_window_size, keys)), is_causal, in_shared});
}

}  // namespace

std::int64_t survivor_chunk(std::int64_t keep_window_size) {
  // At least half of w: at most two survivors for every key. No list of keys is longer than an int can say.
  const auto half = static_cast<std::uint64_t>(std::min<std::int64_t>(keep_window_size, kLargest) + 1) / 2;
  return std::max<std::int64_t>(kChunk, static_cast<std::int64_t>(std::bit_ceil(half)));
}

void make_dynamic_mask(const DynamicMask& mask, const View<3>& end, const std::optional<View<4>>& survivors,
                       Stream& stream) {
  check(mask, end, std::nullopt);
  const auto [batch, heads, key_len] = mask.score.size;
  const std::int64_t chunk = survivor_chunk(mask.keep_window_size), chunks = divide_up_wide(key_len, chunk);
  if (survivors) check_survivors(mask, chunks, *survivors);
  if (batch * heads * key_len == 0) return;

  const Ends ends{static_cast<int*>(end.data),
                  end.stride[0],
                  end.stride[1],
                  end.stride[2],
                  static_cast<int>(heads),
                  mask.is_causal,
                  static_cast<int>(std::min<std::int64_t>(0, key_len - mask.query_len))};
  Survivors rows{};
  if (survivors)
    rows = {static_cast<int*>(survivors->data),
            survivors->stride[0],
            survivors->stride[1],
            survivors->stride[2],
            survivors->stride[3],
            static_cast<int>(heads)};
  if (key_len <= mask.keep_window_size)
    stream.launch({kHeader, "KeepAll"}, {static_cast<unsigned>(batch * heads * chunks)}, kKeepThreads,
                  kKeepThreads / 32 * 4,
                  KeepAllParams{make_keys(mask), ends, rows, static_cast<int>(chunk), static_cast<int>(chunks)});
  else if (mask.score.dtype == DType::float64)
    stream.together([&] { DynamicMaskMaker<u64>(mask, ends, rows, stream).make(); });
  else
    stream.together([&] { DynamicMaskMaker<u32>(mask, ends, rows, stream).make(); });
}

void select_keys(const View<4>& score, const std::optional<View<4>>& visible, std::int64_t keep_window_size,
                 bool is_causal, const View<4>& selected, Stream& stream) {
  check_selection(score, visible, keep_window_size, selected);
  const auto select = [&]<ScoreType kType>() {
    select_keys<kType>(score, visible, keep_window_size, is_causal, selected, stream);
  };
  switch (score_type(score.dtype)) {
    case ScoreType::float16:
      return select.template operator()<ScoreType::float16>();
    case ScoreType::bfloat16:
      return select.template operator()<ScoreType::bfloat16>();
    case ScoreType::float32:
      return select.template operator()<ScoreType::float32>();
    case ScoreType::float64:
      return select.template operator()<ScoreType::float64>();
  }
}

void list_mask_kernels(const Selection& selection, std::vector<ListedKernel>& kernels) {
  // A mask's scores have a dtype of their own.
  for (ScoreType type : kScoreTypes) {
    const std::vector<int> options{selection.arch, static_cast<int>(type)};
    kernels.push_back({scored(kHeader, "SortKeys", type), options});
    kernels.push_back({scored(kHeader, "FindEnds", type), options});
    kernels.push_back({scored("mask/select.cuh", "SelectKeys", type), options});
  }
  for (bool is_wide : {false, true}) {
    for (bool in_shared : {false, true})
      kernels.push_back({scan_lists(is_wide, in_shared), {selection.arch, is_wide, in_shared}});
    kernels.push_back({keep_best(is_wide), {selection.arch, is_wide}});
  }
  kernels.push_back({{kHeader, "KeepAll"}, {selection.arch}});
}

}  // namespace flash_dmattn::cuda
