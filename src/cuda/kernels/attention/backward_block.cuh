// What a block of the backward pass does in every family of kernels. It has one tile of keys of the list of a run of
// query positions, and goes over the run's rows, a tile at a time. Scores are transposed, keys x rows: a key's bias,
// its test and its bias gradient belong to a row of the accumulators, and P^T and dS^T are operands of dV += P^T dO and
// dK += dS^T Q as they are.
//     P = exp(S - lse),  dP = dO V^T,  dS = P (dP - delta),  dBias += dS,  dQ += dS K
#pragma once
#include "attention/backward_params.cuh"
#include "attention/chunk.cuh"
#include "attention/softmax.cuh"
#include "ptx/block.cuh"
#include "ptx/memory.cuh"
#include "ptx/number.cuh"
#include "ptx/warp.cuh"
#include "types.cuh"

namespace flash_dmattn::cuda {

/// Of its kThreads, the first keys / 16 * split warps have scores: each 16 keys and its part of a tile's rows.
template <BackwardOptions kOptions, BackwardTiles kTiles, int kThreads>
struct BackwardBlock {
  static constexpr int kKeys = kTiles.keys, kRows = kTiles.rows, kSplit = kTiles.split, kStages = kTiles.stages;
  static constexpr int kKeyGroups = kKeys / 16;
  static constexpr int kPartRows = kRows / kSplit, kColumnTiles = kPartRows / 8;  // of a warp's scores
  static constexpr int kDim = kTiles.dim;
  static constexpr int kPairs = kDim / 16, kOwnPairs = divide_up(kPairs, kSplit);
  using T = typename TypeOf<kOptions.number>::type;
  using Scores = float[kColumnTiles][4];
  using Sums = float[2 * kOwnPairs][4];
  static constexpr int kBitWords = kTiles.bit_words;
  using Numbers = BackwardNumbers<kKeys, kRows, kStages, kBitWords>;

  const BackwardParams& params;
  Numbers& numbers;
  const int thread, lane, warp;
  const int warp_key;        // first of the warp's 16 keys
  const int warp_part;       // which part of the rows and columns it has
  const BackwardWork& work;  // read where it is needed: registers are scarce
  Sums grad_key, grad_value;

  BackwardBlock(const BackwardParams& given, Numbers& in_shared_memory)
      : params(given),
        numbers(in_shared_memory),
        thread(thread_index()),
        lane(thread % kWarp),
        warp(thread / kWarp),
        warp_key(warp % kKeyGroups * 16),
        warp_part(warp / kKeyGroups),
        work(in_shared_memory.work) {}

  // ---- which tile of which list

  struct Entry {
    int b, unit, run;
  };
  int entries() const { return params.part.batches.value * params.part.units.value * params.plan.runs.count; }
  Entry entry(int index) const {  // the last runs, which see the most keys, come first
    const Part& part = params.part;
    const int of_unit = part.units.quotient(index), run = part.batches.quotient(of_unit);
    return {part.first_batch + of_unit - run * part.batches.value,
            part.first_unit + (index - of_unit * part.units.value) * part.unit_step, params.plan.runs.count - 1 - run};
  }
  int tiles_of(const Entry& of) const {
    const int count = params.plan.list(params.shape, of.b, of.unit, of.run).count;
    return count / kKeys + (count % kKeys != 0);
  }

  /// Blocks go over the tiles of a group of lists, all first tiles first: so those that add to the same rows of dQ work
  /// at different times. Many find nothing, where lists are shorter than they may be: what they need for that is
  /// little.
  bool find_work() {
    int number = block_index();
    if constexpr (kOptions.deterministic) {
      // Blocks may start in any order, but none may wait for one that has not started.
      if (thread == 0) numbers.work.ticket = fetch_add(params.ticket, 1);
      sync_block();
      number = work.ticket;
      sync_block();  // its place is written again
    }
    const int group = params.group_blocks.quotient(number), within = number - group * params.group_blocks.value;
    const int tile = params.group.quotient(within);
    const int index = (group - tile) * params.group.value + within;
    if (index >= entries()) return false;
    const Shape& shape = params.shape;
    const Entry found = entry(index);
    const int first_query = params.plan.runs.first(found.run);
    const KeyList list = params.plan.list(shape, found.b, found.unit, found.run);
    if (static_cast<i64>(tile) * kKeys >= list.count) return false;
    if (warp == 0) {
      const int kv_head = shape.kv_head(found.unit);
      const int turn = kOptions.deterministic ? blocks_before(index, tile, found.b, kv_head) : 0;
      const i64 runs_before =
          (static_cast<i64>(found.b) * shape.units() + found.unit) * params.plan.runs.count + found.run;
      if (lane == 0)
        numbers.work = {.b = found.b,
                        .unit = found.unit,
                        .run = found.run,
                        .kv_head = kv_head,
                        .tile = tile,
                        .first_query = first_query,
                        .rows = row_of(params.plan.runs.size(found.run)),
                        .turn = turn,
                        .ticket = number,
                        .list = list,
                        .row_tiles = runs_before * (params.plan.runs.length / params.tile_positions)};
    }
    sync_block();
    return true;
  }

  /// Deterministic: how many blocks add to the sums of this KV head before the one of a list and a tile does.
  int blocks_before(int index, int tile, int b, int kv_head) const {
    const int group = params.group.quotient(index);
    int before = 0;
    for (int i = lane; i < entries(); i += kWarp) {
      const Entry other = entry(i);
      const int its_group = params.group.quotient(i);
      if (other.b != b || params.shape.kv_head(other.unit) != kv_head || its_group > group) continue;
      const int its_tiles = tiles_of(other);
      if (!params.plan.lists)
        before += i < index && its_tiles > tile;
      else if (its_group < group)  // a key is in one tile of a list: those of a list add at the same time
        before += its_tiles;
    }
    for (int mask = 16; mask > 0; mask /= 2) before += shuffle_xor(before, mask);
    return before;
  }
  int* key_turn() const {
    const i64 head = static_cast<i64>(work.b) * params.shape.kv_heads + work.kv_head;
    return params.key_turn + (params.plan.lists ? head : head * params.key_tiles + work.tile);
  }
  static void wait_for(const int* turn, int value) {
    while (load_acquired(turn) < value) {
    }
  }

  // ---- rows of the run

  struct Row {
    int query, head;  // head: of the unit
  };
  /// Of a row that is nobody's: the last one before it.
  Row row_at(int row) const {
    const int pack = params.shape.pack, last = params.tile_positions * pack - 1, within = least(row % kRows, last);
    const int query = static_cast<int>(static_cast<u32>(within) * params.inverse_pack >> 16);
    return {row / kRows * params.tile_positions + query, within - query * pack};
  }
  bool has_row(int row) const { return row < work.rows && row % kRows < params.tile_positions * params.shape.pack; }
  /// The first row of a position of the run, or the end of the rows before it.
  int row_of(int query) const {
    const int tile = query / params.tile_positions;
    return tile * kRows + (query - tile * params.tile_positions) * params.shape.pack;
  }

  // ---- keys of the tile

  float scaled_bias(float x) const {
    const float scaled = maximum(minimum(x * params.logits.bias_factor, kLargestBias), -kLargestBias);
    return x == -kInfinity ? x : scaled * params.logits.factor;
  }
  float bias_at(i64 offset) const {
    return params.bias.is_float32 ? static_cast<const float*>(params.bias.data)[offset]
                                  : to_float(static_cast<const T*>(params.bias.data)[offset]);
  }

  void read_keys() {
    const Plan& plan = params.plan;
    const int first_key = work.tile * kKeys;
    for (int i = thread; i < kKeys; i += kThreads) {
      const bool exists = i < work.list.count - first_key;
      const int index = exists ? first_key + i : 0;
      const int position = exists ? plan.key(work.list, index) : 0;
      numbers.position[i] = exists ? position : -1;
      float bias = 0;
      if constexpr (kOptions.bias == BiasKind::per_key)
        bias = scaled_bias(bias_at(params.bias.offset(work.b, work.unit * params.shape.pack, 0, position)));
      numbers.bias[i] = exists ? bias : -kInfinity;
      for (int part = 0; part < kSplit; ++part) numbers.bias_sum[part][i] = 0;
      if constexpr (kOptions.test == Test::interval) {
        Interval seen{0, 0};
        if (exists)
          seen = index < work.list.full ? Interval{kSmallest, kLargest} : plan.interval(work.b, work.unit, position);
        const i64 first = static_cast<i64>(work.first_query) + params.shape.first_position();
        const int queries = plan.runs.size(work.run);
        const auto row = [&](int p) { return row_of(static_cast<int>(most<i64>(0, least<i64>(p - first, queries)))); };
        numbers.start[i] = exists ? row(seen.start) : 0;
        numbers.end[i] = exists ? row(seen.end) : 0;
      }
    }
    if constexpr (kBitWords > 0) read_bits(first_key);
    sync_block();
  }
  /// A warp reads the words of several keys at a time.
  void read_bits(int first_key) {
    static_assert(kBitWords <= kWarp + 1);
    constexpr int kWarps = kThreads / kWarp, kBatch = 6;
#pragma unroll 1
    for (int first = warp; first < kKeys; first += kBatch * kWarps) {
      const auto each = [&](const auto& use) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          if (first + i * kWarps < kKeys && lane < params.plan.words) use(i, first + i * kWarps);
      };
      u32 found[kBatch];
      each([&](int i, int key) { found[i] = bits_of_entry(first_key + key, lane); });
      each([&](int i, int key) { numbers.bits[key * kBitWords + lane] = found[i]; });
    }
  }

  /// Test::bits: one word of those of an entry of the list, from anywhere up to the tile's end.
  u32 bits_of_entry(int index, int word) const {
    if (index >= work.list.count) return 0;
    if (index < work.list.full) return ~0u;
    return params.plan.bits[(work.list.offset + index) * params.plan.words + word];
  }
  /// Bit i says whether the position row_at(first_row).query + i sees the key.
  u64 bits_of_key(int key, int first_row) const {
    const auto bits = [&](int word) {
      if constexpr (kBitWords > 0)
        return numbers.bits[key * kBitWords + word];
      else
        return bits_of_entry(work.tile * kKeys + key, word);
    };
    const int words = params.plan.words, first = row_at(first_row).query, word = least(first / 32, words - 1);
    const u64 high = word + 1 < words ? bits(word + 1) : 0;
    return (high << 32 | bits(word)) >> first % 32;
  }
  /// Rows whose bits are looked at together: they have at most 64 positions.
  static constexpr int kBitRows = least(kPartRows, 64);

  /// Which tiles of rows see any key of either half of the tile, and whether every row sees every key.
  void find_row_tiles() {
    const int count = divide_up(work.rows, kRows);
    for (int t = warp; t < count; t += kThreads / kWarp) {
      const int first = t * kRows, last = least(first + kRows, work.rows);
      bool any_low = false, any_high = false, all = true;
      for (int i = lane; i < kKeys; i += kWarp) {
        bool any = false;
        if constexpr (kOptions.test == Test::interval) {
          any = numbers.start[i] < last && numbers.end[i] > first && numbers.start[i] < numbers.end[i];
          all &= numbers.start[i] <= first && numbers.end[i] >= last;
        } else {
          for (int row = first; row < last; row += 64) {
            const int end = least(row + 64, last);
            const u64 everyone = ~u64{0} >> (63 - (row_at(end - 1).query - row_at(row).query));
            const u64 seen = bits_of_key(i, row) & everyone;
            any |= seen != 0;
            all &= seen == everyone;
          }
        }
        (i < kKeys / 2 ? any_low : any_high) |= any;
      }
      const u32 low = ballot(any_low), high = ballot(any_high), everyone = ballot(all);
      if (lane == 0) numbers.seen[t] = (low != 0) | (high != 0) << 1 | (everyone != ~0u) << 2;
    }
    sync_block();
    if (warp == 0) {
      int found = 0;
      const auto find = [&](auto&& is_wanted) {
        for (int t = lane; t - lane < count; t += kWarp) {
          const int seen = t < count ? numbers.seen[t] : 0;
          const u32 wanted = ballot(is_wanted(seen & kSeesAny));
          if (is_wanted(seen & kSeesAny))
            numbers.tiles[found + count_ones(wanted & ((1u << lane) - 1))] = static_cast<u16>(t | seen << 13);
          found += count_ones(wanted);
        }
      };
      if constexpr (kTiles.halves) {
        find([](int halves) { return halves == kSeesAny; });
        if (lane == 0) numbers.whole_count = found;
        find([](int halves) { return halves != 0 && halves != kSeesAny; });
      } else {
        find([](int halves) { return halves != 0; });
      }
      if (lane == 0) numbers.tile_count = found;
    }
    sync_block();
  }
  static constexpr int kSeesAny = 3;  // both bits for the halves
  int row_tile(int i) const { return numbers.tiles[i] & 0x1fff; }
  bool is_tested(int i) const { return numbers.tiles[i] >> 15 != 0; }
  bool sees_half(int i, int half) const { return (numbers.tiles[i] >> (13 + half) & 1) != 0; }

  // ---- scores of a tile

  /// use(n, i, row, half) for each of the thread's scores: accumulator [n][i], row of the run, which of its two keys.
  template <class Use>
  void each_score(int row_tile, const Use& use) const {
    // Where the thread is, is read anew: or what follows from its rows would stay in registers from one use to the
    // next.
    const int first = row_tile * kRows + warp_part * kPartRows + thread_index_anew() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) use(n, i, first + 8 * n + i % 2, i / 2);
  }
  /// Which of its part's pairs of 8 columns a pair of the sums is.
  int own_pair(int pair) const { return kTiles.turned == 0 ? pair : (pair + warp_part * kTiles.turned) % kOwnPairs; }
  int key_of(int half) const {
    const int thread = thread_index_anew();
    return thread / kWarp % kKeyGroups * 16 + thread % kWarp / 4 + 8 * half;
  }

  /// Where the values of a full bias, or of its gradient, stand: of_row(row) + of_key(position).
  struct BiasOffsets {
    i64 base, query, head;
    i64 of_row(const Row& row) const { return base + row.query * query + row.head * head; }
  };
  template <class AnyBias>
  BiasOffsets offsets_of(const AnyBias& bias) const {
    return {bias.offset(work.b, work.unit * params.shape.pack, work.first_query, 0), bias.query,
            bias.heads_per_head == 1 ? bias.head : 0};
  }

  /// From products to probabilities. The derivative of softcap stays in `slope(n, half)`, where two of the thread's
  /// numbers of 16 bits have room: those of accumulators [n][2 * half] and the next.
  template <class Slope>
  void exponentiate(Scores& s, const Slope& slope, int stage, int row_tile, bool is_tested) const {
    const float* const lse = numbers.lse[stage] + warp_part * kPartRows + thread_index_anew() % 4 * 2;
    const float* const of_keys = numbers.bias + key_of(0);
    const float bias[2] = {of_keys[0], of_keys[8]};
    if constexpr (kOptions.softcap) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float t[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = s[n][2 * half + i];
            t[i] = multiply_add(-2, fast_reciprocal(1 + fast_exp2(x * params.logits.inner)), 1);
            x = t[i] * params.logits.cap;
          }
          slope(n, half) = pack<float16>(multiply_add(-t[0], t[0], 1), multiply_add(-t[1], t[1], 1));
        }
    }
    if constexpr (kOptions.bias == BiasKind::full) {
      const BiasOffsets offsets = offsets_of(params.bias);
      const i64 of_key[2] = {most(numbers.position[key_of(0)], 0) * params.bias.key,
                             most(numbers.position[key_of(1)], 0) * params.bias.key};
      each_score(row_tile, [&](int n, int i, int row, int half) {
        const float x = scaled_bias(bias_at(offsets.of_row(row_at(least(row, work.rows - 1))) + of_key[half]));
        s[n][i] = multiply_add(s[n][i], params.factor, x + bias[half]);
      });
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float of_row = lse[8 * n + i % 2];
        if constexpr (kOptions.bias == BiasKind::none) {
          s[n][i] = fast_exp2(multiply_add(s[n][i], params.factor, -of_row));
        } else {
          const float logit =
              kOptions.bias == BiasKind::full ? s[n][i] : multiply_add(s[n][i], params.factor, bias[i / 2]);
          // Of huge logits the difference to lse is rounding.
          s[n][i] = fast_exp2(minimum(logit - of_row, 0.0f));
        }
      }
    if (!is_tested) return;
    if constexpr (kOptions.test == Test::interval) {
      const int start[2] = {numbers.start[key_of(0)], numbers.start[key_of(1)]};
      const int end[2] = {numbers.end[key_of(0)], numbers.end[key_of(1)]};
      each_score(row_tile, [&](int n, int i, int row, int half) {
        if (row < start[half] || row >= end[half]) s[n][i] = 0;
      });
    } else {
#pragma unroll
      for (int part = 0; part < kPartRows; part += kBitRows) {
        const int first_row = row_tile * kRows + warp_part * kPartRows + part, first = row_at(first_row).query;
        const u64 bits[2] = {bits_of_key(key_of(0), first_row), bits_of_key(key_of(1), first_row)};
        each_score(row_tile, [&](int n, int i, int row, int half) {
          if (8 * n >= part && 8 * n < part + kBitRows && (bits[half] >> (row_at(row).query - first) & 1) == 0)
            s[n][i] = 0;
        });
      }
    }
  }

  /// From dP to dS.
  template <class Slope>
  void differentiate_softmax(Scores& ds, const Scores& p, const Slope& slope, int stage, int row_tile) const {
    const float* const delta = numbers.delta[stage] + warp_part * kPartRows + thread_index_anew() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[n][i] = p[n][i] * (ds[n][i] - delta[8 * n + i % 2]);
    if constexpr (kOptions.bias == BiasKind::per_key) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) sum += ds[n][2 * half] + ds[n][2 * half + 1];
        sum = quad_sum(sum);
        if (lane % 4 == 0) numbers.bias_sum[warp_part][key_of(half)] += sum;
      }
    }
    if constexpr (kOptions.bias == BiasKind::full) {
      if (params.grad_bias.sums || params.grad_bias.numbers) {
        const BiasOffsets offsets = offsets_of(params.grad_bias);
        const i64 of_key[2] = {numbers.position[key_of(0)] * params.grad_bias.key,
                               numbers.position[key_of(1)] * params.grad_bias.key};
        each_score(row_tile, [&](int n, int i, int row, int half) {
          if (p[n][i] == 0) return;
          const i64 offset = offsets.of_row(row_at(row)) + of_key[half];
          if (params.grad_bias.sums)
            add_to(params.grad_bias.sums + offset, ds[n][i]);
          else
            params.grad_bias.numbers[offset] = from_float<T>(ds[n][i]).bits;
        });
      }
    }
    if constexpr (kOptions.softcap)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) ds[n][i] *= to_float(float16{static_cast<u16>(slope(n, i / 2) >> i % 2 * 16)});
  }

  // ---- sums

  void add_sums() const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = numbers.position[key_of(half)];
      if (position < 0) continue;
      const i64 row =
          ((static_cast<i64>(work.b) * params.shape.key_len + position) * params.shape.kv_heads + work.kv_head) * kDim +
          warp_part * kOwnPairs * 16 + lane % 4 * 4;
#pragma unroll
      for (int pair = 0; pair < kOwnPairs; ++pair)
        if (kPairs % kSplit == 0 || warp_part * kOwnPairs + pair < kPairs) {
          const auto add = [&](float* to, const Sums& x) {
            add_to(to + row + own_pair(pair) * 16, x[2 * pair][2 * half], x[2 * pair][2 * half + 1],
                   x[2 * pair + 1][2 * half], x[2 * pair + 1][2 * half + 1]);
          };
          add(params.grad_key, grad_key);
          add(params.grad_value, grad_value);
        }
    }
  }
  void write_sums(const Sums& sums, const Rows& to, float scale) const {
    constexpr int kBlocks = 2 * kOwnPairs;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = numbers.position[key_of(half)];
      T* const row = to.template at<T>(work.b, most(position, 0), work.kv_head);
#pragma unroll
      for (int n = 0; n < kBlocks; n += 4) {
        Chunk chunk;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const two = sums[least(n + i, kBlocks - 1)] + 2 * half;
          chunk.words[i] = pack<T>(two[0] * scale, two[1] * scale);
        }
        transpose_in_quads(chunk.words, lane);
        const int own = 2 * own_pair(n / 2) + lane % 4, column = (warp_part * kBlocks + own) * kChunk;
        if (position >= 0 && own < kBlocks && column < kOptions.head_dim)
          *reinterpret_cast<Chunk*>(row + column) = chunk;
      }
    }
  }

  // Deterministic: tiles of keys add to a tile of dQ in their order.
  int* query_turn(int row_tile) const { return params.query_turn + work.row_tiles + row_tile; }

  /// Adds dK, dV and the gradient of the keys' biases to those of other blocks, after `sync` of the `threads` that call
  /// this, all that have sums among them.
  template <class Sync>
  void add_key_gradients(int count, int threads, const Sync& sync) {
    const bool with_bias = kOptions.bias == BiasKind::per_key && params.grad_key_bias;
    if (kOptions.deterministic && thread == 0) wait_for(key_turn(), work.turn);
    if (with_bias || kOptions.deterministic) sync();
    if (params.key_out.data) {
      write_sums(grad_key, params.key_out, params.scale);
      write_sums(grad_value, params.value_out, 1);
    } else if (count > 0) {
      add_sums();
    }
    if (count > 0 && with_bias && thread < kKeys && numbers.position[thread] >= 0) {
      float sum = 0;
      for (int part = 0; part < kSplit; ++part) sum += numbers.bias_sum[part][thread];
      add_to(params.grad_key_bias +
                 (static_cast<i64>(work.b) * params.shape.units() + work.unit) * params.shape.key_len +
                 numbers.position[thread],
             sum);
    }
    if constexpr (kOptions.deterministic) {
      sync();
      if (thread == 0) add_released(key_turn(), 1);
      for (int t = thread; t < divide_up(work.rows, kRows); t += threads)
        if ((numbers.seen[t] & kSeesAny) == 0) {
          wait_for(query_turn(t), work.tile);
          add_released(query_turn(t), 1);
        }
    }
  }
};

}  // namespace flash_dmattn::cuda
