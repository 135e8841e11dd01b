// The scores of one tile of queries with the keys of its list, a tile of keys after the other.
#pragma once
#include "ptx/block.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/number.cuh"
#include "ptx/warp.cuh"
#include "sm80/masks.cuh"
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
  float bias[2][kKeys];                           // BiasKind::per_key
  u32 test[2][kKeys * test_words(kConfig.test)];  // Interval::end or bits
  Origins origins;
  const void* row_bias[kConfig.bias == BiasKind::full ? kConfig.rows : 2];  // of key 0
  int row_position[kConfig.rows];                                           // absolute
  int is_far[8];                                                            // of each warp, for Softmax
};

/// Which rows a block's tile has. Blocks take the longest lists first: of a causal call those of the last queries.
struct Place {
  const ScoresParams& params;
  int b, unit, run, first_query;

  explicit Place(const ScoresParams& given) : params(given) {
    const int units = params.shape.units(), index = block_index();
    unit = index % units;
    b = index / units % params.shape.batch;
    run = params.plan.runs - 1 - index / units / params.shape.batch;
    first_query = run * params.plan.run;
  }
  int query_of(int row) const { return first_query + row / params.shape.pack; }
  int head_of(int row) const { return unit * params.shape.pack + row % params.shape.pack; }
  bool has(int row) const {
    return row / params.shape.pack < params.plan.run && query_of(row) < params.shape.query_len;
  }
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
  const Place place;
  const KeyList list;
  const int tiles, tested;  // of keys; the first that needs a test

  Scores(const ScoresParams& given, Shared& memory)
      : params(given),
        shared(memory),
        thread(thread_index()),
        lane(thread % kWarp),
        warp_row(thread / kWarp * kRowTiles * 16),
        place(given),
        list(given.plan.list(given.shape, place.b, place.unit, place.run)),
        tiles(divide_up(list.count, kKeys)),
        tested(least(list.full, list.count) / kKeys) {
    for (int row = thread; row < kConfig.rows; row += kThreads) {
      shared.row_position[row] = place.query_of(row) + given.shape.first_position();
      if constexpr (kConfig.bias == BiasKind::full)
        shared.row_bias[row] = place.has(row) ? bias_of(place.head_of(row), place.query_of(row)) : given.bias.data;
    }
    if (thread != 0) return;
    shared.origins = {
        given.key.template at<u16>(place.b, 0, given.shape.kv_head(place.unit)),
        nullptr,
        given.plan.positions ? given.plan.positions + list.offset : nullptr,
        given.plan.end ? given.plan.end + place.b * given.plan.end_batch + place.unit * given.plan.end_unit : nullptr,
        given.plan.bits + list.offset * given.plan.words,
        kConfig.bias == BiasKind::per_key ? bias_of(place.unit * given.shape.pack, 0) : nullptr,
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
  const void* bias_of(int head, int query) const {
    const Bias& bias = params.bias;
    return static_cast<const char*>(bias.data) + bias.offset(place.b, head, query, 0) * (bias.is_float32 ? 4 : 2);
  }
  u32 bias_bits(const void* biases, i64 offset) const {
    return params.bias.is_float32 ? static_cast<const u32*>(biases)[offset] : static_cast<const u16*>(biases)[offset];
  }
  float scaled_bias(u32 bits) const {
    return scaled_bias(params.bias.is_float32 ? float_of(bits) : to_float(T{static_cast<u16>(bits)}));
  }
  float scaled_bias(float x) const {
    const float scaled = x * params.logits.bias_factor;
    return x == -kInfinity ? x : maximum(minimum(scaled, kLargestBias), -kLargestBias);
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
      if (thread < kKeys)
        next_bias = bias_bits(shared.origins.bias, shared.position[tile % 4][thread] * params.bias.key);
  }
  void put_bias(int tile) {
    if constexpr (kConfig.bias == BiasKind::per_key)
      if (thread < kKeys) shared.bias[tile % 2][thread] = scaled_bias(next_bias);
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
    if constexpr (kConfig.softcap) cap(s);
    if constexpr (kConfig.bias == BiasKind::per_key)
      if (params.bias.data) add_bias(s, shared.bias[tile % 2]);  // always: loads, moved up, would need registers
    if constexpr (kConfig.bias == BiasKind::full) add_bias(s, tile);
  }

  void add_bias(Accumulators& s, const float (&biases)[kKeys]) {
    const float* const bias = biases + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] += bias[8 * n + i % 2];
  }
  void add_bias(Accumulators& s, int tile) {
    const int thread = thread_index_anew(), lane = thread % kWarp,
              first_row = thread / kWarp * kRowTiles * 16 + lane / 4;
    const int* const positions = shared.position[tile % 4] + lane % 4 * 2;
    const bool by_pairs = has_bias_pairs(tile);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const void* const of_row = shared.row_bias[first_row + 16 * m + 8 * half];
        if (by_pairs) {
          const int first = positions[0];
#pragma unroll
          for (int n = 0; n < kColumnTiles; ++n) {
            const Pair pair = bias_pair(of_row, first + 8 * n);
            s[m][n][2 * half] += scaled_bias(pair.x);
            s[m][n][2 * half + 1] += scaled_bias(pair.y);
          }
        } else {
#pragma unroll
          for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              s[m][n][2 * half + i] += scaled_bias(bias_bits(of_row, positions[8 * n + i] * params.bias.key));
        }
      }
  }
  struct alignas(8) Pair {
    float x, y;
  };
  Pair bias_pair(const void* biases, int key) const {
    if (params.bias.is_float32) return *reinterpret_cast<const Pair*>(static_cast<const float*>(biases) + key);
    const u32 both = *reinterpret_cast<const u32*>(static_cast<const u16*>(biases) + key);
    return {to_float(T{static_cast<u16>(both)}), to_float(T{static_cast<u16>(both >> 16)})};
  }
  /// Whether the biases of a tile's neighbouring keys stand side by side, aligned.
  bool has_bias_pairs(int tile) const {
    const Bias& bias = params.bias;
    return bias.key == 1 && !params.plan.positions && (tile + 1) * static_cast<i64>(kKeys) <= shared.origins.count &&
           ((bias.batch | bias.head | bias.query) & 1) == 0 &&
           reinterpret_cast<u64>(bias.data) % (bias.is_float32 ? 8 : 4) == 0;
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

  void cap(Accumulators& s) {
    const Logits& logits = params.logits;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)  // tanh(x) = 1 - 2 / (1 + e^2x)
          s[m][n][i] =
              multiply_add(-2 * logits.cap, fast_reciprocal(1 + fast_exp2(s[m][n][i] * logits.inner)), logits.cap);
  }

  void mask(Accumulators& s, int tile) {
    const int thread = thread_index_anew(), lane = thread % kWarp, warp_row = thread / kWarp * kRowTiles * 16;
    const int* const positions = shared.row_position + warp_row + lane / 4;
    if constexpr (kConfig.test == Test::interval) {
      int at[kRowTiles][2];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) at[m][half] = positions[16 * m + 8 * half];
      mask_scores(s, lane, [&](int column) {
        const int start = params.plan.is_causal ? shared.position[tile % 4][column] : kSmallest;
        const int end = static_cast<int>(shared.test[tile % 2][column]);
        return [=, &at](int m, int half) { return start <= at[m][half] && at[m][half] < end; };
      });
    } else {
      // The positions of a warp's rows are at most 32 neighbours: 32 of the key's bits, from any bit on.
      const int words = params.plan.words, warp_position = shared.row_position[warp_row],
                first = warp_position - shared.row_position[0];
      const int low = least(first / 32, words - 1), high = least(low + 1, words - 1);
      int bit[kRowTiles][2];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) bit[m][half] = positions[16 * m + 8 * half] - warp_position;
      mask_scores(s, lane, [&](int column) {
        const u32* const bits = shared.test[tile % 2] + column * kMostWords;
        const u32 seen = static_cast<u32>((static_cast<u64>(bits[high]) << 32 | bits[low]) >> (first % 32));
        return [=, &bit](int m, int half) { return (seen >> bit[m][half] & 1) != 0; };
      });
    }
  }
};

}  // namespace flash_dmattn::cuda
