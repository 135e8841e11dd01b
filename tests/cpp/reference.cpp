#include "reference.h"

namespace flash_dmattn::test {
namespace {

struct Shape {
  explicit Shape(const Inputs& in)
      : B(in.query.size[0]),
        Q(in.query.size[1]),
        K(in.key.size[1]),
        H(in.query.size[2]),
        Hk(in.key.size[2]),
        D(in.query.size[3]) {}

  std::int64_t kv_head(std::int64_t h) const { return h / (H / Hk); }
  /// The head of a mask or bias of `count` heads that serves query head h.
  std::int64_t head(std::int64_t count, std::int64_t h) const { return count == Hk ? kv_head(h) : h; }

  const std::int64_t B, Q, K, H, Hk, D;
};

/// The score before the bias.
double raw_score(const Inputs& in, const Shape& n, std::int64_t b, std::int64_t h, std::int64_t q, std::int64_t k) {
  double dot = 0;
  for (std::int64_t d = 0; d < n.D; ++d) dot += in.query.at({b, q, h, d}) * in.key.at({b, k, n.kv_head(h), d});
  const double s = in.scale * dot;
  return in.softcap > 0 ? in.softcap * std::tanh(s / in.softcap) : s;
}

bool visible(const Inputs& in, const Shape& n, std::int64_t b, std::int64_t h, std::int64_t q, std::int64_t k) {
  const std::int64_t p = q + n.K - n.Q;
  return (!in.mask || in.mask->at({b, n.head(in.mask->size[1], h), q, k}) != 0) && (!in.is_causal || k <= p) &&
         (!in.end || p < in.end->at({b, n.head(in.end->size[1], h), k}));
}

}  // namespace

Problem Inputs::problem() const {
  return {.query = query,
          .key = key,
          .value = value,
          .mask = mask,
          .bias = bias,
          .end = end,
          .scale = scale,
          .softcap = softcap,
          .is_causal = is_causal};
}

Results attention(const Inputs& in) {
  const Shape n(in);
  Results r{{DType::float64, in.query.size}, {DType::float64, {n.B, n.H, n.Q}}, {DType::float64, {n.B, n.H, n.Q, n.K}}};
  r.lse.for_each([&](const Index<3>& i) {
    const std::int64_t b = i[0], h = i[1], q = i[2];
    std::vector<double> s(n.K);
    double largest = -kInfinity;
    for (std::int64_t k = 0; k < n.K; ++k) {
      s[k] = visible(in, n, b, h, q, k) ? raw_score(in, n, b, h, q, k) : -kInfinity;
      if (in.bias && std::isfinite(s[k])) s[k] += in.bias->at({b, n.head(in.bias->size[1], h), q, k});
      largest = std::fmax(largest, s[k]);
    }
    double sum = 0;
    for (std::int64_t k = 0; k < n.K; ++k) sum += std::isfinite(s[k]) ? std::exp(s[k] - largest) : 0;
    const double lse = sum > 0 ? largest + std::log(sum) : -kInfinity;
    r.lse.set(i, lse);
    for (std::int64_t k = 0; k < n.K; ++k) r.probs.set({b, h, q, k}, std::isfinite(s[k]) ? std::exp(s[k] - lse) : 0);
    for (std::int64_t d = 0; d < n.D; ++d) {
      double out = 0;
      for (std::int64_t k = 0; k < n.K; ++k) out += r.probs.at({b, h, q, k}) * in.value.at({b, k, n.kv_head(h), d});
      r.out.set({b, q, h, d}, out);
    }
  });
  return r;
}

GradientSums attention_gradient(const Inputs& in, const Tensor<4>& grad_out, const std::optional<Tensor<3>>& grad_lse) {
  const Shape n(in);
  const Results r = attention(in);
  const auto zeros = [&] {
    const auto like = [](const Index<4>& size) { return Tensor<4>(DType::float64, size).fill([] { return 0.0; }); };
    Gradients g{like(in.query.size), like(in.key.size), like(in.value.size), {}};
    if (in.bias) g.bias = like(in.bias->size);
    return g;
  };
  GradientSums g{zeros(), zeros()};
  /// A term and the sum of the absolute values that it was made of.
  const auto add = [&](Tensor<4> Gradients::* of, const Index<4>& i, double term, double magnitude) {
    (g.sum.*of).set(i, (g.sum.*of).at(i) + term);
    (g.magnitude.*of).set(i, (g.magnitude.*of).at(i) + std::fabs(magnitude));
  };
  r.lse.for_each([&](const Index<3>& i) {
    const std::int64_t b = i[0], h = i[1], q = i[2], kv = n.kv_head(h);
    double delta = grad_lse ? -grad_lse->at(i) : 0, delta_magnitude = std::fabs(delta);
    for (std::int64_t d = 0; d < n.D; ++d) {
      const double term = grad_out.at({b, q, h, d}) * r.out.at({b, q, h, d});
      delta += term;
      delta_magnitude += std::fabs(term);
    }
    for (std::int64_t k = 0; k < n.K; ++k) {
      const double p = r.probs.at({b, h, q, k});
      if (p == 0) continue;
      double grad_p = 0, grad_p_magnitude = 0;
      for (std::int64_t d = 0; d < n.D; ++d) {
        const double o = grad_out.at({b, q, h, d}), term = o * in.value.at({b, k, kv, d});
        grad_p += term;
        grad_p_magnitude += std::fabs(term);
        add(&Gradients::value, {b, k, kv, d}, p * o, p * o);
      }
      double grad_s = p * (grad_p - delta), magnitude = p * (grad_p_magnitude + delta_magnitude);
      if (in.bias) {
        const Index<4> at{b, n.head(in.bias->size[1], h), q, k};
        g.sum.bias->set(at, g.sum.bias->at(at) + grad_s);
        g.magnitude.bias->set(at, g.magnitude.bias->at(at) + magnitude);
      }
      if (in.softcap > 0) {
        const double t = raw_score(in, n, b, h, q, k) / in.softcap;
        grad_s *= 1 - t * t;
      }
      for (std::int64_t d = 0; d < n.D; ++d) {
        const double query = in.scale * in.query.at({b, q, h, d}), key = in.scale * in.key.at({b, k, kv, d});
        add(&Gradients::query, {b, q, h, d}, grad_s * key, magnitude * key);
        add(&Gradients::key, {b, k, kv, d}, grad_s * query, magnitude * query);
      }
    }
  });
  return g;
}

bool beats(double score_j, std::int64_t j, double score_k, std::int64_t k) {
  if (std::isnan(score_j) || std::isnan(score_k))
    return std::isnan(score_j) == std::isnan(score_k) ? j > k : std::isnan(score_k);
  return score_j > score_k || (score_j == score_k && j > k);
}

bool selects(const Tensor<3>& score, const std::optional<Tensor<2>>& key_padding_mask, std::int64_t keep_window_size,
             bool is_causal, std::int64_t batch, std::int64_t head, std::int64_t position, std::int64_t key) {
  const auto may_see = [&](std::int64_t k) {
    return (!is_causal || k <= position) && (!key_padding_mask || key_padding_mask->at({batch, k}) != 0);
  };
  std::int64_t better = 0;
  for (std::int64_t j = 0; j < score.size[2]; ++j)
    better += may_see(j) && beats(score.at({batch, head, j}), j, score.at({batch, head, key}), key);
  return may_see(key) && better < keep_window_size;
}

}  // namespace flash_dmattn::test
