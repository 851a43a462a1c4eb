// Products of features in fp64, in blocks; then, group by group, a few passes over [m, m].
#include "groups.h"

#include "parallel.h"
#include "rowwise.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace g2rl {
namespace {

constexpr double kVarianceEps = 1e-6;

// One group's part of the inputs and outputs; i and j count its members from 0.
struct Group {
  int64_t m;
  double* S;  // [m, stride]
  int64_t stride;
  const double* r;
  char* usable;
  double *scores, *shaped, *advantages;
};

// Additions and multiplications that are worth waking a thread for.
constexpr int64_t kWorthThread = 1 << 18;

// Products of each response with itself and those before it in its group, into S [G, m_max, m_max]. Threads share
// blocks of products, so that one large group keeps all of them busy.
void products(const float* features, const int64_t* cu, int64_t G, int64_t d, double* S, int64_t m_max) {
  const DotKernels& dots = rowwise().dots;
  const int64_t rows = dots.rows;
  std::vector<int64_t> first(G + 1);  // number of each group's first block
  int64_t work = 0;
  for (int64_t g = 0; g < G; ++g) {
    const int64_t m = cu[g + 1] - cu[g], across = (m + rows - 1) / rows;
    first[g + 1] = first[g] + across * (across + 1) / 2;
    work += m * (m + 1) / 2 * d;
  }
  parallel_for(0, first[G], 1 + first[G] * kWorthThread / (work + 1), [&](int64_t begin, int64_t end) {
    for (int64_t g = 0; g < G; ++g) {
      if (first[g + 1] <= begin || first[g] >= end) continue;
      const int64_t m = cu[g + 1] - cu[g];
      int64_t number = first[g];
      for (int64_t i = 0; i < m; i += rows)
        for (int64_t j = 0; j <= i; j += rows, ++number)
          if (number >= begin && number < end)
            dots.block(features + cu[g] * d, m, d, i, j, S + g * m_max * m_max, m_max);
    }
  });
}

// Products to cosines; those of zero features are 0, and they are not usable.
void normalize(const Group& g) {
  std::vector<double> inverse(g.m);
  for (int64_t i = 0; i < g.m; ++i) {
    const double square = g.S[i * g.stride + i];
    if (!(square > 0)) g.usable[i] = 0;
    inverse[i] = square > 0 ? 1 / std::sqrt(square) : 0;
  }
  for (int64_t i = 0; i < g.m; ++i)
    for (int64_t j = 0; j <= i; ++j)
      g.S[j * g.stride + i] = g.S[i * g.stride + j] = g.S[i * g.stride + j] * inverse[i] * inverse[j];
}

// nu of eq. 11; 0 for unusable responses and those without a usable peer.
void score(const Group& g) {
  // Exponents are relative to the largest reward of one's peers: the group's largest, for the one who has it the next.
  constexpr double inf = std::numeric_limits<double>::infinity();
  int64_t best = -1;
  double largest = -inf, next = -inf;
  for (int64_t j = 0; j < g.m; ++j) {
    if (!g.usable[j]) continue;
    next = std::max(next, std::min(largest, g.r[j]));
    if (g.r[j] > largest) best = j, largest = g.r[j];
  }
  std::vector<double> w(g.m);
  const auto weigh = [&](double reference) {
    for (int64_t j = 0; j < g.m; ++j) w[j] = g.usable[j] ? std::exp(g.r[j] - reference) : 0;
  };
  const auto novelty = [&](int64_t i) {
    double weights = 0, similar = 0;
    for (int64_t j = 0; j < g.m; ++j) {
      if (j == i) continue;
      const double s = g.S[i * g.stride + j];
      weights += w[j];
      similar += w[j] * s * s;
    }
    return weights > 0 ? std::sqrt(std::max(1 - similar / weights, 0.0)) : 0;
  };
  weigh(largest);
  for (int64_t i = 0; i < g.m; ++i) g.scores[i] = g.usable[i] && i != best ? novelty(i) : 0;
  if (best < 0) return;
  weigh(next);
  g.scores[best] = novelty(best);
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
    const double bound = std::max(shaping.clip, std::abs(r));
    g.shaped[i] = std::clamp(r * factor, -bound, bound);
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

void g2rl_advantages(const Groups& groups, const Shaping& shaping, const GroupAdvantages& out) {
  const int64_t *cu = groups.cu_groups, G = groups.G, B = cu[G], m_max = groups.m_max, entries = m_max * m_max;
  std::vector<char> usable(B, 1);
  if (groups.valid) std::copy_n(groups.valid, B, usable.begin());
  const std::unique_ptr<double[]> wide(new double[G * entries + 3 * B]);
  double *of_S = wide.get(), *of_scores = of_S + G * entries, *of_shaped = of_scores + B;
  products(groups.features, cu, G, groups.d, of_S, m_max);
  // An entry of S costs a dozen operations.
  parallel_for(0, G, 1 + kWorthThread / 12 / (entries + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = cu[i], m = cu[i + 1] - b;
      const Group g{m,
                    of_S + i * entries,
                    m_max,
                    groups.rewards + b,
                    usable.data() + b,
                    of_scores + b,
                    of_shaped + b,
                    of_shaped + B + b};
      normalize(g);
      score(g);
      shape(g, shaping);
      center(g, shaping.divide_by_std);
      std::copy_n(g.advantages, m, out.advantages + b);
      std::copy_n(g.shaped, m, out.shaped_rewards + b);
      std::copy_n(g.scores, m, out.scores + b);
      float* S = out.similarity + i * entries;
      std::fill_n(S, entries, 0.0f);
      for (int64_t row = 0; row < m; ++row) std::copy_n(g.S + row * m_max, m, S + row * m_max);
    }
  });
}

}  // namespace g2rl
