// The passes over a problem on the CPU: one task for each chunk of queries and group of query heads.
#include "flash_dmattn/attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/check.h"
#include "core/parallel.h"
#include "core/plan.h"
#include "cpu/kernels.h"

namespace flash_dmattn {
namespace cpu {

void read_positions(const Chunk& chunk, std::int32_t* positions) {
  const auto& plan = *static_cast<const Plan::Lists*>(chunk.plan);
  for (std::int64_t i = 0; i < chunk.queries; ++i)
    positions[i] = plan.position(chunk.batch, chunk.unit, chunk.first_query + i);
}

void read_intervals(const Chunk& chunk, std::int64_t first, std::int64_t count, std::int32_t* keys, std::int32_t* start,
                    std::int32_t* end) {
  const auto& plan = *static_cast<const Plan::Lists*>(chunk.plan);
  const Plan::Lists::Ends end_of = plan.ends(chunk.batch, chunk.unit);
  for (std::int64_t i = 0; i < count; ++i) {
    keys[i] = chunk.keys.positions ? chunk.keys.positions[first + i] : static_cast<std::int32_t>(first + i);
    start[i] = plan.start(keys[i]);
    end[i] = end_of(keys[i]);
  }
}

namespace {

/// Aligned memory. Allocated before tasks run, so that no task fails half-way.
class Memory {
 public:
  explicit Memory(std::size_t bytes) {
    const std::size_t alignment = bytes < kHugePage ? kAlignment : kHugePage;
    const std::size_t size = (std::max<std::size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
    data_.reset(static_cast<char*>(std::aligned_alloc(alignment, size)));
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    // Large scratch memory is new at every call: hundreds of times fewer pages to bring in. Where refused, nothing is
    // lost.
    if (alignment == kHugePage) madvise(data_.get(), size, MADV_HUGEPAGE);
#endif
  }
  char* data() const { return data_.get(); }
  static std::size_t rounded(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

 private:
  static constexpr std::size_t kAlignment = 64, kHugePage = std::size_t{2} << 20;
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
};

/// One piece of scratch memory for each worker.
class Workspaces {
 public:
  Workspaces(std::size_t bytes, int workers)
      : bytes_(Memory::rounded(bytes)), memory_(bytes_ * static_cast<std::size_t>(workers)) {}
  void* of(int worker) const { return memory_.data() + bytes_ * static_cast<std::size_t>(worker); }

 private:
  std::size_t bytes_;
  Memory memory_;
};

/// Tasks that add to the same sums do so one after the other, always in the same order: floating-point addition is not
/// associative, and results must not depend on which worker was first. A task only waits for tasks of smaller index.
class Turns {
 public:
  explicit Turns(std::int64_t sums)
      : next_(std::make_unique<std::atomic<std::int64_t>[]>(static_cast<std::size_t>(sums))) {}
  void wait(std::int64_t sum, std::int64_t turn) {
    std::atomic<std::int64_t>& next = next_[static_cast<std::size_t>(sum)];
    for (std::int64_t now; (now = next.load(std::memory_order_acquire)) != turn;)
      next.wait(now, std::memory_order_acquire);
  }
  void pass(std::int64_t sum) {
    std::atomic<std::int64_t>& next = next_[static_cast<std::size_t>(sum)];
    next.fetch_add(1, std::memory_order_release);
    next.notify_all();
  }

 private:
  std::unique_ptr<std::atomic<std::int64_t>[]> next_;
};

std::int64_t bytes(DType dtype) { return static_cast<std::int64_t>(size_of(dtype)); }

/// Rows of (batch, length, heads, head_dim) from an element on.
Rows rows_from(const View<4>& view, std::int64_t b, std::int64_t i, std::int64_t head) {
  return {address(view, b, i, head, 0), view.stride[1] * bytes(view.dtype), view.stride[2] * bytes(view.dtype),
          view.dtype};
}

/// The part of a (batch, heads, query, key) tensor with broadcast dimensions, of size 1, that a chunk sees.
Bias bias_from(View<4> view, const Shape& shape, std::int64_t pack, std::int64_t b, std::int64_t head,
               std::int64_t query) {
  for (std::size_t i = 0; i < 4; ++i)
    if (view.size[i] == 1) view.stride[i] = 0;
  const std::int64_t size = bytes(view.dtype);
  const bool per_head = view.size[1] == shape.heads && pack > 1 && view.size[1] > 1;
  return {address(view, b, shape.broadcast_head(view.size[1], head), query, 0),
          view.stride[2] * size,
          per_head ? view.stride[1] * size : 0,
          view.stride[3] * size,
          view.dtype,
          view.size[2] > 1,
          per_head};
}

/// Index arithmetic over the tasks of a pass.
struct Tasks {
  const Problem& problem;
  const Plan::Lists& plan;
  std::optional<View<4>> bias = problem.bias ? std::optional(without_expand(*problem.bias)) : std::nullopt;
  std::int64_t rows = plan.shape.batch * plan.units_of_heads();  ///< (batch, unit) pairs
  std::int64_t chunks = plan.chunks();

  std::int64_t count() const { return rows * chunks; }

  Chunk chunk(std::int64_t row, std::int64_t index) const {
    const std::int64_t b = row / plan.units_of_heads(), unit = row % plan.units_of_heads();
    const std::int64_t head = unit * plan.pack, kv_head = head / plan.shape.group(), query = plan.first_query(index);
    return {.queries = plan.queries(index),
            .pack = plan.pack,
            .head_dim = plan.shape.head_dim,
            .query = rows_from(problem.query, b, query, head),
            .key = rows_from(problem.key, b, 0, kv_head),
            .value = rows_from(problem.value, b, 0, kv_head),
            .bias = bias ? bias_from(*bias, plan.shape, plan.pack, b, head, query) : Bias{},
            .keys = plan.keys(b, unit, index),
            .scale = problem.scale,
            .softcap = problem.softcap,
            .plan = &plan,
            .batch = b,
            .unit = unit,
            .first_query = query};
  }
  /// A chunk with the most queries and the most keys of any.
  Chunk largest() const {
    Chunk chunk = this->chunk(0, 0);
    chunk.keys.count = plan.longest_list();
    chunk.keys.bits = nullptr;  // tiles are no smaller without
    return chunk;
  }
  std::int64_t first_head(const Chunk& chunk) const { return chunk.unit * plan.pack; }
};

char* lse_from(const View<3>& lse, const Tasks& tasks, const Chunk& chunk) {
  return address(lse, chunk.batch, tasks.first_head(chunk), chunk.first_query);
}

/// Zeros whatever the strides: all dtypes write 0 as zero bytes.
void clear(const View<4>& view) {
  const std::size_t size = size_of(view.dtype);
  for (std::int64_t a = 0; a < view.size[0]; ++a)
    for (std::int64_t b = 0; b < view.size[1]; ++b)
      for (std::int64_t c = 0; c < view.size[2]; ++c) {
        char* row = address(view, a, b, c, 0);
        if (view.stride[3] == 1)
          std::fill_n(row, static_cast<std::size_t>(view.size[3]) * size, 0);
        else
          for (std::int64_t d = 0; d < view.size[3]; ++d) std::fill_n(address(view, a, b, c, d), size, 0);
      }
}

/// Few queries: the keys of a chunk are shared out over several tasks, so that decoding uses every thread. How many
/// depends on the problem alone.
constexpr std::int64_t kFewRows = 64, kKeysPerPart = 1024;

}  // namespace
}  // namespace cpu

using namespace cpu;

void forward(const Problem& problem, const Plan& plan, const Output& output, const Threads& threads) {
  check(problem);
  check(problem, output);
  const Tasks tasks{problem, plan.lists()};
  if (tasks.count() == 0) return;
  const Kernels& kernels = instruction_set().kernels(problem.query.dtype);
  const Chunk largest = tasks.largest();
  const std::int64_t rows = largest.queries * largest.pack;
  const std::int64_t parts =
      rows <= kFewRows ? std::max<std::int64_t>(1, (largest.keys.count + kKeysPerPart - 1) / kKeysPerPart) : 1;
  const std::size_t part_bytes = static_cast<std::size_t>(rows * (largest.head_dim + 2) * bytes(kernels.sum));
  const Memory partials(parts > 1 ? part_bytes * static_cast<std::size_t>(parts * tasks.count()) : 0);
  const Workspaces workspaces(kernels.forward_scratch(largest), workers_for(tasks.count() * parts, threads));

  const auto task_of = [&](std::int64_t index) {
    const Chunk chunk = tasks.chunk(index % tasks.rows, tasks.chunks - 1 - index / tasks.rows);  // the longest first
    return ForwardTask{.chunk = chunk,
                       .first_key = 0,
                       .last_key = chunk.keys.count,
                       .out = rows_from(output.out, chunk.batch, chunk.first_query, tasks.first_head(chunk)),
                       .lse = lse_from(output.lse, tasks, chunk),
                       .lse_query = output.lse.stride[2] * bytes(output.lse.dtype),
                       .lse_head = output.lse.stride[1] * bytes(output.lse.dtype),
                       .partial = nullptr};
  };
  if (parts == 1) {
    run_tasks(tasks.count(), threads,
              [&](std::int64_t i, int worker) { kernels.forward(task_of(i), workspaces.of(worker)); });
    return;
  }
  run_tasks(tasks.count() * parts, threads, [&](std::int64_t i, int worker) {
    ForwardTask task = task_of(i / parts);
    task.first_key = std::min(task.last_key, i % parts * kKeysPerPart);
    task.last_key = std::min(task.last_key, task.first_key + kKeysPerPart);
    task.out.data = nullptr;
    task.partial = partials.data() + static_cast<std::size_t>(i) * part_bytes;
    kernels.forward(task, workspaces.of(worker));
  });
  run_tasks(tasks.count(), threads, [&](std::int64_t i, int) {
    kernels.combine(task_of(i), partials.data() + static_cast<std::size_t>(i * parts) * part_bytes, parts, part_bytes);
  });
}

namespace {

/// Sums in the kernel's type: the caller's own tensor where it has that type, else memory that is converted at the end.
class Sums {
 public:
  Sums(const View<4>& target, DType dtype)
      : target_(target), sums_(target), own_(target.dtype == dtype ? 0 : elements(target) * size_of(dtype)) {
    if (target.dtype != dtype) {
      sums_ = {own_.data(), dtype, target.size, {}};
      std::int64_t step = 1;
      for (std::size_t i = 4; i-- > 0; step *= target.size[i]) sums_.stride[i] = step;
    }
    clear(sums_);
  }
  const View<4>& view() const { return sums_; }
  void write(const Kernels& kernels) const {
    if (sums_.data == target_.data) return;
    for (std::int64_t a = 0; a < target_.size[0]; ++a)
      for (std::int64_t b = 0; b < target_.size[1]; ++b)
        for (std::int64_t c = 0; c < target_.size[2]; ++c) {
          if (target_.stride[3] == 1)
            kernels.convert(address(sums_, a, b, c, 0), target_.size[3], target_.dtype, address(target_, a, b, c, 0));
          else
            for (std::int64_t d = 0; d < target_.size[3]; ++d)
              kernels.convert(address(sums_, a, b, c, d), 1, target_.dtype, address(target_, a, b, c, d));
        }
  }

 private:
  static std::size_t elements(const View<4>& view) {
    return static_cast<std::size_t>(view.size[0] * view.size[1] * view.size[2] * view.size[3]);
  }
  View<4> target_, sums_;
  Memory own_;
};

/// Adds sums for each (batch, head, key) up to the sizes of a bias gradient with one value for all queries.
template <class T>
void reduce_key_bias(const View<4>& per_head, const Shape& shape, const View<4>& total) {
  for (std::int64_t b = 0; b < per_head.size[0]; ++b)
    for (std::int64_t h = 0; h < per_head.size[1]; ++h) {
      const std::int64_t head = h * (shape.heads / per_head.size[1]);
      const std::int64_t to_batch = total.size[0] > 1 ? b : 0, to_head = shape.broadcast_head(total.size[1], head);
      for (std::int64_t k = 0; k < shape.key_len; ++k)
        *at<T>(total, to_batch, to_head, 0, total.size[3] > 1 ? k : 0) += *at<const T>(per_head, b, h, 0, k);
    }
}

}  // namespace

void backward(const Problem& problem, const Plan& plan, const Output& output, const OutputGradient& output_gradient,
              const InputGradient& input_gradient, const Threads& threads) {
  check(problem);
  check(problem, output);
  check(problem, output_gradient);
  check(problem, input_gradient);
  const Plan::Lists& lists = plan.lists();
  const Shape& shape = lists.shape;
  Tasks tasks{problem, lists};
  if (input_gradient.bias) tasks.bias = problem.bias;  // its gradient has every size of it, expanded or not
  const Kernels& kernels = instruction_set().kernels(problem.query.dtype);
  const DType sum = kernels.sum;
  const Sums key_sums(input_gradient.key, sum), value_sums(input_gradient.value, sum);
  const bool with_bias = input_gradient.bias.has_value();
  const std::optional<Sums> bias_sums =
      with_bias ? std::optional<Sums>(std::in_place, *input_gradient.bias, sum) : std::nullopt;

  if (tasks.count() > 0) {
    const Chunk largest = tasks.largest();
    const bool per_query = largest.bias.per_query;
    // A per-key bias is summed for every head that a chunk tells apart, and brought to its own shape at the end.
    const std::int64_t bias_heads = lists.units_of_heads() * (largest.bias.per_head ? lists.pack : 1);
    const Memory key_bias(
        with_bias && !per_query ? static_cast<std::size_t>(shape.batch * bias_heads * shape.key_len * bytes(sum)) : 0);
    const View<4> key_bias_view{key_bias.data(),
                                sum,
                                {shape.batch, bias_heads, 1, shape.key_len},
                                {bias_heads * shape.key_len, shape.key_len, shape.key_len, 1}};
    if (with_bias && !per_query) clear(key_bias_view);

    // Tasks of one KV head share its key sums. Tasks of one chunk share rows of a per-query bias's gradient where that
    // is broadcast over heads or batch; then tasks of different chunks go side by side.
    const std::int64_t units_per_kv_head = lists.units_of_heads() / shape.kv_heads;
    const bool shared_rows =
        with_bias && per_query &&
        (bias_sums->view().size[0] != shape.batch || bias_sums->view().size[1] < lists.units_of_heads());
    Turns key_turns(tasks.rows / units_per_kv_head), row_turns(tasks.chunks);
    const Workspaces workspaces(kernels.backward_scratch(largest), workers_for(tasks.count(), threads));

    run_tasks(tasks.count(), threads, [&](std::int64_t index, int worker) {
      const std::int64_t row = shared_rows ? index / tasks.chunks : index % tasks.rows;
      const std::int64_t turn = shared_rows ? index % tasks.chunks : index / tasks.rows;
      const std::int64_t chunk_index = tasks.chunks - 1 - turn;  // the longest first
      const Chunk chunk = tasks.chunk(row, chunk_index);
      const std::int64_t head = tasks.first_head(chunk), kv_head = head / shape.group();
      const std::int64_t lse_size = bytes(output.lse.dtype);
      BackwardTask task{.chunk = chunk,
                        .out = rows_from(output.out, chunk.batch, chunk.first_query, head),
                        .grad_out = rows_from(output_gradient.out, chunk.batch, chunk.first_query, head),
                        .grad_query = rows_from(input_gradient.query, chunk.batch, chunk.first_query, head),
                        .lse = lse_from(output.lse, tasks, chunk),
                        .lse_query = output.lse.stride[2] * lse_size,
                        .lse_head = output.lse.stride[1] * lse_size,
                        .grad_lse = nullptr,
                        .grad_lse_query = 0,
                        .grad_lse_head = 0,
                        .key_sum = rows_from(key_sums.view(), chunk.batch, 0, kv_head),
                        .value_sum = rows_from(value_sums.view(), chunk.batch, 0, kv_head),
                        .bias_sum = {}};
      if (output_gradient.lse) {
        task.grad_lse = lse_from(*output_gradient.lse, tasks, chunk);
        task.grad_lse_query = output_gradient.lse->stride[2] * lse_size;
        task.grad_lse_head = output_gradient.lse->stride[1] * lse_size;
      }
      if (with_bias && per_query)
        task.bias_sum = bias_from(bias_sums->view(), shape, lists.pack, chunk.batch, head, chunk.first_query);
      else if (with_bias)
        task.bias_sum = {
            address(key_bias_view, chunk.batch, chunk.unit * (largest.bias.per_head ? lists.pack : 1), 0, 0),
            0,
            shape.key_len * bytes(sum),
            bytes(sum),
            sum,
            false,
            largest.bias.per_head};

      if (shared_rows) row_turns.wait(chunk_index, row);
      kernels.backward(task, workspaces.of(worker));
      if (shared_rows) row_turns.pass(chunk_index);
      const std::int64_t sums_of = row / units_per_kv_head, unit = row % units_per_kv_head;
      key_turns.wait(sums_of, shared_rows ? unit * tasks.chunks + turn : turn * units_per_kv_head + unit);
      kernels.add_key_sums(task, workspaces.of(worker));
      key_turns.pass(sums_of);
    });
    if (with_bias && !per_query)
      sum == DType::float64 ? reduce_key_bias<double>(key_bias_view, shape, bias_sums->view())
                            : reduce_key_bias<float>(key_bias_view, shape, bias_sums->view());
  } else {
    clear(input_gradient.query);
  }
  key_sums.write(kernels);
  value_sums.write(kernels);
  if (with_bias) bias_sums->write(kernels);
}

void probabilities(const Problem& problem, const Plan& plan, const View<3>& lse, const View<4>& probs,
                   const Threads& threads) {
  check(problem);
  check_probabilities(problem, lse, probs);
  clear(probs);
  const Tasks tasks{problem, plan.lists()};
  if (tasks.count() == 0) return;
  const Kernels& kernels = instruction_set().kernels(problem.query.dtype);
  const Workspaces workspaces(kernels.probabilities_scratch(tasks.largest()), workers_for(tasks.count(), threads));
  run_tasks(tasks.count(), threads, [&](std::int64_t index, int worker) {
    const Chunk chunk = tasks.chunk(index % tasks.rows, index / tasks.rows);
    const std::int64_t head = tasks.first_head(chunk), size = bytes(probs.dtype);
    kernels.probabilities(
        {.chunk = chunk,
         .lse = lse_from(lse, tasks, chunk),
         .lse_query = lse.stride[2] * bytes(lse.dtype),
         .lse_head = lse.stride[1] * bytes(lse.dtype),
         .probabilities = {address(probs, chunk.batch, head, chunk.first_query, 0), probs.stride[2] * size,
                           probs.stride[1] * size, probs.stride[3] * size, probs.dtype, true, true}},
        workspaces.of(worker));
  });
}

}  // namespace flash_dmattn
