// Group by group: unit vectors and their products in fp64, then a few passes over [m, m].
#include "groups.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace g2rl {
namespace {

constexpr double kVarianceEps = 1e-6;

// One group's part of the inputs and outputs; i and j count its members from 0.
struct Group {
  int64_t m;
  const double* S;  // [m, stride]
  int64_t stride;
  const double* r;
  const char* usable;
  double *scores, *shaped, *advantages;
};

// Compiled once for each instruction set, the best chosen at run time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define G2RL_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define G2RL_VECTOR_CLONES
#endif

constexpr int kLanes = 16;  // independent sums, so that additions need not wait for each other

G2RL_VECTOR_CLONES
double dot(const double* x, const double* y, int64_t n) {
  double sums[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += x[k + lane] * y[k + lane];
  double total = 0;
  for (; k < n; ++k) total += x[k] * y[k];
  for (double sum : sums) total += sum;
  return total;
}

// Cosines [m, stride] of a group's features [m, d]; those of zero features are 0, and they are not usable.
template <typename T>
void similarity(const T* features, int64_t m, int64_t d, double* S, int64_t stride, char* usable, std::vector<double>& units) {
  units.resize(m * d);
  for (int64_t i = 0; i < m; ++i) {
    double* unit = units.data() + i * d;
    for (int64_t k = 0; k < d; ++k) unit[k] = features[i * d + k];
    const double square = dot(unit, unit, d);
    if (!(square > 0)) usable[i] = 0;
    const double inverse = square > 0 ? 1 / std::sqrt(square) : 0;
    for (int64_t k = 0; k < d; ++k) unit[k] *= inverse;
    for (int64_t j = 0; j <= i; ++j) S[i * stride + j] = S[j * stride + i] = dot(unit, units.data() + j * d, d);
  }
}

// nu of eq. 11; 0 for unusable responses and those without a usable peer.
void score(const Group& g) {
  for (int64_t i = 0; i < g.m; ++i) {
    g.scores[i] = 0;
    if (!g.usable[i]) continue;
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t j = 0; j < g.m; ++j)
      if (j != i && g.usable[j]) largest = std::max(largest, g.r[j]);
    double weights = 0, similar = 0;
    for (int64_t j = 0; j < g.m; ++j) {
      if (j == i || !g.usable[j]) continue;
      const double w = std::exp(g.r[j] - largest), s = g.S[i * g.stride + j];
      weights += w;
      similar += w * s * s;
    }
    if (weights > 0) g.scores[i] = std::sqrt(std::max(1 - similar / weights, 0.0));
  }
}

// Eq. 12 and 13; a group without spread keeps its rewards, as unusable responses do.
void shape(const Group& g, const Shaping& shaping) {
  double low = std::numeric_limits<double>::infinity(), high = -low, least = low, greatest = -low;
  for (int64_t i = 0; i < g.m; ++i) {
    g.shaped[i] = g.r[i];
    if (!g.usable[i]) continue;
    low = std::min(low, g.scores[i]), high = std::max(high, g.scores[i]);
    least = std::min(least, g.r[i]), greatest = std::max(greatest, g.r[i]);
  }
  const double span = high - low;
  if (!(span > 0 && span >= shaping.min_range) || (shaping.drop_uniform && least == greatest)) return;
  for (int64_t i = 0; i < g.m; ++i) {
    if (!g.usable[i]) continue;
    const double nubar = (g.scores[i] - low) / span, r = g.r[i];
    double factor = 1 + shaping.strength * nubar;
    if (shaping.rule == Rule::centered) factor = 1 + shaping.strength * (2 * nubar - 1);
    if (shaping.rule == Rule::literal) factor = 1 + shaping.strength * r * nubar;
    g.shaped[i] = std::clamp(r * factor, -shaping.clip, shaping.clip);
  }
}

// Eq. 2. Relative to the first response, equal rewards centre to exactly 0 whatever their value.
void center(const Group& g, bool divide_by_std) {
  double mean = 0, variance = 0;
  for (int64_t i = 0; i < g.m; ++i) mean += (g.shaped[i] - g.shaped[0]) / g.m;
  for (int64_t i = 0; i < g.m; ++i) {
    const double a = g.shaped[i] - g.shaped[0] - mean;
    g.advantages[i] = a;
    variance += a * a / g.m;
  }
  if (divide_by_std)
    for (int64_t i = 0; i < g.m; ++i) g.advantages[i] /= std::sqrt(variance + kVarianceEps);
}

}  // namespace

GroupAdvantages g2rl_advantages(const at::Tensor& features, const at::Tensor& rewards, const at::Tensor& cu_groups,
                                int64_t m_max, const std::optional<at::Tensor>& valid, const Shaping& shaping) {
  const int64_t B = features.size(0), d = features.size(1), G = cu_groups.size(0) - 1;
  const int64_t* cu = cu_groups.const_data_ptr<int64_t>();
  std::vector<char> usable(B, 1);
  if (valid) std::copy_n(valid->const_data_ptr<bool>(), B, usable.begin());

  const at::Tensor phi = features.contiguous(), r = rewards.to(at::kDouble).contiguous();
  at::Tensor S = at::zeros({G, m_max, m_max}, r.options()), results = at::empty({3, B}, r.options());
  double *s = S.data_ptr<double>(), *out = results.data_ptr<double>();
  const double* raw = r.const_data_ptr<double>();
  at::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> units;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = cu[i], m = cu[i + 1] - b;
      double* of_group = s + i * m_max * m_max;
      AT_DISPATCH_FLOATING_TYPES(phi.scalar_type(), "g2rl_advantages", [&] {
        similarity(phi.const_data_ptr<scalar_t>() + b * d, m, d, of_group, m_max, usable.data() + b, units);
      });
      const Group group{m, of_group, m_max, raw + b, usable.data() + b, out + b, out + B + b, out + 2 * B + b};
      score(group);
      shape(group, shaping);
      center(group, shaping.divide_by_std);
    }
  });
  const auto dtype = features.scalar_type();
  return {results[2].to(dtype, false, true), results[1].to(dtype, false, true), results[0].to(dtype, false, true), S.to(dtype)};
}

}  // namespace g2rl
