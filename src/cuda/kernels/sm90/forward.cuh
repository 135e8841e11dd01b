// The forward pass on Hopper: one warpgroup gathers keys and values, the others multiply. Blocks stay, and take one
// tile of rows after the other.
#pragma once
#include "attention/logits.cuh"
#include "attention/place.cuh"
#include "attention/softmax.cuh"
#include "ptx/barrier.cuh"
#include "ptx/block.cuh"
#include "ptx/bulk.cuh"
#include "ptx/memory.cuh"
#include "ptx/number.cuh"
#include "ptx/warp.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/forward_params.cuh"
#include "sm90/panels.cuh"

namespace flash_dmattn::cuda {

template <HopperForwardOptions kOptions>
struct HopperForward {
  static constexpr HopperForwardConfig kConfig = hopper_forward_config(kOptions.head_dim, kOptions.test);
  static constexpr int kThreads = kConfig.threads(), kBlocksPerMultiprocessor = 1;
  static constexpr int kRows = kConfig.rows, kKeys = kConfig.keys, kStages = kConfig.stages, kDim = kConfig.dim;
  static constexpr int kConsumers = kConfig.consumers(), kChunks = kOptions.head_dim / 8;
  static constexpr int kTestWords = hopper_test_words(kOptions.test);
  static constexpr bool kHasKeyBias = kOptions.bias == BiasKind::per_key, kHasBits = kOptions.test == Test::bits;
  using Params = HopperForwardParams;
  using T = typename TypeOf<kOptions.number>::type;

  /// What is known of a tile of keys.
  struct KeyNumbers {
    float bias[kKeys];  // BiasKind::per_key
    int position[kKeys];
    u32 test[kKeys * kTestWords];  // Interval::end or bits, where tested
  };
  /// A tile of rows, and how many tiles of keys it sees.
  struct Work {
    int b = 0, unit = 0, run = 0;
    int tiles = -1;  // -1: there is no more work
    int tested = 0;  // the first that needs a test
    int whole = 0;   // how many have no entries beyond the end of the list
  };
  /// The picture of shared memory.
  struct Shared {
    Panels<kRows, kConfig.panels()> query;
    Panels<kKeys, kConfig.panels()> key[kStages], value[kStages];
    KeyNumbers numbers[kStages];  // of `key`
    Barrier query_full, query_empty, key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
    Work work[2];                // the queries' and the last one's
    int is_far[4 * kConsumers];  // of each warp, for Softmax
  };
  static_assert(sizeof(Shared) <= kConfig.shared_bytes && kConfig.shared_bytes <= shared_capacity(90));

  enum NamedBarrier { kCopying = 1, kTurn = 2 };

  static void run(const Params& params, char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (thread_index() == 0) {
      init(shared.query_full, 2 * kWarpgroup);
      init(shared.query_empty, kConsumers * kWarpgroup);
      for (int stage = 0; stage < kStages; ++stage) {
        init(shared.key_full[stage], 2 * kWarpgroup);
        init(shared.value_full[stage], kWarpgroup);
        init(shared.key_empty[stage], kConsumers * kWarpgroup);
        init(shared.value_empty[stage], kConsumers * kWarpgroup);
      }
      fence_barriers();
    }
    if constexpr (kDim != kOptions.head_dim) {
      zero_padding<kChunks, kDim>(shared.query, thread_index(), kThreads);
      for (int stage = 0; stage < kStages; ++stage) {
        zero_padding<kChunks, kDim>(shared.key[stage], thread_index(), kThreads);
        zero_padding<kChunks, kDim>(shared.value[stage], thread_index(), kThreads);
      }
      fence_for_bulk();
    }
    sync_block();
    if (thread_index() / kWarpgroup == kConsumers) {
      shrink_registers<kConfig.copy_registers>();
      Producer(params, shared).run();
    } else {
      grow_registers<kConfig.registers>();
      Consumer(params, shared).run();
    }
  }

  /// How many tiles of keys have gone through the ring of stages; one register.
  struct Ring {
    u32 count = 0;
    int stage() const { return static_cast<int>(count % kStages); }
    int parity() const { return static_cast<int>(count / kStages % 2); }
    Ring before() const { return {count - 1}; }
  };
  static_assert((kStages & (kStages - 1)) == 0);

  struct Producer {
    const Params& params;
    Shared& shared;
    const int thread;
    Ring ring;
    int position;  // of this thread's key of the next tile
    u32 bias;      // its bits

    Producer(const Params& given, Shared& memory)
        : params(given), shared(memory), thread(thread_index() % kWarpgroup) {}

    /// Blocks go there and back over all tiles of rows, longest lists first: each gets long ones and short ones.
    void run() {
      const ScoresParams& scores = params.scores;
      const int count = scores.plan.runs * scores.shape.units() * scores.shape.batch, blocks = grid_blocks();
      int works = 0;
#pragma unroll 1
      for (int round = 0; round * blocks < count; ++round) {
        const int index = round * blocks + (round % 2 == 0 ? block_index() : blocks - 1 - block_index());
        if (index >= count) continue;
        const Place place(scores, index);
        const KeyList list = scores.plan.list(scores.shape, place.b, place.unit, place.run);
        copy(place, list, works++);
      }
      announce(Work{}, works);
      arrive_after_copies(shared.query_full);
    }

    /// As soon as the queries' place is free, which the work's place is then: the consumers have finished the last but
    /// one.
    void announce(const Work& work, int works) {
      wait(shared.query_empty, works % 2 ^ 1);
      if (thread == 0) shared.work[works % 2] = work;
      arrive(shared.query_full);
    }

    void copy(const Place& place, const KeyList& list, int works) {
      const int kv_head = params.scores.shape.kv_head(place.unit), tiles = divide_up(list.count, kKeys);
      const u16* const key = params.scores.key.template at<u16>(place.b, 0, kv_head);
      const u16* const value = params.value.template at<u16>(place.b, 0, kv_head);
      const Work work{.b = place.b,
                      .unit = place.unit,
                      .run = place.run,
                      .tiles = tiles,
                      .tested = least(list.full, list.count) / kKeys,
                      .whole = list.count / kKeys};
      if (tiles > 0) fetch(place, list, 0);
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        KeyNumbers& numbers = shared.numbers[ring.stage()];
        wait(shared.key_empty[ring.stage()], ring.parity() ^ 1);
        if (thread < kKeys) {
          numbers.position[thread] = position;
          if constexpr (kHasKeyBias) numbers.bias[thread] = Biases<T>(params.scores).scaled(bias);
          if (tile >= work.tested) copy_test(place, list, tile, numbers);
        }
        sync_threads(kCopying, kWarpgroup);
        copy_keys(shared.key[ring.stage()], key, params.scores.key.position, numbers);
        arrive_after_copies(shared.key_full[ring.stage()]);
        arrive(shared.key_full[ring.stage()]);
        // After the first keys, for whose place nobody waits while the last tile of rows is being finished.
        if (tile == 0) copy_queries(place, work, works);
        if (tile + 1 < tiles) fetch(place, list, tile + 1);
        wait(shared.value_empty[ring.stage()], ring.parity() ^ 1);
        copy_keys(shared.value[ring.stage()], value, params.value.position, numbers);
        arrive_after_copies(shared.value_full[ring.stage()]);
        ++ring.count;
      }
      if (tiles == 0) copy_queries(place, work, works);
    }

    void copy_queries(const Place& place, const Work& work, int works) {
      announce(work, works);
      gather_rows<kChunks>(shared.query, thread, [&](int row) -> const u16* {
        if (!place.has(row) || params.scores.logits.sign == 0) return nullptr;
        return params.scores.query.template at<u16>(place.b, place.query_of(row), place.head_of(row));
      });
      arrive_after_copies(shared.query_full);
    }
    template <class Tile>
    void copy_keys(Tile& to, const u16* from, i64 stride, const KeyNumbers& numbers) {
      // In bytes and 32 bits, an address is one instruction. make_scores refuses longer strides.
      const int bytes = static_cast<int>(stride) * 2;
      gather_rows<kChunks>(to, thread, [&](int row) {
        return reinterpret_cast<const u16*>(reinterpret_cast<const char*>(from) +
                                            static_cast<i64>(numbers.position[row]) * bytes);
      });
    }

    /// What belongs to the keys of a tile: a thread looks after one key. Entries beyond the end of the list stand for
    /// the last one, and are masked.
    void fetch(const Place& place, const KeyList& list, int tile) {
      if (thread >= kKeys) return;
      position = params.scores.plan.key(list, least(tile * kKeys + thread, list.count - 1));
      if constexpr (kHasKeyBias) {
        const Biases<T> biases(params.scores);
        bias = biases.bits(biases.row(place.b, place.unit * params.scores.shape.pack, 0), position);
      }
    }
    void copy_test(const Place& place, const KeyList& list, int tile, KeyNumbers& numbers) const {
      const Plan& plan = params.scores.plan;
      const int entry = tile * kKeys + thread;
      const bool exists = entry < list.count;
      u32* const to = numbers.test + thread * kTestWords;
      if constexpr (kHasBits) {
        // Nobody sees what is beyond the end of the list.
        const u32* const from = plan.bits + (list.offset + (exists ? entry : 0)) * plan.words;
        for (int word = 0; word < plan.words; ++word) copy_async_4(to + word, from + word, exists);
      } else {
        *to = exists ? plan.interval(place.b, place.unit, position).end : kSmallest;
      }
    }
  };

  struct Consumer {
    static constexpr int kColumnTiles = kKeys / 8, kOutTiles = kDim / 8;
    using Scores = float[1][kColumnTiles][4];

    const Params& params;
    Shared& shared;
    const int warpgroup;
    Ring ring;
    float out[1][kOutTiles][4];
    u32 probabilities[kKeys / 16][4];

    Consumer(const Params& given, Shared& memory)
        : params(given), shared(memory), warpgroup(shuffle(thread_index() / kWarpgroup, 0)) {}

    // Registers are scarce: where a thread is, is read anew.
    static int lane() { return thread_index_anew() % kWarp; }
    static int warp_row() { return thread_index_anew() / kWarp * 16; }  // its first of the tile
    static int row_of(int half) { return warp_row() + 8 * half + lane() / 4; }
    Place place_of(const Work& work) const { return {params.scores, work.b, work.unit, work.run}; }

    void run() {
#pragma unroll 1
      for (int works = 0; true; ++works) {
        wait(shared.query_full, works % 2);
        const Work& work = shared.work[works % 2];
        if (work.tiles < 0) break;
        Softmax<1> softmax(params.scores.logits.factor, shared.is_far[thread_index() / kWarp]);
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[0][n][i] = 0;
        if (work.tiles > 0) attend(work, softmax);
        arrive(shared.query_empty);
        write(work, softmax);
      }
    }

    void attend(const Work& work, Softmax<1>& softmax) {
      Scores s;
      float scale[1][2];
      wait(shared.key_full[ring.stage()], ring.parity());
      fence_for_bulk();
      multiply_keys(s);
      wait_products<0>();
      finish(s, work, 0);
      softmax.follow(s, scale);
      softmax.exponentiate(s);
      pack(s);
#pragma unroll 1
      for (int tile = 1; tile < work.tiles; ++tile) {
        ++ring.count;
        wait(shared.key_full[ring.stage()], ring.parity());
        fence_for_bulk();
        multiply_keys(s);
        const Ring last = ring.before();
        wait(shared.value_full[last.stage()], last.parity());
        fence_for_bulk();
        multiply_values(last.stage());
        wait_products<1>();
        finish(s, work, tile);
        const bool moves = softmax.follow(s, scale);
        softmax.exponentiate(s);
        wait_products<0>();
        arrive(shared.value_empty[ring.before().stage()]);
        if (moves) softmax.rescale(out, scale);
        pack(s);
      }
      wait(shared.value_full[ring.stage()], ring.parity());
      fence_for_bulk();
      multiply_values(ring.stage());
      wait_products<0>();
      arrive(shared.value_empty[ring.stage()]);
      ++ring.count;
    }

    void multiply_keys(Scores& s) {
      auto& accumulators = reinterpret_cast<float (&)[kKeys / 2]>(s);
      const Operand query = shared.query.rows(64 * warpgroup), key = shared.key[ring.stage()].rows();
      fence_products();
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step)
        multiply<T, kKeys, Major::k, Major::k>(accumulators, query + shared.query.along_columns(step),
                                               key + shared.key[0].along_columns(step), step > 0);
      commit_products();
    }
    void multiply_values(int stage) {
      auto& accumulators = reinterpret_cast<float (&)[kDim / 2]>(out);
      const Operand value = shared.value[stage].transposed();
      fence_products();
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step)
        multiply<T, kDim, Major::mn>(accumulators, probabilities[step], value + shared.value[0].along_rows(step), true);
      commit_products();
    }

    /// Products to scores; after it the tile of keys is not needed any more.
    void finish(Scores& s, const Work& work, int tile) {
      const KeyNumbers& numbers = shared.numbers[ring.stage()];
      if constexpr (kOptions.softcap) cap_scores(s, params.scores.logits);
      if constexpr (kHasKeyBias) add_key_biases(s, numbers.bias, lane());
      if constexpr (kOptions.bias == BiasKind::full) add_full_bias(s, work, numbers, tile < work.whole);
      if (tile >= work.tested) mask(s, work, numbers);
      arrive(shared.key_empty[ring.stage()]);
    }

    void add_full_bias(Scores& s, const Work& work, const KeyNumbers& numbers, bool is_whole) {
      const Place place = place_of(work);
      const Biases<T> biases(params.scores);
      const bool by_pairs = !params.scores.plan.positions && is_whole && biases.are_pairs();
      biases.add(s, numbers.position + lane() % 4 * 2, by_pairs, [&](int, int half) {
        const int row = place.has(row_of(half)) ? row_of(half) : 0;
        return biases.row(place.b, place.head_of(row), place.query_of(row));
      });
    }

    void mask(Scores& s, const Work& work, const KeyNumbers& numbers) {
      const Place place = place_of(work);
      const Plan& plan = params.scores.plan;
      int at[1][2];
      if constexpr (kHasBits) {
        const int first = place.query_of(warp_row());
        for (int half = 0; half < 2; ++half) at[0][half] = place.query_of(row_of(half)) - first;
        mask_by_bits<kTestWords>(s, lane(), at, first - place.first_query, plan.words, numbers.test);
      } else {
        for (int half = 0; half < 2; ++half)
          at[0][half] = place.query_of(row_of(half)) + params.scores.shape.first_position();
        mask_by_intervals(s, lane(), at, plan.is_causal, numbers.position, numbers.test);
      }
    }

    /// Exponentials as operand A of the product with the values.
    void pack(const Scores& s) {
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const from = s[0][2 * k + i / 2] + i % 2 * 2;
          probabilities[k][i] = cuda::pack<T>(from[0], from[1]);
        }
    }

    void write(const Work& work, Softmax<1>& softmax) {
      const Place place = place_of(work);

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(half);
        float sum = quad_sum(softmax.sum[0][half]), scale = fast_reciprocal(sum);
        if (!place.has(row)) continue;
        const int q = place.query_of(row), h = place.head_of(row);
        if (sum == 0 || params.scores.plan.is_hidden(place.b, place.unit, q)) scale = sum = 0;
        if (lane() % 4 == 0)
          *params.lse.at(place.b, h, q) = natural_lse(softmax.finite_reference(0, half) * softmax.factor, sum);
        u32* const to = reinterpret_cast<u32*>(params.out.template at<u16>(place.b, q, h)) + lane() % 4;
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n)
          if (kDim == kOptions.head_dim || n < kChunks)
            to[4 * n] = cuda::pack<T>(out[0][n][2 * half] * scale, out[0][n][2 * half + 1] * scale);
      }
    }
  };
};

}  // namespace flash_dmattn::cuda
