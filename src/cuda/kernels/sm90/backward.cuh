// The backward pass on Hopper. Two warpgroups multiply: each has 64 of the block's keys, and with all of their dS makes
// a half of a tile of dQ. A thread of the third one has tiles of rows copied, another the tiles of dQ added to global
// memory.
#pragma once
#include "attention/backward_block.cuh"
#include "ptx/barrier.cuh"
#include "ptx/block.cuh"
#include "ptx/boxes.cuh"
#include "ptx/bulk.cuh"
#include "ptx/memory.cuh"
#include "ptx/number.cuh"
#include "ptx/warp.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/backward_params.cuh"
#include "sm90/panels.cuh"

namespace flash_dmattn::cuda {

template <BackwardOptions kOptions>
struct HopperBackward : BackwardBlock<kOptions, hopper_backward_config(kOptions.head_dim).tiles(), 3 * kWarpgroup> {
  static constexpr HopperBackwardConfig kConfig = hopper_backward_config(kOptions.head_dim);
  static constexpr int kThreads = kConfig.kThreads, kBlocksPerMultiprocessor = 1;
  using Block = BackwardBlock<kOptions, kConfig.tiles(), kThreads>;
  using Params = HopperBackwardParams;

  static void run(const Params& params, char* memory) {
    HopperBackward block(params, *reinterpret_cast<Shared*>(memory));
    if (block.find_work()) block.differentiate();
  }

 private:
  using Block::add_key_gradients, Block::differentiate_softmax, Block::exponentiate, Block::find_row_tiles;
  using Block::grad_key, Block::grad_value, Block::lane, Block::numbers, Block::params, Block::thread, Block::warp;
  using Block::is_tested, Block::key_of, Block::query_turn, Block::read_keys, Block::row_tile;
  using Block::kColumnTiles, Block::kDim, Block::kKeys, Block::kRows, Block::kStages;
  using Block::wait_for;
  using Block::work;
  using typename Block::Scores, typename Block::Sums, typename Block::T;
  static constexpr int kChunks = kOptions.head_dim / 8, kPanels = kConfig.panels();
  static constexpr int kConsumerThreads = kConfig.kConsumers * kWarpgroup;
  static constexpr int kCopier = kConsumerThreads, kAdder = kCopier + kWarp;  // threads
  static constexpr QueryTile kQueryTile = kConfig.query_tile();
  /// Which products run while the same warpgroup computes: dP beside P, and dV beside dS. There may be too few
  /// registers for that; the other warpgroup's run anyway.
  enum class Overlap { none, probabilities, both };
  static constexpr Overlap kOverlap = kRows == 64 && !kOptions.softcap   ? Overlap::both
                                      : kRows == 128 && kOptions.softcap ? Overlap::none
                                                                         : Overlap::probabilities;
  using KeyPanels = Panels<kKeys, kPanels>;
  using RowPanels = Panels<kRows, kPanels>;
  using ScorePanels = Panels<kKeys, kRows / 64>;
  using QuerySums = float[kQueryTile.blocks()][4];

  /// The picture of shared memory.
  struct Shared {
    KeyPanels key, value;
    RowPanels query[kStages], grad_out[kStages];
    ScorePanels grad_score[2];
    float grad_query[kQueryTile.size()];
    typename Block::Numbers numbers;
    Barrier query_full[kStages], query_empty[kStages], grad_out_full[kStages], grad_out_empty[kStages];
    Barrier grad_query_full, grad_query_empty, keys_full;
  };
  static_assert(sizeof(Shared) <= kConfig.shared_bytes && kConfig.shared_bytes <= shared_capacity(90));

  enum NamedBarrier { kGradScores = 1, kSums = 2 };

  const TensorMap &query_map, &grad_out_map;
  Shared& shared;

  HopperBackward(const Params& given, Shared& memory)
      : Block(given.pass, memory.numbers), query_map(given.query), grad_out_map(given.grad_out), shared(memory) {}

  void differentiate() {
    set_up();
    if (warp < kConsumerThreads / kWarp) {
      grow_registers<kConfig.kRegisters>();
      multiply_rows();
      add_key_gradients(numbers.tile_count, kConsumerThreads, [] { sync_threads(kSums, kConsumerThreads); });
    } else {
      shrink_registers<kConfig.kCopyRegisters>();
      if (thread == kCopier)
        copy_rows();
      else if (thread == kAdder)
        add_query_gradients();
    }
  }

  void set_up() {
    if (thread == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        init(shared.query_full[stage], 1);
        init(shared.grad_out_full[stage], 1);
        init(shared.query_empty[stage], kConsumerThreads);
        init(shared.grad_out_empty[stage], kConsumerThreads);
      }
      init(shared.grad_query_full, kConsumerThreads);
      init(shared.grad_query_empty, 1);
      init(shared.keys_full, kThreads);
      fence_barriers();
    }
    read_keys();
    const auto copy = [&](const Rows& from, KeyPanels& to) {
      const u16* const base = from.at<u16>(work.b, 0, work.kv_head);
      gather_rows<kChunks, kThreads>(to, thread, [&](int row) {
        const int position = numbers.position[row];
        return position < 0 ? nullptr : base + position * from.position;
      });
    };
    copy(params.key, shared.key);
    copy(params.value, shared.value);
    arrive_after_copies(shared.keys_full);
    if constexpr (kPanels * 64 != kOptions.head_dim) {
      const auto pad = [&](auto& tile) { zero_padding<kChunks, kPanels * 64>(tile, thread, kThreads); };
      pad(shared.key);
      pad(shared.value);
    }
    const int rows = params.tile_positions * params.shape.pack;
    if (rows < kRows)
      for (int stage = 0; stage < kStages; ++stage) {
        zero_rows(shared.query[stage], rows, thread, kThreads);
        zero_rows(shared.grad_out[stage], rows, thread, kThreads);
      }
    fence_for_bulk();
    find_row_tiles();
  }

  /// A place in the ring of stages for tile i of the rows.
  static int stage_of(int i) { return i % kStages; }
  static int parity_of(int i) { return i / kStages % 2; }

  // ---- rows

  /// By one thread, which the copy engine works for.
  void copy_rows() {
    prefetch_map(query_map);
    prefetch_map(grad_out_map);
#pragma unroll 1
    for (int i = 0; i < numbers.tile_count; ++i) {
      const int stage = stage_of(i), tile = row_tile(i);
      wait(shared.query_empty[stage], parity_of(i) ^ 1);
      copy_tile(query_map, shared.query[stage], params.lse, numbers.lse[stage], tile, shared.query_full[stage]);
      wait(shared.grad_out_empty[stage], parity_of(i) ^ 1);
      copy_tile(grad_out_map, shared.grad_out[stage], params.delta, numbers.delta[stage], tile,
                shared.grad_out_full[stage]);
    }
  }
  void copy_tile(const TensorMap& map, RowPanels& to, const float* of_rows, float (&to_numbers)[kRows], int tile,
                 Barrier& full) {
    const int pack = params.shape.pack, positions = params.tile_positions;
    arrive_expecting(full, kPanels * positions * pack * kPanelRowBytes + kRows * 4);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      load_box(to.panel(panel), map, panel * kPanelColumns, work.unit * pack, work.first_query + tile * positions,
               work.b, full);
    bulk_load(to_numbers, of_rows + (work.row_tiles + tile) * kRows, kRows * 4, full);
  }

  /// One thread adds tiles of dQ, which the copy engine does; deterministic: in the order of the tiles of keys.
  void add_query_gradients() {
#pragma unroll 1
    for (int i = 0; i < numbers.tile_count; ++i) {
      const int tile = row_tile(i);
      wait(shared.grad_query_full, i % 2);
      if constexpr (kOptions.deterministic) {
        wait_for(query_turn(tile), work.tile);
        fence_global_for_bulk();
      }
      bulk_add(params.grad_query + (work.row_tiles + tile) * kQueryTile.size(), shared.grad_query,
               kQueryTile.size() * 4);
      commit_bulk();
      wait_bulk_read<0>();
      arrive(shared.grad_query_empty);
      if constexpr (kOptions.deterministic) {
        wait_bulk<0>();
        add_released(query_turn(tile), 1);
      }
    }
    wait_bulk<0>();
  }

  // ---- products

  void multiply_rows() {
#pragma unroll
    for (auto& block : grad_key) block[0] = block[1] = block[2] = block[3] = 0;
#pragma unroll
    for (auto& block : grad_value) block[0] = block[1] = block[2] = block[3] = 0;
    const int warpgroup = shuffle(thread / kWarpgroup, 0);
    wait(shared.keys_full, 0);
    fence_for_bulk();
#pragma unroll 1
    for (int i = 0; i < numbers.tile_count; ++i) {
      Scores score;
      QuerySums grad_query;
      multiply_scores(score, warpgroup, i);
      work_at(score, grad_query, warpgroup, i);
      wait_products<1>();  // but dK's
      arrive(shared.grad_out_empty[stage_of(i)]);
      hand_over(grad_query, i);
      wait_products<0>();
      arrive(shared.query_empty[stage_of(i)]);
    }
  }

  /// S^T = K Q^T
  void multiply_scores(Scores& score, int warpgroup, int i) {
    wait(shared.query_full[stage_of(i)], parity_of(i));
    multiply_keys(score, shared.key, shared.query[stage_of(i)], warpgroup);
  }

  /// From the scores of a tile of rows to its part of dV, dQ and dK, which are under way then.
  void work_at(Scores& score, QuerySums& grad_query, int warpgroup, int i) {
    const int stage = stage_of(i), tile = row_tile(i);
    ScorePanels& grad_scores = shared.grad_score[i % 2];
    const auto two = [&](int n, int half) -> u32& {
      return *reinterpret_cast<u32*>(grad_scores.chunk(key_of(half), n) + lane % 4 * 4);
    };
    Scores grad_score;
    u32 operand[kRows / 16][4];
    const auto multiply_values = [&] {  // dP^T = V dO^T
      wait(shared.grad_out_full[stage], parity_of(i));
      multiply_keys(grad_score, shared.value, shared.grad_out[stage], warpgroup);
    };
    if constexpr (kOverlap != Overlap::none) {
      multiply_values();
      wait_products<1>();
    } else {
      wait_products<0>();
    }
    exponentiate(score, two, stage, tile, is_tested(i));
    if constexpr (kOverlap == Overlap::none) multiply_values();
    if constexpr (kOverlap == Overlap::both) {
      pack_operand<T>(operand, score);
      wait_products<0>();
      add_rows(grad_value, operand, shared.grad_out[stage]);
      differentiate_softmax(grad_score, score, two, stage, tile);
    } else {
      wait_products<0>();
      differentiate_softmax(grad_score, score, two, stage, tile);
      pack_operand<T>(operand, score);
      add_rows(grad_value, operand, shared.grad_out[stage]);
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) two(n, half) = pack<T>(grad_score[n][2 * half], grad_score[n][2 * half + 1]);
    u32 grad_operand[kRows / 16][4];
    pack_operand<T>(grad_operand, grad_score);
    fence_for_bulk();
    sync_threads(kGradScores, kConsumerThreads);
    multiply_grad_scores(grad_query, grad_scores, warpgroup);
    add_rows(grad_key, grad_operand, shared.query[stage]);
  }

  /// The warpgroup's 64 keys x all rows, over the head dim.
  static void multiply_keys(Scores& c, const KeyPanels& keys, const RowPanels& rows, int warpgroup) {
    auto& accumulators = reinterpret_cast<float (&)[kRows / 2]>(c);
    const Operand a = keys.rows(64 * warpgroup), b = rows.rows();
    fence_products();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
      multiply<T, kRows, Major::k, Major::k>(accumulators, a + KeyPanels::along_columns(step),
                                             b + RowPanels::along_columns(step), step > 0);
    commit_products();
  }
  /// += 64 keys x head dim, over the rows.
  static void add_rows(Sums& sums, const u32 (&a)[kRows / 16][4], const RowPanels& rows) {
    auto& accumulators = reinterpret_cast<float (&)[kDim / 2]>(sums);
    const Operand b = rows.transposed();
    fence_products();
#pragma unroll
    for (int step = 0; step < kRows / 16; ++step)
      multiply<T, kDim, Major::mn>(accumulators, a[step], b + RowPanels::along_rows(step), true);
    commit_products();
  }
  /// dQ = dS K: the warpgroup's rows x its columns, over the keys.
  void multiply_grad_scores(QuerySums& sums, const ScorePanels& scores, int warpgroup) {
    constexpr int kColumns = kQueryTile.blocks() * 8;
    auto& accumulators = reinterpret_cast<float (&)[kColumns / 2]>(sums);
    const int row_panel = kConfig.cuts_rows() ? warpgroup : 0, column_panel = kConfig.cuts_rows() ? 0 : warpgroup;
    const Operand a = scores.transposed(row_panel), b = shared.key.transposed(column_panel);
    fence_products();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
      multiply<T, kColumns, Major::mn, Major::mn>(accumulators, a + ScorePanels::along_rows(step),
                                                  b + KeyPanels::along_rows(step), step > 0);
    commit_products();
  }

  /// The tile's dQ is written down for the thread that adds it.
  void hand_over(const QuerySums& grad_query, int i) {
    wait(shared.grad_query_empty, i % 2 ^ 1);
    const int slot = kConfig.cuts_rows() ? warp : warp % 4 * 2 + warp / 4;  // as QueryTile says
    float* const to = shared.grad_query + (slot * kQueryTile.blocks() * kWarp + lane) * 4;
    struct alignas(16) Four {
      float x[4];
    };
#pragma unroll
    for (int n = 0; n < kQueryTile.blocks(); ++n)
      *reinterpret_cast<Four*>(to + n * kWarp * 4) = {grad_query[n][0], grad_query[n][1], grad_query[n][2],
                                                      grad_query[n][3]};
    fence_for_bulk();
    arrive(shared.grad_query_full);
  }
};

}  // namespace flash_dmattn::cuda
