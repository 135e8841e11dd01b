// The backward pass on mma.sync.
#pragma once
#include "attention/backward_block.cuh"
#include "ptx/block.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/number.cuh"
#include "ptx/warp.cuh"
#include "sm80/backward_params.cuh"
#include "sm80/tiles.cuh"

namespace flash_dmattn::cuda {

constexpr BackwardConfig config_of(const BackwardOptions& options) {
  return backward_config(options.arch, options.head_dim, options.bias);
}

template <BackwardOptions kOptions>
struct Backward : BackwardBlock<kOptions, config_of(kOptions).tiles(), config_of(kOptions).threads()> {
  static constexpr BackwardConfig kConfig = config_of(kOptions);
  static constexpr int kThreads = kConfig.threads(), kBlocksPerMultiprocessor = 1;
  using Block = BackwardBlock<kOptions, kConfig.tiles(), kThreads>;
  using Params = BackwardParams;

  static void run(const Params& params, char* memory) {
    Backward block(params, *reinterpret_cast<Shared*>(memory));
    if (block.find_work()) block.differentiate();
  }

 private:
  using Block::add_key_gradients, Block::differentiate_softmax, Block::exponentiate, Block::find_row_tiles;
  using Block::grad_key, Block::grad_value, Block::lane, Block::numbers, Block::params, Block::thread, Block::warp;
  using Block::has_row, Block::is_tested, Block::query_turn, Block::read_keys, Block::row_at, Block::row_tile,
      Block::wait_for;
  using Block::kColumnTiles, Block::kDim, Block::kKeyGroups, Block::kKeys, Block::kOwnPairs, Block::kPairs;
  using Block::kPartRows, Block::kRows, Block::kSplit, Block::kStages;
  using Block::warp_key, Block::warp_part, Block::work;
  using typename Block::Row, typename Block::Scores, typename Block::Sums, typename Block::T;
  static constexpr int kPitch = tile_pitch(kOptions.head_dim), kScorePitch = tile_pitch(kRows);
  static constexpr bool kDelayed = kConfig.dq_stages == 2;
  using RowTile = Tile<kRows, kOptions.head_dim>;
  using KeyTile = Tile<kKeys, kOptions.head_dim>;
  using ScoreTile = Tile<kKeys, kRows>;

  /// The picture of shared memory.
  struct Shared {
    KeyTile key, value;
    RowTile query[kStages], grad_out[kStages];
    ScoreTile grad_score[kConfig.dq_stages + (kSplit > 1 ? 1 : 0)];
    ScoreTile& probability() { return grad_score[kConfig.dq_stages]; }  // kSplit > 1
    BackwardNumbers<kKeys, kRows, kStages> numbers;
  };
  static_assert(kConfig.has_query_tile_of(backward_config(kOptions.arch, kOptions.head_dim)));
  static_assert(sizeof(Shared) <= kConfig.shared_bytes && kConfig.shared_bytes <= shared_capacity(kOptions.arch));

  Shared& shared;

  Backward(const Params& given, Shared& memory) : Block(given, memory.numbers), shared(memory) {}

  void copy_row_tile(const Rows& from, RowTile& to, int row_tile) {
    const u16* const base = from.at<u16>(work.b, work.first_query, work.unit * params.shape.pack);
    copy_rows<kThreads>(to, thread_index_anew(), [&](int row, int column) {
      const int r = row_tile * kRows + row;
      const bool exists = has_row(r);
      const Row at = row_at(r);
      return Source{base + (exists ? at.query * from.position + at.head * from.head + column : 0), exists};
    });
  }
  /// Starts copying what belongs to a tile of rows.
  void copy_rows_of(int row_tile, int stage) {
    copy_row_tile(params.query, shared.query[stage], row_tile);
    copy_row_tile(params.grad_out, shared.grad_out[stage], row_tile);
    const i64 first = (work.row_tiles + row_tile) * kRows;
    constexpr int kCopies = kRows / 4;
    if (thread < 2 * kCopies) {
      const int i = thread % kCopies * 4;
      thread < kCopies ? copy_async_16(numbers.lse[stage] + i, params.lse + first + i, true)
                       : copy_async_16(numbers.delta[stage] + i, params.delta + first + i, true);
    }
    commit_copies();
  }

  // ---- keys of the tile

  void copy_keys() {
    read_keys();
    const auto copy = [&](const Rows& from, KeyTile& to) {
      const u16* const base = from.at<u16>(work.b, 0, work.kv_head);
      copy_rows<kThreads>(to, thread, [&](int row, int column) {
        const int position = numbers.position[row];
        return Source{base + most(position, 0) * from.position + column, position >= 0};
      });
    };
    copy(params.key, shared.key);
    copy(params.value, shared.value);
    commit_copies();
    zero_padding<kThreads>(shared.key, thread);
    zero_padding<kThreads>(shared.value, thread);
    for (int stage = 0; stage < kStages; ++stage) {
      zero_padding<kThreads>(shared.query[stage], thread);
      zero_padding<kThreads>(shared.grad_out[stage], thread);
    }
  }

  // ---- products of a warp

  /// 16 keys x the warp's rows, over the head dim.
  static void multiply(Scores& c, const u16* keys, const u16* row_columns) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      u32 a[4];
      load_matrices(a, keys + d);
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        u32 x[4];
        load_matrices(x, row_columns + n * 8 * kPitch + d);
        mma<T>(c[n], a, x[0], x[1]);
        mma<T>(c[n + 1], a, x[2], x[3]);
      }
    }
  }
  /// 16 keys x the warp's columns, over 16 rows.
  void add_rows(Sums& sums, const u32 (&a)[4], const u16* row_columns) const {
#pragma unroll
    for (int pair = 0; pair < kOwnPairs; ++pair)
      if (kPairs % kSplit == 0 || warp_part * kOwnPairs + pair < kPairs) {
        u32 x[4];
        load_matrices_transposed(x, row_columns + pair * 16);
        mma<T>(sums[2 * pair], a, x[0], x[1]);
        mma<T>(sums[2 * pair + 1], a, x[2], x[3]);
      }
  }
  /// A warp that has all rows of its 16 keys has them as an operand, too.
  void add_own(Sums& sums, const Scores& scores, const u16* row_columns) const {
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      const u32 a[4] = {pack<T>(scores[n][0], scores[n][1]), pack<T>(scores[n][2], scores[n][3]),
                        pack<T>(scores[n + 1][0], scores[n + 1][1]), pack<T>(scores[n + 1][2], scores[n + 1][3])};
      add_rows(sums, a, row_columns + n * 8 * kPitch);
    }
  }
  void add_shared(Sums& sums, ScoreTile& scores, const u16* row_columns) const {
    const u16* const keys = rows_operand(scores, warp_key, lane);
#pragma unroll
    for (int row = 0; row < kRows; row += 16) {
      u32 a[4];
      load_matrices(a, keys + row);
      add_rows(sums, a, row_columns + row * kPitch);
    }
  }
  /// Where two of the thread's scores stand: accumulators [n][2 * half] and the next.
  auto two_of(ScoreTile& tile) const {
    u16* const at = tile.at(warp_key + lane / 4, warp_part * kPartRows + lane % 4 * 2);
    return [at](int n, int half) -> u32& { return *reinterpret_cast<u32*>(at + half * 8 * kScorePitch + n * 8); };
  }
  void store(ScoreTile& to, const Scores& scores) const {
    const auto two = two_of(to);
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) two(n, half) = pack<T>(scores[n][2 * half], scores[n][2 * half + 1]);
  }

  // ---- dQ

  /// Adds the product of dS and the keys to dQ.
  void add_query_gradient(ScoreTile& grad_score, int row_tile) {
    constexpr QueryTile kTile = kConfig.query_tile();
    constexpr int kGroups = kTile.column_groups, kM = kTile.row_tiles, kN = kTile.pairs;
    const int thread = thread_index_anew(), lane = thread % kWarp, warp = thread / kWarp;
    const int first_row = warp / kGroups * kM * 16, first_pair = warp % kGroups * kN;
    const u16* const scores = grad_score.at(lane % 8 + lane / 16 * 8, first_row + lane / 8 % 2 * 8);
    const u16* const keys = transposed_operand(shared.key, lane) + first_pair * 16;
    float sums[kM][2 * kN][4] = {};
    // Where dK has just been made, a loop keeps its products from mixing with these: registers would run out.
#pragma unroll(kDelayed ? kKeyGroups : kKeyGroups / 2)
    for (int key = 0; key < kKeys; key += 16) {
      u32 a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) load_matrices_transposed(a[m], scores + key * kScorePitch + m * 16);
#pragma unroll
      for (int pair = 0; pair < kN; ++pair)
        if (kPairs % kGroups == 0 || first_pair + pair < kPairs) {
          u32 x[4];
          load_matrices_transposed(x, keys + key * kPitch + pair * 16);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            mma<T>(sums[m][2 * pair], a[m], x[0], x[1]);
            mma<T>(sums[m][2 * pair + 1], a[m], x[2], x[3]);
          }
        }
    }
    float* const to =
        params.grad_query + (work.row_tiles + row_tile) * kTile.size() + (warp * kTile.blocks() * kWarp + lane) * 4;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n)
        if (kPairs % kGroups == 0 || first_pair + n / 2 < kPairs) {
          const float (&x)[4] = sums[m][n];
          add_to(to + (m * 2 * kN + n) * kWarp * 4, x[0], x[1], x[2], x[3]);
        }
  }

  void wait_for_rows(int row_tile) const {
    if (kOptions.deterministic && thread == 0) wait_for(query_turn(row_tile), work.tile);
  }
  void pass_rows(int row_tile) const {
    if (kOptions.deterministic && thread == 0) add_released(query_turn(row_tile), 1);
  }

  // ---- the block

  void differentiate() {
    copy_keys();
    find_row_tiles();
    const int count = numbers.tile_count;
    if (count > 0) copy_rows_of(row_tile(0), 0);
#pragma unroll
    for (int n = 0; n < 2 * kOwnPairs; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) grad_key[n][i] = grad_value[n][i] = 0;

    constexpr int kDelay = kDelayed ? 1 : 0;  // dQ of a tile is added in the next one's turn
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int stage = i % kStages;
      wait_copies<0>();
      if (kDelayed && i > 0) wait_for_rows(row_tile(i - 1));
      sync_block();
      if (i > kDelay) pass_rows(row_tile(i - 1 - kDelay));
      if (kStages > 1 && i + 1 < count) copy_rows_of(row_tile(i + 1), (i + 1) % kStages);
      if (kDelayed && i > 0) add_query_gradient(shared.grad_score[(i - 1) % kConfig.dq_stages], row_tile(i - 1));
      work_at(row_tile(i), is_tested(i), stage, shared.grad_score[i % kConfig.dq_stages]);
      if (!kDelayed) {
        wait_for_rows(row_tile(i));
        sync_block();
        add_query_gradient(shared.grad_score[0], row_tile(i));
      }
      if (kStages == 1 && i + 1 < count) {
        sync_block();
        copy_rows_of(row_tile(i + 1), 0);
      }
    }
    wait_copies<0>();
    if (kDelayed && count > 0) {
      wait_for_rows(row_tile(count - 1));
      sync_block();
      if (count > 1) pass_rows(row_tile(count - 2));
      add_query_gradient(shared.grad_score[(count - 1) % kConfig.dq_stages], row_tile(count - 1));
    }
    if (kOptions.deterministic && count > 0) {
      sync_block();
      pass_rows(row_tile(count - 1));
    }
    add_key_gradients(count, kThreads, [] { sync_block(); });
  }

  /// One tile of rows: everything but dQ, for which dS stays in shared memory.
  void work_at(int row_tile, bool is_tested, int stage, ScoreTile& grad_score) {
    const int part_row = warp_part * kPartRows, part_column = warp_part * kOwnPairs * 16;
    Scores p, ds;
    multiply(p, rows_operand(shared.key, warp_key, lane),
             columns_operand(shared.query[stage], lane) + part_row * kPitch);
    exponentiate(p, two_of(grad_score), stage, row_tile, is_tested);
    const u16* const grad_out = transposed_operand(shared.grad_out[stage], lane) + part_column;
    const u16* const query = transposed_operand(shared.query[stage], lane) + part_column;
    if constexpr (kSplit == 1) add_own(grad_value, p, grad_out);
    multiply(ds, rows_operand(shared.value, warp_key, lane),
             columns_operand(shared.grad_out[stage], lane) + part_row * kPitch);
    differentiate_softmax(ds, p, two_of(grad_score), stage, row_tile);
    store(grad_score, ds);
    if constexpr (kSplit == 1) {
      add_own(grad_key, ds, query);
    } else {
      store(shared.probability(), p);
      sync_threads(1 + warp % kKeyGroups, kSplit * kWarp);
      add_shared(grad_value, shared.probability(), grad_out);
      add_shared(grad_key, grad_score, query);
    }
  }
};

}  // namespace flash_dmattn::cuda
