// Before and after the backward pass: what it needs to know of each row, and the way of its float32 sums to the
// outputs.
#pragma once
#include "attention/backward_rows_params.cuh"
#include "attention/chunk.cuh"
#include "ptx/block.cuh"
#include "ptx/number.cuh"
#include "ptx/warp.cuh"
#include "sm80/tiles.cuh"

namespace flash_dmattn::cuda {

struct alignas(16) Floats {
  float x[4] = {};
};

constexpr float kLog2E = 1.4426950408889634f;

/// delta = sum(out * dO) - dLse and lse in base 2, in the order in which tiles hold the rows. A block has a tile, and a
/// few neighbouring threads have a row. While the rows come, it writes its part of the zeros.
template <Number kNumber>
struct BackwardRows {
  static constexpr int kThreads = kRowThreads, kBlocksPerMultiprocessor = 4;
  using Params = BackwardRowsParams;
  using T = typename TypeOf<kNumber>::type;

  static void run(const Params& params, char*) {
    const Shape& shape = params.shape;
    const int of_batches = block_index() / params.tiles;
    const int unit = of_batches % shape.units(), b = of_batches / shape.units();
    const int first_query = block_index() % params.tiles * params.tile_positions;
    const int lanes = lanes_of_row(shape.head_dim), lane = thread_index() % lanes;
    const int step = kThreads / lanes;
#pragma unroll 1
    for (int first = 0; first < params.tile_rows; first += kBatch * step) {
      Row rows[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int row = first + i * step + thread_index() / lanes;
        const int position = row / shape.pack, query = first_query + position;
        if (row < params.tile_rows && position < params.tile_positions && query < shape.query_len)
          rows[i].load(params, b, query, unit * shape.pack + row % shape.pack, lane);
      }
      if (first == 0) write_zeros(params);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int row = first + i * step + thread_index() / lanes;
        float sum = rows[i].product();
        for (int mask = lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (lane != 0 || row >= params.tile_rows) continue;
        const i64 at = static_cast<i64>(block_index()) * params.tile_rows + row;
        const bool sees_nothing = rows[i].lse == -kInfinity;
        params.base_2_lse[at] = sees_nothing ? kInfinity : rows[i].lse * kLog2E;
        params.delta[at] = sees_nothing ? 0.0f : sum - rows[i].grad_lse;
      }
    }
  }

 private:
  static constexpr int kBatch = 2;  // rows of a thread that are under way together

  static void write_zeros(const Params& params) {
    const GradientSums& sums = params.sums;
    zero(sums.data, sums.grad_key(), params.zeros.query);
    zero(sums.grad_bias(), sums.data + sums.all, params.zeros.bias);
    zero_keys(params);
  }
  /// The block's part, of so many fours.
  static void zero(float* sums, const float* end, int part) {
    Floats* const first = reinterpret_cast<Floats*>(sums) + static_cast<i64>(part) * block_index();
    const i64 left = reinterpret_cast<const Floats*>(end) - first;
#pragma unroll 4
    for (int i = thread_index(); i < part; i += kThreads)
      if (i < left) first[i] = Floats{};
  }
  /// Each warp finds out which keys are seen, and has a part of those.
  static void zero_keys(const Params& params) {
    const GradientSums& sums = params.sums;
    const Shape& shape = params.shape;
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp, width = sums.padded_dim / 4;
    const i64 first = static_cast<i64>(params.zeros.key_rows) * block_index();
    const int count = static_cast<int>(least<i64>(params.zeros.key_rows, sums.key_rows - first));
#pragma unroll 1
    for (int group = 0; group < count; group += kWarp) {
      const u32 row = static_cast<u32>(first) + group + lane, key = row / shape.kv_heads;
      u32 seen = ballot(group + lane < count &&
                        params.plan.is_seen(shape, key / shape.key_len, row % shape.kv_heads, key % shape.key_len));
      for (int i = warp; i < kWarp; i += kThreads / kWarp) {
        if ((seen >> i & 1) == 0) continue;
        const i64 at = (first + group + i) * width;
#pragma unroll 1
        for (int column = lane; column < width; column += kWarp)
          reinterpret_cast<Floats*>(sums.grad_key())[at + column] =
              reinterpret_cast<Floats*>(sums.grad_value())[at + column] = Floats{};
      }
    }
  }

  /// What a thread has of a row: eight columns, and the first one its numbers.
  struct Row {
    Chunk out{}, grad_out{};
    float lse = -kInfinity, grad_lse = 0;

    void load(const Params& params, int b, int query, int head, int lane) {
      const int column = lane * kChunk;
      if (column < params.shape.head_dim) {
        out = *reinterpret_cast<const Chunk*>(params.out.template at<T>(b, query, head) + column);
        grad_out = *reinterpret_cast<const Chunk*>(params.grad_out.template at<T>(b, query, head) + column);
      }
      if (lane != 0) return;
      lse = *params.lse.at(b, head, query);
      if (params.grad_lse.data) grad_lse = *params.grad_lse.at(b, head, query);
    }
    float product() const {
      float sum = 0;
      for (int i = 0; i < kChunk; ++i) sum += number(out, i) * number(grad_out, i);
      return sum;
    }
  };
  static float number(const Chunk& chunk, int i) {
    return to_float(T{static_cast<u16>(chunk.words[i / 2] >> i % 2 * 16)});
  }
};

/// dQ, whose sums stand as the threads of Backward held them: a block restores one tile of rows.
template <GradientOptions kOptions>
struct WriteQueryGradient {
  static constexpr QueryTile kTile = query_tile(kOptions);
  using T = typename TypeOf<kOptions.number>::type;
  static constexpr int kDim = round_up(kOptions.head_dim, 16);
  using Rows16 = Tile<kTile.rows, kDim>;
  static_assert(sizeof(Rows16) == query_gradient_shared_bytes(kOptions));

  static void run(const QueryGradientParams& params, int tile_index, char* shared) {
    Rows16& tile = *reinterpret_cast<Rows16*>(shared);
    const float* const sums = params.sums + static_cast<i64>(tile_index) * kTile.size();
    constexpr int kGroups = kTile.column_groups, kBlocks = kTile.blocks(), kN = kTile.pairs;
    for (int i = thread_index(); i < kTile.size() / 4; i += kRowThreads) {
      const int lane = i % kWarp, block = i / kWarp % kBlocks, warp = i / kWarp / kBlocks;
      const int row = (warp / kGroups * kTile.row_tiles + block / (2 * kN)) * 16 + lane / 4;
      const int column = (warp % kGroups * kN * 2 + block % (2 * kN)) * 8 + lane % 4 * 2;
      if (column >= kDim) continue;
      const Floats sum = reinterpret_cast<const Floats*>(sums)[i];
      *reinterpret_cast<u32*>(tile.at(row, column)) = pack<T>(sum.x[0] * params.scale, sum.x[1] * params.scale);
      *reinterpret_cast<u32*>(tile.at(row + 8, column)) = pack<T>(sum.x[2] * params.scale, sum.x[3] * params.scale);
    }
    sync_block();
    const Shape& shape = params.shape;
    const int of_batches = tile_index / params.tiles;
    const int unit = of_batches % shape.units(), b = of_batches / shape.units();
    const int first_query = tile_index % params.tiles * params.tile_positions;
    constexpr int kChunks = kOptions.head_dim / kChunk;
    for (int i = thread_index(); i < kTile.rows * kChunks; i += kRowThreads) {
      const int row = i / kChunks, column = i % kChunks * kChunk;
      const int position = row / shape.pack, query = first_query + position;
      if (position >= params.tile_positions || query >= shape.query_len) continue;
      T* const out = params.out.template at<T>(b, query, unit * shape.pack + row % shape.pack);
      *reinterpret_cast<Chunk*>(out + column) = *reinterpret_cast<const Chunk*>(tile.at(row, column));
    }
  }
};

/// dK and dV: a thread has 16 columns of both.
template <Number kNumber>
struct WriteKeyGradients {
  using T = typename TypeOf<kNumber>::type;

  static void run(const KeyGradientsParams& params, i64 index) {
    const Shape& shape = params.shape;
    const int groups = params.sums.padded_dim / 16;
    const i64 row = index / groups;
    const int column = static_cast<int>(index % groups) * 16;
    const int head = static_cast<int>(row % shape.kv_heads);
    const int key = static_cast<int>(row / shape.kv_heads % shape.key_len);
    const int b = static_cast<int>(row / shape.kv_heads / shape.key_len);
    if (b >= shape.batch) return;
    const bool is_seen = params.plan.is_seen(shape, b, head, key);
    const auto write = [&](const float* sums, const Rows& out, float scale) {
      Chunk chunks[2]{};
      for (int i = 0; is_seen && i < 4; ++i) {
        const Floats sum = reinterpret_cast<const Floats*>(sums + index * 16)[i];
        for (int j = 0; j < 2; ++j) chunks[j].words[i] = pack<T>(sum.x[2 * j] * scale, sum.x[2 * j + 1] * scale);
      }
      T* const row = out.template at<T>(b, key, head) + column;
      for (int j = 0; j < 2; ++j)
        if (column + j * kChunk < shape.head_dim) reinterpret_cast<Chunk*>(row)[j] = chunks[j];
    };
    write(params.sums.grad_key(), params.key_out, params.scale);
    write(params.sums.grad_value(), params.value_out, 1);
  }
};

template <Number kNumber>
void write_number(void* out, i64 offset, bool is_float32, float x) {
  if (is_float32)
    static_cast<float*>(out)[offset] = x;
  else
    static_cast<typename TypeOf<kNumber>::type*>(out)[offset] = from_float<typename TypeOf<kNumber>::type>(x);
}

/// A bias gradient from sums for each batch and head.
template <Number kNumber>
struct WriteBiasGradient {
  static void run(const BiasGradientParams& params, i64 index) {
    const i64 k = index % params.size[3];
    index /= params.size[3];
    const i64 q = index % params.size[2];
    index /= params.size[2];
    const i64 h = index % params.size[1], b = index / params.size[1];
    if (b >= params.size[0]) return;
    const float* const sums = params.sums + b * params.batches * params.sums_batch +
                              h * params.heads * params.sums_head + q * params.sums_query + k * params.sums_key;
    float sum = 0;
    for (int i = 0; i < params.batches; ++i)
      for (int j = 0; j < params.heads; ++j) sum += sums[i * params.sums_batch + j * params.sums_head];
    write_number<kNumber>(params.out,
                          b * params.stride[0] + h * params.stride[1] + q * params.stride[2] + k * params.stride[3],
                          params.is_float32, sum);
  }
};

/// What is summed in memory, in one launch: the first blocks have dQ, the next ones dK and dV, the rest the bias.
template <GradientOptions kOptions>
struct WriteGradients {
  static constexpr int kThreads = kRowThreads, kBlocksPerMultiprocessor = 4;
  using Params = GradientsParams;

  static void run(const Params& params, char* shared) {
    const int block = block_index();
    if (block < params.query_blocks) return WriteQueryGradient<kOptions>::run(params.query, block, shared);
    const int after = block - params.query_blocks;
    const auto thread_of = [](int its_block) { return static_cast<i64>(its_block) * kThreads + thread_index(); };
    if (after < params.key_blocks)
      WriteKeyGradients<kOptions.number>::run(params.keys, thread_of(after));
    else
      WriteBiasGradient<kOptions.number>::run(params.bias, thread_of(after - params.key_blocks));
  }
};

/// A block has one element.
template <Number kNumber>
struct WriteRowBiasGradient {
  static constexpr int kThreads = kRowThreads, kBlocksPerMultiprocessor = 4;
  using Params = RowBiasGradientParams;

  static void run(const Params& params, char* memory) {
    const Shape& shape = params.shape;
    const int oq = block_index() % params.size[2], oh = block_index() / params.size[2] % params.size[1];
    const int ob = block_index() / params.size[2] / params.size[1];
    const int batches = shape.batch / params.size[0], heads = shape.heads / params.size[1],
              queries = shape.query_len / params.size[2];
    float sum = 0;
    if (params.grad_lse.data)
      for (i64 i = thread_index(); i < static_cast<i64>(batches) * heads * queries; i += kThreads) {
        const int b = ob * batches + static_cast<int>(i / queries / heads),
                  h = oh * heads + static_cast<int>(i / queries % heads);
        const int q = oq * queries + static_cast<int>(i % queries);
        if (*params.lse.at(b, h, q) != -kInfinity) sum += *params.grad_lse.at(b, h, q);
      }
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    float* const sums = reinterpret_cast<float*>(memory);
    if (thread_index() % kWarp == 0) sums[thread_index() / kWarp] = sum;
    sync_block();
    if (thread_index() != 0) return;
    for (int warp = 1; warp < kThreads / kWarp; ++warp) sum += sums[warp];
    write_number<kNumber>(params.out, ob * params.stride[0] + oh * params.stride[1] + oq * params.stride[2],
                          params.is_float32, sum);
  }
};

}  // namespace flash_dmattn::cuda
