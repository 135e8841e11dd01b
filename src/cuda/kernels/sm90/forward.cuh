// The forward pass on Hopper: one warpgroup copies queries, keys and values, the others multiply. Blocks stay, and take
// one tile of rows after the other.
#pragma once
#include "attention/chunk.cuh"
#include "attention/logits.cuh"
#include "attention/place.cuh"
#include "attention/softmax.cuh"
#include "ptx/barrier.cuh"
#include "ptx/block.cuh"
#include "ptx/boxes.cuh"
#include "ptx/bulk.cuh"
#include "ptx/memory.cuh"
#include "ptx/number.cuh"
#include "ptx/warp.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/forward_params.cuh"
#include "sm90/panels.cuh"
#include "sm90/terms.cuh"

namespace flash_dmattn::cuda {

template <HopperForwardOptions kOptions>
struct HopperForward {
  static constexpr HopperForwardConfig kConfig = hopper_forward_config(kOptions);
  static constexpr int kThreads = kConfig.threads(), kBlocksPerMultiprocessor = 1;
  static constexpr int kRows = kConfig.rows, kKeys = kConfig.keys, kStages = kConfig.stages, kDim = kConfig.dim;
  static constexpr int kConsumers = kConfig.consumers(), kConsumerWarps = 4 * kConsumers;
  static constexpr int kPanels = kConfig.panels(), kChunks = kOptions.head_dim / 8;
  static constexpr int kTestWords = hopper_test_words(kOptions.test);
  static constexpr bool kHasKeyBias = kOptions.bias == BiasKind::per_key, kHasBits = kOptions.test == Test::bits;
  /// The products of queries and keys add the biases; a cap has to come before them.
  static constexpr bool kHasTerms = kConfig.has_terms;
  using Params = HopperForwardParams;
  using T = typename TypeOf<kOptions.number>::type;

  /// What is known of a tile of keys.
  struct KeyNumbers {
    using KeyBias = typename BiasType<kHasTerms>::type;
    alignas(16) KeyBias bias[kKeys];  // BiasKind::per_key; numbers by place_of_column
    int position[kKeys];
    u32 test[kTestWords * kKeys];  // where tested: the rows that see a key, first ones and ends, or its bits
  };
  /// A tile of rows, and how many tiles of keys it sees.
  struct Work {
    int b = 0, unit = 0;
    int first_query = 0, queries = 0;
    int tiles = -1;  // -1: there is no more work
    int tested = 0;  // the first that needs a test
    int whole = 0;   // how many have no entries beyond the end of the list
  };
  /// Where what a tile of rows needs is. It stands in shared memory, as registers are short.
  struct Origins {
    int round;  // the block's works before
    Work work;
    KeyList list;
    int kv_head;
    const u16 *key, *value;
    const void* bias;  // BiasKind::per_key
  };
  /// The picture of shared memory.
  struct Shared {
    Panels<kRows, kPanels> query;
    Panels<kKeys, kPanels> key[kStages], value[kStages];
    KeyNumbers numbers[kStages];  // of `key`
    Terms ones[kHasTerms ? 64 : 1], zeros[kHasTerms ? most(kKeys, 64) : 1];
    const void* row_bias[kOptions.bias == BiasKind::full ? kRows : 1];  // of key 0
    Barrier query_full[kConsumers], query_empty[kConsumers];            // of each part
    Barrier key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
    Origins origins;           // of what is copied
    Work work[2][kConsumers];  // of each part of the queries: theirs and the last one's
  };
  static_assert(kKeys <= kWarpgroup && sizeof(Shared) <= kConfig.shared_bytes &&
                kConfig.shared_bytes <= shared_capacity(90));

  enum NamedBarrier { kCopying = 1 };

  /// Threads of a warp that between them read all numbers of a tile of keys, and of which one writes a row's lse; the
  /// last four do so last. They say so themselves: racecheck does not see a sync_warp, which needs no instruction where
  /// a warp is together anyway.
  static constexpr int kLastReaders = 4;

  static void run(const Params& params, char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (thread_index() == 0) {
      for (int part = 0; part < params.query_parts; ++part) {
        init(shared.query_full[part], 1);
        init(shared.query_empty[part], kLastReaders * kConsumerWarps / params.query_parts);
      }
      const int copies = params.by_boxes ? 1 : kWarpgroup;
      for (int stage = 0; stage < kStages; ++stage) {
        init(shared.key_full[stage], kWarpgroup + copies);
        init(shared.value_full[stage], copies);
        init(shared.key_empty[stage], kLastReaders * kConsumerWarps);
        init(shared.value_empty[stage], kConsumerWarps);
      }
      fence_barriers();
    }
    zero_uncopied(params, shared);
    sync_block();
    if (thread_index() / kWarpgroup == kConsumers) {
      shrink_registers<kConfig.copy_registers>();
      Producer(params, shared).run();
    } else {
      grow_registers<kConfig.registers>();
      Consumer(params, shared).run();
    }
  }

  /// What products read and nothing is ever copied to.
  static void zero_uncopied(const Params& params, Shared& shared) {
    zero_rows(shared.query, rows_of_tile(params), thread_index(), kThreads);
    if constexpr (kHasTerms) {
      for (int i = thread_index(); i < 64; i += kThreads) shared.ones[i] = Terms::ones();
      for (int i = thread_index(); i < most(kKeys, 64); i += kThreads) shared.zeros[i] = Terms{};
    }
    if constexpr (kDim != kOptions.head_dim)
      for (int stage = 0; stage < kStages; ++stage) {
        zero_padding<kChunks, kDim>(shared.key[stage], thread_index(), kThreads);
        zero_padding<kChunks, kDim>(shared.value[stage], thread_index(), kThreads);
      }
    fence_for_bulk();
  }

  /// Where a tile of keys stands: stages are taken in turn, and each time the barriers have the other parity.
  struct Ring {
    int stage = 0, parity = 0;
    void advance() {
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  };
  /// Of a value that all threads of a warp have: the compiler then keeps it, and what follows from it, once for all.
  static int uniform(int x) { return shuffle(x, 0); }

  /// Of kRows; the others are to spare.
  static int rows_of_tile(const Params& params) { return params.scores.plan.runs.length * params.scores.shape.pack; }
  /// A row of a tile.
  struct Row {
    int query, head;  // counted from the tile's first
  };
  static Row row_at(const Params& params, int row) {
    const int query = static_cast<int>(static_cast<u32>(row) * params.inverse_pack >> 16);
    return {query, row - query * params.scores.shape.pack};
  }

  struct Producer {
    const Params& params;
    Shared& shared;
    Ring ring;
    // Of this thread's key of the next tile.
    int position;
    u32 bias;             // its bits
    int end;              // where it is tested by intervals
    int second_position;  // of the key after it, in the tile after that
    // A thread copies a part of so many keys.
    static constexpr int kRowsAtOnce = kWarpgroup / kGatherLanes, kRowsOfThread = kKeys / kRowsAtOnce;
    static_assert(kKeys % kRowsAtOnce == 0);

    Producer(const Params& given, Shared& memory) : params(given), shared(memory) {}

    // Registers are scarce: where a thread is, is read anew.
    static int thread() { return thread_index_anew() % kWarpgroup; }

    void run() {
      if (thread() == 0) {
        shared.origins.round = -1;
        prefetch_map(params.query_boxes);
      }
      while (find_work()) copy();
      copy_queries();
    }

    /// Blocks go there and back over all tiles of rows, longest lists first: each gets long ones and short ones. False:
    /// there is no more.
    bool find_work() {
      sync_threads(kCopying, kWarpgroup);  // nobody reads the last origins
      if (thread() == 0) {
        const u32 round = ++shared.origins.round;
        const u32 blocks = grid_blocks(), block = block_index();
        const u32 index = round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
        if (index < params.works)
          find_origins(Place(params.scores, static_cast<int>(index), params.units));
        else
          shared.origins.work = Work{};
      }
      sync_threads(kCopying, kWarpgroup);
      return shared.origins.work.tiles >= 0;
    }

    void find_origins(const Place& place) {
      const ScoresParams& scores = params.scores;
      const KeyList list = scores.plan.list(scores.shape, place.b, place.unit, place.run);
      const int kv_head = place.unit / params.units_per_kv_head, whole = list.count / kKeys;
      Origins& origins = shared.origins;
      origins.work = {.b = place.b,
                      .unit = place.unit,
                      .first_query = place.first_query,
                      .queries = scores.plan.runs.size(place.run),
                      .tiles = whole + (list.count % kKeys != 0),
                      .tested = least(list.full, list.count) / kKeys,
                      .whole = whole};
      origins.list = list;
      origins.kv_head = kv_head;
      origins.key = scores.key.template at<u16>(place.b, 0, kv_head);
      origins.value = params.value.template at<u16>(place.b, 0, kv_head);
      if constexpr (kHasKeyBias) origins.bias = Biases<T>(scores).row(place.b, place.unit * scores.shape.pack, 0);
    }

    void copy() {
      const int& tiles = shared.origins.work.tiles;
      if (tiles > 0) {
        fetch_position(0);
        fetch(0);
      }
      bool has_queries = thread() != 0;
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        KeyNumbers& numbers = shared.numbers[ring.stage];
        wait(shared.key_empty[ring.stage], ring.parity ^ 1);
        if (params.by_boxes) load_tile(tile, shared.key[ring.stage], params.key_boxes, shared.key_full[ring.stage]);
        if (const int key = thread(); key < kKeys) {
          numbers.position[key] = position;
          if constexpr (kHasKeyBias) put_bias(numbers, key, Biases<T>(params.scores).scaled(bias));
          if (!params.by_boxes && tile >= shared.origins.work.tested) copy_test(tile, key, numbers);
        }
        if (!params.by_boxes) {
          sync_threads(kCopying, kWarpgroup);
          gather(shared.key[ring.stage], shared.origins.key, params.scores.key.position, shared.key_full[ring.stage]);
        }
        if (kHasTerms && params.by_boxes) fence_for_bulk();
        arrive(shared.key_full[ring.stage]);  // this thread's numbers are there, too
        if (tile + 1 < tiles) fetch(tile + 1);
        if (!has_queries) {
          // At the latest after what finds place before the last tile of rows has its last scores.
          has_queries = tile == least(kStages - 1, tiles) - 1 || finds_queries_place();
          if (has_queries) copy_queries();
        }
        wait(shared.value_empty[ring.stage], ring.parity ^ 1);
        if (params.by_boxes)
          load_tile(tile, shared.value[ring.stage], params.value_boxes, shared.value_full[ring.stage]);
        else
          gather(shared.value[ring.stage], shared.origins.value, params.value.position, shared.value_full[ring.stage]);
        ring.advance();
      }
      if (tiles == 0) copy_queries();
    }

    bool finds_queries_place() const {
      bool finds = true;
      for (int part = 0; part < params.query_parts; ++part)
        finds &= is_complete(shared.query_empty[part], shared.origins.round % 2 ^ 1);
      return finds;
    }
    /// By one thread, which the copy engine works for, as soon as the place of a part is free. Then the work's place
    /// is, too: the part's consumers have finished the last but one.
    void copy_queries() {
      if (thread() != 0) return;
      const Work& work = shared.origins.work;
      const Shape& shape = params.scores.shape;
      const int round = shared.origins.round % 2, positions = params.part_positions;
#pragma unroll 1
      for (int part = 0; part < params.query_parts; ++part) {
        Barrier& full = shared.query_full[part];
        wait(shared.query_empty[part], round ^ 1);
        shared.work[round][part] = work;
        if (work.tiles <= 0) {
          arrive(full);
          continue;
        }
        arrive_expecting(full, kPanels * positions * shape.pack * kPanelRowBytes);
        // Beyond the last query there are zeros.
        const int first = params.scores.logits.sign == 0 ? shape.query_len : work.first_query;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
          load_box(shared.query.panel(panel) + part * 64 * kPanelRowBytes, params.query_boxes, panel * kPanelColumns,
                   work.unit * shape.pack, first + part * positions, work.b, full);
      }
    }
    static void put_bias(KeyNumbers& numbers, int key, float bias) {
      if constexpr (kHasTerms)
        numbers.bias[key] = Terms::of(bias);
      else
        numbers.bias[place_of_column(key)] = bias;
    }
    /// A tile of keys or values: by the copy engine, for one thread.
    template <class Tile>
    void load_tile(int tile, Tile& to, const TensorMap& boxes, Barrier& full) {
      if (thread() != 0) return;
      arrive_expecting(full, sizeof to.bytes);
      const Origins& origins = shared.origins;
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel)
        load_box(to.panel(panel), boxes, panel * kPanelColumns, origins.kv_head, tile * kKeys, origins.work.b, full);
    }
    /// Or by all threads, from where the tile's positions are.
    template <class Tile>
    void gather(Tile& to, const u16* from, i64 stride, Barrier& full) const {
      // In bytes and 32 bits, an address is one instruction. make_scores refuses longer strides.
      const int bytes = static_cast<int>(stride) * 2;
      const int* const positions = shared.numbers[ring.stage].position + thread() / kGatherLanes;
      int position[kRowsOfThread];  // read together, before any copy
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) position[i] = positions[i * kRowsAtOnce];
      gather_rows<kChunks, kWarpgroup, true>(to, thread(), [&](int, int i) {
        return reinterpret_cast<const u16*>(reinterpret_cast<const char*>(from) +
                                            static_cast<i64>(position[i]) * bytes);
      });
      arrive_after_copies(full);
    }

    // What belongs to the keys of a tile is fetched before it is needed: a thread looks after one key. Entries beyond
    // the end of the list stand for the last one, and are masked.

    void fetch_position(int tile) {
      const KeyList& list = shared.origins.list;
      const u32 entry = least<u32>(static_cast<u32>(tile) * kKeys + thread(), list.count - 1);
      second_position = params.scores.plan.key(list, static_cast<int>(entry));
    }
    void fetch(int tile) {
      if (thread() >= kKeys) return;
      position = second_position;
      if constexpr (kHasKeyBias) bias = Biases<T>(params.scores).bits(shared.origins.bias, position);
      const Work& work = shared.origins.work;
      if (!kHasBits && tile >= work.tested) end = params.scores.plan.end_of(work.b, work.unit, position);
      fetch_position(tile + 1);
    }
    void copy_test(int tile, int key, KeyNumbers& numbers) const {
      const Work& work = shared.origins.work;
      const KeyList& list = shared.origins.list;
      const u32 entry = static_cast<u32>(tile) * kKeys + key;
      const bool exists = entry < static_cast<u32>(list.count);
      if constexpr (kHasBits) {
        // Nobody sees what is beyond the end of the list.
        const Plan& plan = params.scores.plan;
        u32* const to = numbers.test + key * kTestWords;
        const u32* const from = plan.bits + (list.offset + (exists ? entry : 0)) * plan.words;
        for (int word = 0; word < plan.words; ++word) copy_async_4(to + word, from + word, exists);
      } else {
        const i64 first = static_cast<i64>(work.first_query) + params.scores.shape.first_position();
        const auto row_of = [&](int p) {
          return static_cast<u32>(most<i64>(0, least<i64>(p - first, work.queries))) * params.scores.shape.pack;
        };
        numbers.test[key] = row_of(params.scores.plan.start_of(position));
        numbers.test[kKeys + key] = exists ? row_of(end) : 0;
      }
    }
  };

  struct Consumer {
    static constexpr int kColumnTiles = kKeys / 8, kOutTiles = kDim / 8;
    using Scores = float[1][kColumnTiles][4];

    const Params& params;
    Shared& shared;
    const int warpgroup, part;  // part: of the queries
    Ring ring, last;            // of the keys and the values that products take
    float out[1][kOutTiles][4];
    u32 probabilities[kKeys / 16][4];

    Consumer(const Params& given, Shared& memory)
        : params(given),
          shared(memory),
          warpgroup(uniform(thread_index() / kWarpgroup)),
          part(given.query_parts == 1 ? 0 : warpgroup) {}

    // Registers are scarce: where a thread is, is read anew.
    static int lane() { return thread_index_anew() % kWarp; }
    static int warp_row() { return thread_index_anew() / kWarp * 16; }  // its first of the tile
    static int row_of(int half) { return warp_row() + 8 * half + lane() / 4; }

    /// By all threads of a warp: they do not need any more what is there. `kArrivals` of them say so.
    template <int kArrivals = 1>
    static void release(Barrier& empty) {
      sync_warp();
      arrive_if(empty, lane() >= kWarp - kArrivals);
    }

    void run() {
#pragma unroll 1
      for (int works = 0; true; ++works) {
        wait(shared.query_full[part], works % 2);
        const Work& work = shared.work[works % 2][part];
        const int tiles = uniform(work.tiles);
        if (tiles < 0) break;
        Softmax<1> softmax(params.scores.logits.factor);
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[0][n][i] = 0;
        if (tiles > 0) {
          if constexpr (kOptions.bias == BiasKind::full) put_bias_rows(work);
          attend(work, tiles, softmax);
        } else {
          release<kLastReaders>(shared.query_empty[part]);
        }
        write(work, softmax);
      }
    }

    void attend(const Work& work, int tiles, Softmax<1>& softmax) {
      const int tested = uniform(work.tested);
      Scores s;
      float scale[1][2];
      wait_keys();
      fence_registers(reinterpret_cast<float (&)[kDim / 2]>(out));
      multiply_keys(s);
      wait_products<0>();
#pragma unroll 1
      for (int tile = 0; true; ++tile) {
        wait_products<1>();
        if (tile + 1 == tiles) release<kLastReaders>(shared.query_empty[part]);
        finish(s, work, tile, tile >= tested);
        wait_products<0>();  // they take the last probabilities
        fence_registers(reinterpret_cast<float (&)[kKeys / 2]>(s));
        if (tile > 0) release(shared.value_empty[last.stage]);
        last = ring;
        ring.advance();
        const bool has_values = is_complete(shared.value_full[last.stage], last.parity);
        const bool has_keys = is_complete(shared.key_full[ring.stage], ring.parity);
        const bool moves = softmax.template exponentiate<T>(probabilities, s, scale);
        if (moves) softmax.rescale(out, scale);
        fence_registers(reinterpret_cast<float (&)[kKeys / 2]>(s));
        wait_unless(has_values, shared.value_full[last.stage], last.parity);
        if (tile + 1 == tiles) break;
        wait_unless(has_keys, shared.key_full[ring.stage], ring.parity);
        see_copies();
        multiply_keys(s);
        multiply_values();
      }
      see_copies();
      multiply_values();
      wait_products<0>();
      release(shared.value_empty[last.stage]);
    }

    /// What threads have copied is seen by products only after a fence.
    void see_copies() const {
      if (!params.by_boxes) fence_for_bulk();
    }
    void wait_keys() const {
      wait(shared.key_full[ring.stage], ring.parity);
      see_copies();
    }

    void multiply_keys(Scores& s) {
      auto& accumulators = reinterpret_cast<float (&)[kKeys / 2]>(s);
      const Operand query = shared.query.rows(64 * warpgroup), key = shared.key[ring.stage].rows();
      fence_products();
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step)
        multiply<T, kKeys, Major::k, Major::k>(accumulators, query + shared.query.along_columns(step),
                                               key + shared.key[0].along_columns(step), step > 0);
      if constexpr (kHasTerms) {
        const auto operand_of = [&](const Terms* terms) {
          return plain_operand(terms, static_cast<int>(reinterpret_cast<const char*>(shared.zeros) -
                                                       reinterpret_cast<const char*>(terms)));
        };
        multiply<bfloat16, kKeys, Major::k, Major::k>(accumulators, operand_of(shared.ones),
                                                      operand_of(shared.numbers[ring.stage].bias), true);
      }
      commit_products();
    }
    void multiply_values() {
      auto& accumulators = reinterpret_cast<float (&)[kDim / 2]>(out);
      const Operand value = shared.value[last.stage].transposed();
      fence_products();
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step)
        multiply<T, kDim, Major::mn>(accumulators, probabilities[step], value + shared.value[0].along_rows(step), true);
      commit_products();
    }

    /// Products to scores; after it the tile of keys is not needed any more.
    void finish(Scores& s, const Work& work, int tile, bool is_tested) {
      const KeyNumbers& numbers = shared.numbers[ring.stage];
      if constexpr (kOptions.softcap) cap_scores(s, params.scores.logits);
      if constexpr (kHasKeyBias && !kHasTerms) add_key_biases(s, numbers.bias, lane());
      if constexpr (kOptions.bias == BiasKind::full) add_full_bias(s, numbers, tile < work.whole);
      if (is_tested) mask(s, work, tile, numbers);
      release<kLastReaders>(shared.key_empty[ring.stage]);
    }

    /// Where the biases of this warp's rows begin.
    void put_bias_rows(const Work& work) {
      const Biases<T> biases(params.scores);
      sync_warp();
      if (lane() < 16) {
        const Row row = row_at(params, warp_row() + lane());
        const bool exists = row.query < work.queries;
        shared.row_bias[warp_row() + lane()] =
            biases.row(work.b, work.unit * params.scores.shape.pack + (exists ? row.head : 0),
                       work.first_query + (exists ? row.query : 0));
      }
      sync_warp();
    }
    void add_full_bias(Scores& s, const KeyNumbers& numbers, bool is_whole) {
      const Biases<T> biases(params.scores);
      const bool by_pairs = !params.scores.plan.positions && is_whole && biases.are_pairs();
      biases.add(s, numbers.position + lane() % 4 * 2, by_pairs,
                 [&](int, int half) { return shared.row_bias[row_of(half)]; });
    }

    void mask(Scores& s, const Work& work, int tile, const KeyNumbers& numbers) {
      int at[1][2];
      if (!kHasBits && params.by_boxes) {  // a span, of which every row sees the beginning
        const ScoresParams& scores = params.scores;
        for (int half = 0; half < 2; ++half) {
          const int position = scores.shape.first_position() + work.first_query + row_at(params, row_of(half)).query;
          at[0][half] = (scores.plan.is_causal ? position + 1 : scores.shape.key_len) - tile * kKeys;
        }
        mask_by_count(s, lane(), at);
        return;
      }
      if constexpr (kHasBits) {
        const int first = row_at(params, warp_row()).query;
        for (int half = 0; half < 2; ++half) at[0][half] = row_at(params, row_of(half)).query - first;
        mask_by_bits<kTestWords>(s, lane(), at, first, params.scores.plan.words, numbers.test);
      } else {
        for (int half = 0; half < 2; ++half) at[0][half] = row_of(half);
        const int* const starts = reinterpret_cast<const int*>(numbers.test);
        mask_by_intervals(s, lane(), at, true, starts, numbers.test + kKeys);
      }
    }

    void write(const Work& work, Softmax<1>& softmax) {
      const int lane = Consumer::lane();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Row row = row_at(params, row_of(half));
        const bool exists = row.query < work.queries;
        const int q = work.first_query + row.query, h = work.unit * params.scores.shape.pack + row.head;
        float sum = quad_sum(softmax.sum[0][half]), scale = fast_reciprocal(sum);
        if (sum == 0 || (exists && params.scores.plan.is_hidden(work.b, work.unit, q))) scale = sum = 0;
        if (exists && lane % 4 == 0)
          *params.lse.at(work.b, h, q) = natural_lse(softmax.finite_reference(0, half) * softmax.factor, sum);
        Chunk* const to = reinterpret_cast<Chunk*>(params.out.template at<u16>(work.b, q, h)) + lane % 4;
#pragma unroll
        for (int n = 0; n < kOutTiles; n += 4) {
          Chunk chunk;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* const two = out[0][n + i] + 2 * half;
            chunk.words[i] = cuda::pack<T>(two[0] * scale, two[1] * scale);
          }
          transpose_in_quads(chunk.words, lane);
          if (exists && (kDim == kOptions.head_dim || n + lane % 4 < kChunks)) to[n] = chunk;
        }
      }
    }
  };
};

}  // namespace flash_dmattn::cuda
