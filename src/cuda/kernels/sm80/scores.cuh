// The scores of one tile of queries with the keys of its list, a tile of keys after the other.
#pragma once
#include "attention/logits.cuh"
#include "attention/place.cuh"
#include "ptx/block.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/number.cuh"
#include "ptx/warp.cuh"
#include "sm80/scores_params.cuh"
#include "sm80/tiles.cuh"

namespace flash_dmattn::cuda {

/// Where what a block reads is. It stands in shared memory, as registers are short.
struct Origins {
  const u16 *key, *value;
  const int *positions, *end;
  const u32* bits;
  const void* bias;  // BiasKind::per_key
  int count, last;   // of the list's keys; the block's last tile
  int tested;        // the first tile that needs a test
};

/// The picture of shared memory. What belongs to a tile of keys stands at the tile's number modulo the first size.
template <ScoresConfig kConfig>
struct ScoresShared {
  static constexpr int kKeys = kConfig.keys;
  Tile<kConfig.rows, kConfig.head_dim> query;
  Tile<kKeys, kConfig.head_dim> key[kConfig.stages];
  int position[4][kKeys];
  float bias[2][kKeys];                           // BiasKind::per_key, by place_of_column
  u32 test[2][kKeys * test_words(kConfig.test)];  // Interval::end or bits
  Origins origins;
  const void* row_bias[kConfig.bias == BiasKind::full ? kConfig.rows : 2];  // of key 0
  int row_position[kConfig.rows];                                           // absolute
};

/// What a thread knows of its block's work.
template <ScoresConfig kConfig>
struct Scores {
  static constexpr int kKeys = kConfig.keys, kThreads = kConfig.threads(), kStages = kConfig.stages;
  static constexpr int kRowTiles = kConfig.row_tiles(), kColumnTiles = kKeys / 8, kDim = kConfig.padded_dim();
  using Shared = ScoresShared<kConfig>;
  using T = typename TypeOf<kConfig.number>::type;
  using Accumulators = float[kRowTiles][kColumnTiles][4];

  const ScoresParams& params;
  Shared& shared;
  const int thread, lane, warp_row;  // warp_row: its first row
  const Biases<T> biases;
  const Place place;
  const KeyList list;
  const int tiles, tested;  // of keys; the first that needs a test

  Scores(const ScoresParams& given, Shared& memory)
      : params(given),
        shared(memory),
        thread(thread_index()),
        lane(thread % kWarp),
        warp_row(thread / kWarp * kRowTiles * 16),
        biases(given),
        place(given, block_index()),
        list(given.plan.list(given.shape, place.b, place.unit, place.run)),
        tiles(divide_up(list.count, kKeys)),
        tested(least(list.full, list.count) / kKeys) {
    for (int row = thread; row < kConfig.rows; row += kThreads) {
      shared.row_position[row] = place.query_of(row) + given.shape.first_position();
      if constexpr (kConfig.bias == BiasKind::full)
        shared.row_bias[row] =
            place.has(row) ? biases.row(place.b, place.head_of(row), place.query_of(row)) : given.bias.data;
    }
    if (thread != 0) return;
    shared.origins = {
        given.key.template at<u16>(place.b, 0, given.shape.kv_head(place.unit)),
        nullptr,
        given.plan.positions ? given.plan.positions + list.offset : nullptr,
        given.plan.end ? given.plan.end + place.b * given.plan.end_batch + place.unit * given.plan.end_unit : nullptr,
        given.plan.bits + list.offset * given.plan.words,
        kConfig.bias == BiasKind::per_key ? biases.row(place.b, place.unit * given.shape.pack, 0) : nullptr,
        list.count,
        tiles - 1,
        tested};
  }

  /// The row of the tile that accumulators [m][…][2 * half …] belong to.
  int row_of(int m, int half) const { return warp_row + 16 * m + 8 * half + lane / 4; }

  // ---- copies

  void copy_queries() {
    copy_rows<kThreads>(shared.query, thread, [&](int row, int column) {
      const bool valid = place.has(row);
      return Source{
          params.query.template at<u16>(place.b, valid ? place.query_of(row) : 0, valid ? place.head_of(row) : 0) +
              column,
          valid && params.logits.sign != 0};
    });
    zero_padding<kThreads>(shared.query, thread);
    for (int stage = 0; stage < kStages; ++stage) zero_padding<kThreads>(shared.key[stage], thread);
  }
  /// Once they are there: with a negative scale the queries change sign, so that the largest score is that of the
  /// largest product.
  void sign_queries() {
    if (params.logits.sign >= 0) return;
    for (int i = thread; i < kConfig.rows * tile_pitch(kConfig.head_dim) / 2; i += kThreads)
      reinterpret_cast<u32*>(shared.query.numbers)[i] ^= 0x80008000u;
    sync_block();
  }

  /// Starts copying the rows of a tile of keys, whose positions are in shared memory.
  template <class AnyTile>
  void copy_keys(AnyTile& to, const u16* from, i64 stride, int tile) {
    const int* const positions = shared.position[tile % 4];
    // In bytes and 32 bits, an address is one instruction. make_scores refuses longer strides.
    const int bytes = static_cast<int>(stride) * 2;
    copy_rows<kThreads>(to, thread, [&](int row, int column) {
      const char* const first = reinterpret_cast<const char*>(from + column);
      return Source{reinterpret_cast<const u16*>(first + static_cast<i64>(positions[row]) * bytes), true};
    });
  }

  // ---- what belongs to the keys of a tile, and is fetched before it is needed: a thread looks after one key

  /// Starts copying the positions of a tile. Entries beyond the end of the list stand for the last one, and are masked.
  void copy_positions(int tile) {
    int* const to = shared.position[tile % 4] + thread;
    const int entry = static_cast<int>(least<u32>(static_cast<u32>(tile) * kKeys + thread, shared.origins.count - 1));
    if (params.plan.positions)
      copy_async_4(to, shared.origins.positions + entry, true);
    else
      *to = entry;
  }
  /// Before the first tile.
  void fetch(int tile) {
    sync_block();
    if (thread < kKeys) {
      copy_positions(tile);
      copy_positions(tile + 1);
    }
    commit_copies();
    wait_copies<0>();
    sync_block();
    fetch_bias(tile);
    put_bias(tile);
  }
  u32 next_bias;  // bits
  void fetch_bias(int tile) {
    if constexpr (kConfig.bias == BiasKind::per_key)
      if (thread < kKeys) next_bias = biases.bits(shared.origins.bias, shared.position[tile % 4][thread]);
  }
  void put_bias(int tile) {
    if constexpr (kConfig.bias == BiasKind::per_key)
      if (thread < kKeys) shared.bias[tile % 2][place_of_column(thread)] = biases.scaled(next_bias);
  }
  /// Starts copying what the test of a tile needs.
  void copy_test(int tile) {
    if (tile < shared.origins.tested) return;
    if (thread >= kKeys) return;
    const Plan& plan = params.plan;
    const i64 entry = static_cast<i64>(tile) * kKeys + thread;
    const bool exists = entry < shared.origins.count;
    u32* const to = shared.test[tile % 2] + thread * test_words(kConfig.test);
    if constexpr (kConfig.test == Test::interval) {
      if (exists && plan.end)
        copy_async_4(to, shared.origins.end + shared.position[tile % 4][thread] * plan.end_key, true);
      else
        *to = exists ? kLargest : kSmallest;
    } else {
      // Nobody sees what is beyond the end of the list.
      const u32* const from = shared.origins.bits + (exists ? entry * plan.words : 0);
      for (int word = 0; word < plan.words; ++word) copy_async_4(to + word, from + word, exists);
    }
  }

  // ---- scores

  /// The scores of a tile whose keys are in shared memory. Biases come last: a tensor core cuts products off, instead
  /// of rounding them, to the bits that a large accumulator has left.
  void compute(Accumulators& s, int stage, int tile) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0;
    add_products(s, stage);
    if constexpr (kConfig.softcap) cap_scores(s, params.logits);
    if constexpr (kConfig.bias == BiasKind::per_key)
      if (params.bias.data)
        add_key_biases(s, shared.bias[tile % 2], lane);  // always: loads, moved up, would need registers
    if constexpr (kConfig.bias == BiasKind::full) add_bias(s, tile);
  }

  void add_bias(Accumulators& s, int tile) {
    const int thread = thread_index_anew(), lane = thread % kWarp,
              first_row = thread / kWarp * kRowTiles * 16 + lane / 4;
    const bool by_pairs =
        !params.plan.positions && (tile + 1) * static_cast<i64>(kKeys) <= shared.origins.count && biases.are_pairs();
    biases.add(s, shared.position[tile % 4] + lane % 4 * 2, by_pairs,
               [&](int m, int half) { return shared.row_bias[first_row + 16 * m + 8 * half]; });
  }

  /// Where operands always stand at the same place, their addresses, computed anew, need no registers in between.
  int operand_thread() const { return kStages == 1 ? thread_index_anew() : thread; }

  void add_products(Accumulators& s, int stage) {
    const int thread = operand_thread(), lane = thread % kWarp;
    const u16* const rows = rows_operand(shared.query, thread / kWarp * kRowTiles * 16, lane);
    const u16* const columns = columns_operand(shared.key[stage], lane);
    constexpr int kPitch = tile_pitch(kConfig.head_dim);
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      u32 q[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) load_matrices(q[m], rows + 16 * m * kPitch + d);
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        u32 k[4];
        load_matrices(k, columns + 8 * n * kPitch + d);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma<T>(s[m][n], q[m], k[0], k[1]);
          mma<T>(s[m][n + 1], q[m], k[2], k[3]);
        }
      }
    }
  }

  void mask(Accumulators& s, int tile) {
    const int thread = thread_index_anew(), lane = thread % kWarp, warp_row = thread / kWarp * kRowTiles * 16;
    const int* const positions = shared.row_position + warp_row + lane / 4;
    int at[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) at[m][half] = positions[16 * m + 8 * half];
    if constexpr (kConfig.test == Test::interval) {
      mask_by_intervals(s, lane, at, params.plan.is_causal, shared.position[tile % 4], shared.test[tile % 2]);
    } else {
      const int warp_position = shared.row_position[warp_row];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) at[m][half] -= warp_position;
      mask_by_bits<kMostWords>(s, lane, at, warp_position - shared.row_position[0], params.plan.words,
                               shared.test[tile % 2]);
    }
  }
};

}  // namespace flash_dmattn::cuda
