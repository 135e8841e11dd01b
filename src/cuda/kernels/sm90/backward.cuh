// The backward pass on Hopper. Two warpgroups multiply: each has 64 of the block's keys, or both have the same, and
// with all of their dS each makes a half of a tile of dQ. A thread of the third one has tiles of rows copied, another
// the tiles of dQ added to global memory.
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
struct HopperBackward : BackwardBlock<kOptions, hopper_backward_config(kOptions).tiles(), 3 * kWarpgroup> {
  static constexpr HopperBackwardConfig kConfig = hopper_backward_config(kOptions);
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
  using Block::is_tested, Block::key_of, Block::query_turn, Block::read_keys, Block::row_tile, Block::sees_half;
  using Block::kColumnTiles, Block::kDim, Block::kKeys, Block::kPartRows, Block::kRows;
  using Block::wait_for;
  using Block::work;
  using typename Block::Scores, typename Block::Sums, typename Block::T;
  static constexpr bool kSharesKeys = kConfig.shares_keys();
  static constexpr int kQueryStages = kConfig.query_stages, kGradOutStages = kConfig.grad_out_stages;
  static constexpr int kChunks = kOptions.head_dim / 8, kPanels = kConfig.panels();
  static constexpr int kConsumerThreads = kConfig.kConsumers * kWarpgroup;
  static constexpr int kCopier = kConsumerThreads, kAdder = kCopier + kWarp;  // threads
  static constexpr QueryTile kQueryTile = kConfig.query_tile();
  /// In which a tile of dQ is handed over: that of one warpgroup after the other, if shared memory is short.
  static constexpr int kHandovers = kSharesKeys ? 2 : 1;
  /// Which products run while the same warpgroup computes: dP beside P, and dV beside dS. There may be too few
  /// registers for that; the other warpgroup's run anyway.
  enum class Overlap { none, probabilities, both };
  static constexpr Overlap kOverlap = kSharesKeys                        ? Overlap::probabilities
                                      : kRows == 64 && !kOptions.softcap ? Overlap::both
                                      : kRows == 128 && kOptions.softcap ? Overlap::none
                                                                         : Overlap::probabilities;
  using KeyPanels = Panels<kKeys, kPanels>;
  using RowPanels = Panels<kRows, kPanels>;
  using ScorePanels = Panels<kKeys, kRows / 64>;
  using QuerySums = float[kQueryTile.blocks()][4];

  /// The picture of shared memory.
  struct Shared {
    KeyPanels key, value;
    RowPanels query[kQueryStages], grad_out[kGradOutStages];
    ScorePanels scores[2];  // dS of two tiles of rows in turn; where keys are shared, P and dS of one
    float grad_query[kQueryTile.size() / kHandovers];
    typename Block::Numbers numbers;
    Barrier query_full[kQueryStages], query_empty[kQueryStages];
    Barrier grad_out_full[kGradOutStages], grad_out_empty[kGradOutStages];
    Barrier grad_query_full[kHandovers], grad_query_empty[kHandovers], keys_full;
  };
  static_assert(sizeof(Shared) <= kConfig.shared_bytes && kConfig.shared_bytes <= shared_capacity(90));

  enum NamedBarrier { kGradScores = 1, kSums = 2, kScoresFree = 3 };

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
      const auto init_all = [](auto& full, int arrivals, auto& empty, int releases) {
        for (Barrier& barrier : full) init(barrier, arrivals);
        for (Barrier& barrier : empty) init(barrier, releases);
      };
      init_all(shared.query_full, 1, shared.query_empty, kConsumerThreads);
      init_all(shared.grad_out_full, 1, shared.grad_out_empty, kConsumerThreads);
      init_all(shared.grad_query_full, kConsumerThreads / kHandovers, shared.grad_query_empty, 1);
      init(shared.keys_full, kThreads);
      fence_barriers();
    }
    read_keys();
    const auto copy = [&](const Rows& from, KeyPanels& to) {
      const u16* const base = from.at<u16>(work.b, 0, work.kv_head);
      gather_rows<kChunks, kThreads>(to, thread, [&](int row, int) {
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
    if (rows < kRows) {
      for (RowPanels& tile : shared.query) zero_rows(tile, rows, thread, kThreads);
      for (RowPanels& tile : shared.grad_out) zero_rows(tile, rows, thread, kThreads);
    }
    fence_for_bulk();
    find_row_tiles();
  }

  /// A place in a ring of kStages for tile i of the rows.
  template <int kStages>
  struct Place {
    int stage, parity;
    explicit Place(int i) : stage(i % kStages), parity(i / kStages % 2) {}
  };
  using QueryPlace = Place<kQueryStages>;
  using GradOutPlace = Place<kGradOutStages>;

  // ---- rows

  /// By one thread, which the copy engine works for.
  void copy_rows() {
    prefetch_map(query_map);
    prefetch_map(grad_out_map);
#pragma unroll 1
    for (int i = 0; i < numbers.tile_count; ++i) {
      const int tile = row_tile(i);
      const QueryPlace query(i);
      wait(shared.query_empty[query.stage], query.parity ^ 1);
      copy_tile(query_map, shared.query[query.stage], params.lse, numbers.lse[query.stage], tile,
                shared.query_full[query.stage]);
      const GradOutPlace grad_out(i);
      wait(shared.grad_out_empty[grad_out.stage], grad_out.parity ^ 1);
      copy_tile(grad_out_map, shared.grad_out[grad_out.stage], params.delta, numbers.delta[grad_out.stage], tile,
                shared.grad_out_full[grad_out.stage]);
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
      float* const to = params.grad_query + (work.row_tiles + tile) * kQueryTile.size();
#pragma unroll
      for (int part = 0; part < kHandovers; ++part) {
        wait(shared.grad_query_full[part], i % 2);
        if (kOptions.deterministic && part == 0) {
          wait_for(query_turn(tile), work.tile);
          fence_global_for_bulk();
        }
        if constexpr (kHandovers == 1) {
          bulk_add(to, shared.grad_query, kQueryTile.size() * 4);
        } else {
          constexpr int kSlot = kQueryTile.blocks() * 128;
          for (int slot = 0; slot < 4; ++slot)
            bulk_add(to + (2 * slot + part) * kSlot, shared.grad_query + slot * kSlot, kSlot * 4);
        }
        commit_bulk();
        wait_bulk_read<0>();
        arrive(shared.grad_query_empty[(part + 1) % kHandovers]);
      }
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
    if constexpr (!kConfig.halves) {
#pragma unroll 1
      for (int i = 0; i < numbers.tile_count; ++i) {
        Scores score;
        QuerySums grad_query;
        multiply_rows<kKeys>(score, grad_query, i, warpgroup);
      }
    } else {
      const int whole = numbers.whole_count;
#pragma unroll 1
      for (int i = 0; i < whole; ++i) multiply_rows<kKeys>(i, warpgroup);
#pragma unroll 1
      for (int i = whole; i < numbers.tile_count; ++i) {
        if (sees_half(i, warpgroup))
          multiply_rows<kKeys / 2>(i, warpgroup);
        else
          multiply_for_other(i, warpgroup);
      }
    }
  }
  template <int kSeen>
  void multiply_rows(int i, int warpgroup) {
    Scores score;
    QuerySums grad_query;
    multiply_rows<kSeen>(score, grad_query, i, warpgroup);
  }
  /// Of so many keys that the tile of rows sees: all, or the warpgroup's. What is computed at is the caller's: with
  /// variables of its own, it takes more registers in a loop of everything than there are.
  template <int kSeen>
  void multiply_rows(Scores& score, QuerySums& grad_query, int i, int warpgroup) {
    multiply_scores(score, warpgroup, i);
    work_at<kSeen>(score, grad_query, warpgroup, i);
    wait_products<1>();  // but dK's
    arrive(shared.grad_out_empty[GradOutPlace(i).stage]);
    hand_over(grad_query, warpgroup, i);
    wait_products<0>();
    arrive(shared.query_empty[QueryPlace(i).stage]);
  }
  /// The rows see keys of the other warpgroup only: this one has its part of dQ.
  void multiply_for_other(int i, int warpgroup) {
    QuerySums grad_query;
    sync_threads(kGradScores, kConsumerThreads);
    multiply_grad_scores<kKeys / 2>(grad_query, shared.scores[i % 2], warpgroup, 1 - warpgroup);
    arrive(shared.grad_out_empty[GradOutPlace(i).stage]);
    arrive(shared.query_empty[QueryPlace(i).stage]);
    wait_products<0>();
    hand_over(grad_query, warpgroup, i);
  }

  /// S^T = K Q^T
  void multiply_scores(Scores& score, int warpgroup, int i) {
    const QueryPlace place(i);
    wait(shared.query_full[place.stage], place.parity);
    multiply_keys(score, shared.key, shared.query[place.stage], warpgroup);
  }

  /// From the scores of a tile of rows to its part of dV, dQ and dK, which are under way then.
  template <int kSeen>
  void work_at(Scores& score, QuerySums& grad_query, int warpgroup, int i) {
    const int tile = row_tile(i);
    const GradOutPlace place(i);
    const RowPanels &query = shared.query[QueryPlace(i).stage], &grad_out = shared.grad_out[place.stage];
    ScorePanels& grad_scores = shared.scores[kSharesKeys ? 1 : i % 2];
    const auto two_of = [&](ScorePanels& scores, int n, int half) -> u32& {
      const int chunk = kSharesKeys ? warpgroup * kColumnTiles + n : n;
      return *reinterpret_cast<u32*>(scores.chunk(key_of(half), chunk) + lane % 4 * 4);
    };
    const auto two = [&](int n, int half) -> u32& { return two_of(grad_scores, n, half); };
    const auto store = [&](const Scores& x, ScorePanels& to) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) two_of(to, n, half) = pack<T>(x[n][2 * half], x[n][2 * half + 1]);
    };
    Scores grad_score;
    const auto multiply_values = [&] {  // dP^T = V dO^T
      wait(shared.grad_out_full[place.stage], place.parity);
      multiply_keys(grad_score, shared.value, grad_out, warpgroup);
    };
    if constexpr (kOverlap != Overlap::none) {
      multiply_values();
      wait_products<1>();
    } else {
      wait_products<0>();
    }
    if constexpr (kSharesKeys) sync_threads(kScoresFree, kConsumerThreads);  // the last tile's products took them
    exponentiate(score, two, QueryPlace(i).stage, tile, is_tested(i));
    if constexpr (kOverlap == Overlap::none) multiply_values();
    u32 operand[kPartRows / 16][4];
    if constexpr (kOverlap == Overlap::both) {
      pack_operand<T>(operand, score);
      wait_products<0>();
      add_rows(grad_value, operand, grad_out);
      differentiate_softmax(grad_score, score, two, place.stage, tile);
    } else {
      wait_products<0>();
      differentiate_softmax(grad_score, score, two, place.stage, tile);
      if constexpr (kSharesKeys) {
        store(score, shared.scores[0]);
      } else {
        pack_operand<T>(operand, score);
        add_rows(grad_value, operand, grad_out);
      }
    }
    store(grad_score, grad_scores);
    if constexpr (!kSharesKeys) pack_operand<T>(operand, grad_score);
    fence_for_bulk();
    sync_threads(kGradScores, kConsumerThreads);
    if constexpr (kSharesKeys) add_rows(grad_value, shared.scores[0], grad_out, warpgroup);
    multiply_grad_scores<kSeen>(grad_query, grad_scores, warpgroup, kSeen < kKeys ? warpgroup : 0);
    if constexpr (kSharesKeys)
      add_rows(grad_key, grad_scores, query, warpgroup);
    else
      add_rows(grad_key, operand, query);
  }

  /// 64 keys x the warpgroup's rows, over the head dim.
  static void multiply_keys(Scores& c, const KeyPanels& keys, const RowPanels& rows, int warpgroup) {
    auto& accumulators = reinterpret_cast<float (&)[kPartRows / 2]>(c);
    const Operand a = keys.rows(kSharesKeys ? 0 : 64 * warpgroup),
                  b = rows.rows(kSharesKeys ? kPartRows * warpgroup : 0);
    fence_products();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
      multiply<T, kPartRows, Major::k, Major::k>(accumulators, a + KeyPanels::along_columns(step),
                                                 b + RowPanels::along_columns(step), step > 0);
    commit_products();
  }
  /// += 64 keys x head dim, over the rows.
  static void add_rows(Sums& sums, const u32 (&a)[kPartRows / 16][4], const RowPanels& rows) {
    auto& accumulators = reinterpret_cast<float (&)[kDim / 2]>(sums);
    const Operand b = rows.transposed();
    fence_products();
#pragma unroll
    for (int step = 0; step < kRows / 16; ++step)
      multiply<T, kDim, Major::mn>(accumulators, a[step], b + RowPanels::along_rows(step), true);
    commit_products();
  }
  /// += the shared keys x the warpgroup's columns, over the rows.
  static void add_rows(Sums& sums, const ScorePanels& scores, const RowPanels& rows, int warpgroup) {
    const Operand a = scores.rows();
    fence_products();
#pragma unroll
    for (int step = 0; step < kRows / 16; ++step)
      multiply_columns<Major::k>(sums, a + ScorePanels::along_columns(step), rows, RowPanels::along_rows(step),
                                 warpgroup, true);
    commit_products();
  }
  /// dQ = dS K: the warpgroup's rows x its columns, over so many keys, those of one warpgroup or all.
  template <int kSeen>
  void multiply_grad_scores(QuerySums& sums, const ScorePanels& scores, int warpgroup, int of_keys) {
    const Operand a =
        scores.transposed(kConfig.cuts_rows() ? warpgroup : 0) + of_keys * ScorePanels::along_rows(kKeys / 32);
    fence_products();
#pragma unroll
    for (int step = 0; step < kSeen / 16; ++step) {
      const Operand rows = a + ScorePanels::along_rows(step);
      if constexpr (kSharesKeys) {
        multiply_columns<Major::mn>(sums, rows, shared.key, KeyPanels::along_rows(step), warpgroup, step > 0);
      } else {
        constexpr int kColumns = kQueryTile.blocks() * 8;
        const Operand b =
            shared.key.transposed(kConfig.cuts_rows() ? 0 : warpgroup) + of_keys * KeyPanels::along_rows(kKeys / 32);
        multiply<T, kColumns, Major::mn, Major::mn>(reinterpret_cast<float (&)[kColumns / 2]>(sums), rows,
                                                    b + KeyPanels::along_rows(step), step > 0);
      }
    }
    commit_products();
  }

  // Where keys are shared, the columns of the warpgroups are whole panels, and of an odd one a half each. The sums have
  // the whole ones first.
  static constexpr int kWhole = kConfig.whole_panels();
  static constexpr bool kHalf = kConfig.halves_panel();

  /// += A x the warpgroup's columns of 16 rows, `bytes` into the panels.
  template <Major kA, int kBlocks, class AnyPanels>
  static void multiply_columns(float (&sums)[kBlocks][4], Operand a, const AnyPanels& panels, int bytes, int warpgroup,
                               bool add) {
    static_assert(kBlocks == kWhole * 8 + kHalf * 4);
    if constexpr (kWhole > 0)
      multiply<T, kWhole * 64, kA, Major::mn>(reinterpret_cast<float (&)[kWhole * 32]>(sums), a,
                                              panels.transposed(warpgroup * (kWhole + kHalf)) + bytes, add);
    if constexpr (kHalf)
      multiply<T, 32, kA, Major::mn>(reinterpret_cast<float (&)[16]>(sums[kWhole * 8]), a,
                                     panels.transposed(kWhole) + (bytes + warpgroup * kPanelRowBytes / 2), add);
  }

  /// The tile's dQ, or the warpgroup's half, is written down for the thread that adds it.
  void hand_over(const QuerySums& grad_query, int warpgroup, int i) {
    constexpr int kBlocks = kQueryTile.blocks();
    const int part = kHandovers > 1 ? warpgroup : 0;
    wait(shared.grad_query_empty[part], part == 0 ? i % 2 ^ 1 : i % 2);
    // As QueryTile says.
    const int slot = kHandovers > 1 ? warp % 4 : kConfig.cuts_rows() ? warp : warp % 4 * 2 + warp / 4;
    const int turned = kSharesKeys && kHalf ? warpgroup * 4 : 0;
    float* const to = shared.grad_query + (slot * kBlocks * kWarp + lane) * 4;
    struct alignas(16) Four {
      float x[4];
    };
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
      *reinterpret_cast<Four*>(to + (n + turned) % kBlocks * kWarp * 4) = {grad_query[n][0], grad_query[n][1],
                                                                           grad_query[n][2], grad_query[n][3]};
    fence_for_bulk();
    arrive(shared.grad_query_full[part]);
  }
};

}  // namespace flash_dmattn::cuda
