// Attention over the 64 best-scored keys of each query, forward and backward, with the C++ engine alone; then the same
// as a float64 loop, and how far the two are apart.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "flash_dmattn/attention.h"
#include "flash_dmattn/dynamic_mask.h"

using namespace flash_dmattn;

constexpr std::int64_t kBatch = 1, kLength = 512, kHeads = 4, kKvHeads = 2, kHeadDim = 64, kWindow = 64;

/// A view of a dense array.
template <int Rank, class T>
View<Rank> view(std::vector<T>& memory, DType dtype, const std::array<std::int64_t, Rank>& size) {
  View<Rank> v{memory.data(), dtype, size, {}};
  std::int64_t stride = 1;
  for (int i = Rank - 1; i >= 0; --i) {
    v.stride[i] = stride;
    stride *= size[i];
  }
  return v;
}

/// One query of one head as the definition has it: no tiles, no online softmax, no gathered lists.
std::vector<double> definition(const std::vector<float>& query, const std::vector<float>& key,
                               const std::vector<float>& value, const std::vector<float>& score, double scale,
                               std::int64_t position, std::int64_t head) {
  const std::int64_t kv_head = head / (kHeads / kKvHeads);
  const float* s = &score[kv_head * kLength];
  std::vector<double> out(kHeadDim);
  double sum = 0;
  for (std::int64_t k = 0; k <= position; ++k) {
    std::int64_t better = 0;
    for (std::int64_t j = 0; j <= position; ++j) better += s[j] > s[k] || (s[j] == s[k] && j > k);
    if (better >= kWindow) continue;
    double logit = 0;
    for (std::int64_t d = 0; d < kHeadDim; ++d)
      logit += double{query[(position * kHeads + head) * kHeadDim + d]} * key[(k * kKvHeads + kv_head) * kHeadDim + d];
    const double weight = std::exp(scale * logit + s[k]);
    sum += weight;
    for (std::int64_t d = 0; d < kHeadDim; ++d) out[d] += weight * value[(k * kKvHeads + kv_head) * kHeadDim + d];
  }
  for (double& x : out) x /= sum;
  return out;
}

int main() {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  const auto draw = [&](std::int64_t count) {
    std::vector<float> memory(count);
    std::generate(memory.begin(), memory.end(), [&] { return normal(random); });
    return memory;
  };
  std::vector<float> query = draw(kBatch * kLength * kHeads * kHeadDim),
                     key = draw(kBatch * kLength * kKvHeads * kHeadDim), value = draw(key.size()),
                     score = draw(kBatch * kKvHeads * kLength), grad_out = draw(query.size());
  std::vector<std::int32_t> end(score.size());
  std::vector<float> out(query.size()), lse(kBatch * kHeads * kLength);
  std::vector<float> grad_query(query.size()), grad_key(key.size()), grad_value(value.size()), grad_score(score.size());

  const Threads threads = hardware_threads();
  const std::array<std::int64_t, 4> query_size{kBatch, kLength, kHeads, kHeadDim},
      key_size{kBatch, kLength, kKvHeads, kHeadDim}, bias_size{kBatch, kKvHeads, 1, kLength};
  const View<3> score_view = view<3>(score, DType::float32, {kBatch, kKvHeads, kLength});
  const View<3> end_view = view<3>(end, DType::int32, {kBatch, kKvHeads, kLength});
  make_dynamic_mask({score_view, {}, kWindow, kLength, true}, end_view, {}, threads);

  // The score is also the bias: one row for all queries, which is how a model learns it.
  Problem problem;
  problem.query = view<4>(query, DType::float32, query_size);
  problem.key = view<4>(key, DType::float32, key_size);
  problem.value = view<4>(value, DType::float32, key_size);
  problem.bias = view<4>(score, DType::float32, bias_size);
  problem.end = end_view;
  problem.scale = 1 / std::sqrt(double{kHeadDim});
  problem.is_causal = true;
  const Plan plan(problem, threads);
  const Output output{view<4>(out, DType::float32, query_size),
                      view<3>(lse, DType::float32, {kBatch, kHeads, kLength})};
  forward(problem, plan, output, threads);
  backward(problem, plan, output, {view<4>(grad_out, DType::float32, query_size), {}},
           {view<4>(grad_query, DType::float32, query_size), view<4>(grad_key, DType::float32, key_size),
            view<4>(grad_value, DType::float32, key_size), view<4>(grad_score, DType::float32, bias_size)},
           threads);

  double forward_error = 0;
  for (std::int64_t position = 0; position < kLength; ++position)
    for (std::int64_t head = 0; head < kHeads; ++head) {
      const std::vector<double> expected = definition(query, key, value, score, problem.scale, position, head);
      for (std::int64_t d = 0; d < kHeadDim; ++d)
        forward_error =
            std::max(forward_error, std::fabs(out[(position * kHeads + head) * kHeadDim + d] - expected[d]));
    }

  // A step along a random direction changes sum(out * grad_out) by what the gradient says. The mask stays: a selection
  // has no gradient, so only the query moves.
  const std::vector<float> direction = draw(query.size());
  double predicted = 0;
  for (std::size_t i = 0; i < query.size(); ++i) predicted += double{direction[i]} * grad_query[i];
  double change = 0;
  constexpr float step = 1e-2f;
  for (const float sign : {1.f, -1.f}) {
    std::vector<float> moved = query;
    for (std::size_t i = 0; i < query.size(); ++i) moved[i] += sign * step * direction[i];
    for (std::int64_t position = 0; position < kLength; ++position)
      for (std::int64_t head = 0; head < kHeads; ++head) {
        const std::vector<double> o = definition(moved, key, value, score, problem.scale, position, head);
        for (std::int64_t d = 0; d < kHeadDim; ++d)
          change += sign * o[d] * grad_out[(position * kHeads + head) * kHeadDim + d] / (2 * step);
      }
  }
  const double backward_error = std::fabs(change - predicted) / std::fabs(predicted);

  std::printf("%s: %lld queries, each sees %lld of %lld keys\n", cpu_instruction_set(), static_cast<long long>(kLength),
              static_cast<long long>(kWindow), static_cast<long long>(kLength));
  std::printf("largest error of the output %.1e, relative error of the gradient %.1e\n", forward_error, backward_error);
  const bool right = forward_error < 1e-5 && backward_error < 1e-2;
  std::puts(right ? "right" : "wrong");
  return right ? 0 : 1;
}
