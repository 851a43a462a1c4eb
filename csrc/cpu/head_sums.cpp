#include "head_sums.h"

#include <cmath>

namespace g2rl {
namespace {

// log p, entropy, lse and 1 - p_y from the sums over the other entries, relative to m: S_rest = sum exp(u - m), X_rest
// = sum exp(u - m) (u - m).
struct Merged {
  double logp, entropy, lse, rest;
};

Merged merge_target(double m, double S_rest, double X_rest, double u_y) {
  Merged out;
  const double lead = m - u_y;
  const double ratio = lead >= 300 ? INFINITY : S_rest * std::exp(lead);  // S_rest / e_y
  double own = 0;                                                         // the target's term of the entropy
  if (ratio >= 1e100) {
    // A target so unlikely, even of logit -inf, is nothing next to the others.
    out.lse = m + std::log(S_rest);
    out.logp = -lead - std::log(S_rest);
    out.rest = 1;
  } else {
    out.logp = -std::log1p(ratio);
    out.lse = u_y - out.logp;
    out.rest = ratio / (1 + ratio);
    own = -std::exp(out.logp) * out.logp;
  }
  // sum over the rest of -p log p = sum p (lse - u)
  const double scale = std::exp(m - out.lse);
  out.entropy = out.rest * (out.lse - m) - X_rest * scale + own;
  if (out.entropy < 0) out.entropy = 0;  // NaN stays
  return out;
}

// Sums over some entries without the target: of exp(u - m) and of exp(u - m) (u - m).
struct Sums {
  double m, S, X;
};

// `part(i)` gives the sums of each.
template <typename F>
Sums join(int64_t parts, const F& part) {
  Sums all{-INFINITY, 0, 0};
  for (int64_t i = 0; i < parts; ++i) all.m = std::max(all.m, part(i).m);
  for (int64_t i = 0; i < parts; ++i) {
    const auto [m, S, X] = part(i);
    const double lag = m - all.m;
    if (lag < -200 && !std::isnan(S)) continue;
    const double w = std::exp(lag);
    all.S += w * S;
    all.X += w * (X + lag * S);
  }
  return all;
}

Sums of_slabs(const HeadProblem& p, const Partials& partials, int64_t t) {
  return join(p.cut.slabs, [&](int64_t slab) {
    return Sums{*partials.ref(slab, t), *partials.sum(slab, t), *partials.sum_x(slab, t)};
  });
}

// Results of token t, `raw` being its target's W h + b.
void write(const HeadProblem& p, int64_t t, const Sums& sums, double raw, const TokenStats& stats, Token* tokens) {
  const Merged m = merge_target(sums.m, sums.S, sums.X, p.logit(raw));
  stats.logps[t] = static_cast<float>(m.logp);
  stats.entropy[t] = static_cast<float>(m.entropy);
  stats.lse[t] = static_cast<float>(m.lse);
  if (tokens) tokens[t] = {m.lse, m.rest, p.cap_slope(raw)};
}

constexpr int64_t kTokensOfTask = 512;

}  // namespace

void RunningSums::fold(const Partials& out, int64_t slab, int64_t begin, int64_t end, int64_t first) const {
  rowwise().lane_sums(sum(begin - first), end - begin, out.sum(slab, begin));
  rowwise().lane_sums(sum_x(begin - first), end - begin, out.sum_x(slab, begin));
}

void merge_slabs(const HeadProblem& p, const Partials& partials, int64_t begin, int64_t end, const TokenStats& stats,
                 Token* tokens) {
  parallel_for(begin, end, kTokensOfTask, [&](int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t)
      write(p, t, of_slabs(p, partials, t), p.raw(*partials.target(t), p.targets[t]), stats, tokens);
  });
}

void sum_slabs(const HeadProblem& p, const Partials& partials, float* sums) {
  parallel_for(0, p.N, kTokensOfTask, [&](int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t) {
      const auto [m, S, X] = of_slabs(p, partials, t);
      const int64_t y = p.targets[t];
      const double row[4] = {m, S, X, y < 0 ? 0.0 : p.raw(*partials.target(t), y)};
      for (int64_t i = 0; i < 4; ++i) sums[i * p.N + t] = static_cast<float>(row[i]);
    }
  });
}

void merge_parts(const HeadProblem& p, const float* sums, int64_t parts, const TokenStats& stats, Token* tokens) {
  const int64_t plane = parts * p.N;
  parallel_for(0, p.N, kTokensOfTask, [&](int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t) {
      const float* of_token = sums + t;
      const auto part = [&](int64_t i) {
        const float* at = of_token + i * p.N;
        return Sums{at[0], at[plane], at[2 * plane]};
      };
      double raw = 0;
      for (int64_t i = 0; i < parts; ++i) raw += of_token[3 * plane + i * p.N];
      write(p, t, join(parts, part), raw, stats, tokens);
    }
  });
}

}  // namespace g2rl
