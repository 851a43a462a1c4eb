#include "head_sums.h"

#include <ATen/ops/empty.h>

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
  const double ratio = lead < 300 ? S_rest * std::exp(lead) : INFINITY;  // S_rest / e_y
  if (ratio < 1e100) {
    out.logp = -std::log1p(ratio);
    out.rest = ratio / (1 + ratio);
  } else {
    out.logp = -lead - std::log(S_rest);
    out.rest = 1;
  }
  out.lse = u_y - out.logp;
  // sum over the rest of -p log p = sum p (lse - u), plus the target's own term
  const double scale = std::exp(m - out.lse);
  out.entropy = std::max(0.0, out.rest * (out.lse - m) - X_rest * scale - std::exp(out.logp) * out.logp);
  return out;
}

void write(const TokenStats& stats, int64_t t, const Merged& m) {
  stats.logps.mutable_data_ptr<float>()[t] = static_cast<float>(m.logp);
  stats.entropy.mutable_data_ptr<float>()[t] = static_cast<float>(m.entropy);
  stats.lse.mutable_data_ptr<float>()[t] = static_cast<float>(m.lse);
}

}  // namespace

void RunningSums::fold(const Partials& out, int64_t slab, int64_t begin, int64_t end, int64_t first) const {
  for (int64_t t = begin; t < end; ++t) {
    *out.sum(slab, t) = rowwise().lane_sum(sum(t - first));
    *out.sum_x(slab, t) = rowwise().lane_sum(sum_x(t - first));
  }
}

TokenStats empty_stats(int64_t N) {
  return {at::empty({N}, at::kFloat), at::empty({N}, at::kFloat), at::empty({N}, at::kFloat)};
}

void merge_slabs(const HeadProblem& p, const Partials& partials, const std::vector<float>& target_acc, int64_t begin,
                 int64_t end, const TokenStats& stats, Token* tokens) {
  at::parallel_for(begin, end, 512, [&](int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t) {
      double m = -INFINITY, s = 0, x = 0;
      for (int64_t slab = 0; slab < p.cut.slabs; ++slab) m = std::max<double>(m, *partials.ref(slab, t));
      for (int64_t slab = 0; slab < p.cut.slabs; ++slab) {
        const double lag = *partials.ref(slab, t) - m;
        if (lag < -200) continue;
        const double w = std::exp(lag), sum = *partials.sum(slab, t);
        s += w * sum;
        x += w * (*partials.sum_x(slab, t) + lag * sum);
      }
      const int64_t y = p.targets[t];
      const Merged merged = merge_target(m, s, x, p.logit(target_acc[t], y));
      write(stats, t, merged);
      if (tokens) tokens[t] = {merged.lse, merged.rest, p.cap_slope(target_acc[t], y)};
    }
  });
}

}  // namespace g2rl
