// Similarities of all groups are one batched product of unit vectors; the rest is a few passes over [m, m] for each group.
#include "groups.h"

#include <ATen/ATen.h>
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
  const bool* usable;
  double *scores, *shaped, *advantages;
};

// Unit vectors [G, m_max, d], zero for responses without a feature and in empty slots; usable [B] for those with one.
at::Tensor directions(const at::Tensor& features, const int64_t* cu, int64_t G, int64_t m_max, std::vector<char>& usable) {
  const int64_t d = features.size(1);
  at::Tensor units = at::zeros({G, m_max, d}, features.options().dtype(at::kDouble));
  const at::Tensor phi = features.to(at::kDouble).contiguous();
  const double* from = phi.const_data_ptr<double>();
  double* to = units.data_ptr<double>();
  at::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      for (int64_t b = cu[g]; b < cu[g + 1]; ++b) {
        const double* x = from + b * d;
        double square = 0;
        for (int64_t k = 0; k < d; ++k) square += x[k] * x[k];
        usable[b] = usable[b] && square > 0;
        if (!(square > 0)) continue;
        const double inverse = 1 / std::sqrt(square);
        double* unit = to + (g * m_max + b - cu[g]) * d;
        for (int64_t k = 0; k < d; ++k) unit[k] = x[k] * inverse;
      }
    }
  });
  return units;
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
  const int64_t B = features.size(0), G = cu_groups.size(0) - 1;
  const int64_t* cu = cu_groups.const_data_ptr<int64_t>();
  std::vector<char> usable(B, 1);
  if (valid) std::copy_n(valid->const_data_ptr<bool>(), B, usable.begin());

  const at::Tensor units = directions(features, cu, G, m_max, usable);
  const at::Tensor S = at::bmm(units, units.transpose(1, 2));
  const at::Tensor r = rewards.to(at::kDouble).contiguous();
  at::Tensor results = at::empty({3, B}, r.options());
  double* out = results.data_ptr<double>();
  const double *s = S.const_data_ptr<double>(), *raw = r.const_data_ptr<double>();
  static_assert(sizeof(bool) == sizeof(char));
  const bool* used = reinterpret_cast<const bool*>(usable.data());
  at::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = cu[i];
      const Group group{cu[i + 1] - b, s + i * m_max * m_max, m_max,       raw + b,
                        used + b,      out + b,               out + B + b, out + 2 * B + b};
      score(group);
      shape(group, shaping);
      center(group, shaping.divide_by_std);
    }
  });
  const auto dtype = features.scalar_type();
  return {results[2].to(dtype, false, true), results[1].to(dtype, false, true), results[0].to(dtype, false, true), S.to(dtype)};
}

}  // namespace g2rl
