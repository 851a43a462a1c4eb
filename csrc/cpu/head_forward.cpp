// Forward passes of the head.
//
// Statistics pass: every (slab of vocabulary, block of tokens) gives per row and tile the maximum and the sums of e = exp(u - max) and e (u - max),
// the target's own entry left out. They merge, in double precision and in tile order, into log p, entropy, lse and 1 - p_y = S_rest / S.
//
// Feature pass: the logits once more, now with lse known; the weighted sums over a response's tokens stay in vocabulary space,
//   R[b, v] = - sum_t a_t p_tv D_tv        for v != y_t,
// and each tile of R meets its tile of W while both are in cache: Phi_b = scale (R W + sum_t a_t (1 - p_y) D_y W[y_t]).
// Computing the logits twice costs less than keeping them: two products on panels in cache against one that streams.
//
// With lse given the feature pass comes first and alone: its own sums say how far the given lse was off, and a response for which that matters
// is done again with the right one.
#include <cmath>
#include <cstring>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "head_tiles.h"

namespace g2rl {
namespace {

// exp(u - lse) sums to 1 within this, or the response is done again: about the rounding of an fp32 lse near 100.
constexpr double kLseSlack = 4e-6;
constexpr double kLseBelief = 0.5;  // beyond this the sums themselves may have overflowed: the given lse is not of this head
constexpr int64_t kResponses = 256;  // per feature pass: their rows of R share the cache with a panel

struct Token {
  double lse;
  double rest;   // 1 - p_y
  double slope;  // D_y
};

// Per slab and token: a reference m and sums of exp(u - m) and exp(u - m) (u - m) over the slab without the target.
class Partials {
 public:
  Partials(int64_t slabs, int64_t N) : N_(N), data_(slabs * 3 * N * sizeof(float)) {}
  float* ref(int64_t slab) const { return data_.floats() + (slab * 3) * N_; }
  float* sum(int64_t slab) const { return data_.floats() + (slab * 3 + 1) * N_; }
  float* sum_x(int64_t slab) const { return data_.floats() + (slab * 3 + 2) * N_; }

 private:
  int64_t N_;
  Buffer data_;
};

// The same sums while a slab is under way, 16 lanes each, for tokens from `first` on.
class RunningSums {
 public:
  explicit RunningSums(int64_t tokens) : tokens_(tokens), data_(2 * tokens * kLanes * sizeof(float)) {}
  float* sum(int64_t t) const { return data_.floats() + t * kLanes; }
  float* sum_x(int64_t t) const { return data_.floats() + (tokens_ + t) * kLanes; }
  void fold(const Partials& out, int64_t slab, int64_t begin, int64_t end) const {
    for (int64_t t = begin; t < end; ++t) {
      out.sum(slab)[t] = rowwise().lane_sum(sum(t));
      out.sum_x(slab)[t] = rowwise().lane_sum(sum_x(t));
    }
  }

 private:
  int64_t tokens_;
  Buffer data_;
};

// log p, entropy, lse and 1 - p_y from the sums over the other entries, relative to m: S_rest = sum exp(u - m), X_rest = sum exp(u - m) (u - m).
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

TokenStats empty_stats(int64_t N) { return {at::empty({N}, at::kFloat), at::empty({N}, at::kFloat), at::empty({N}, at::kFloat)}; }

// Sums of all slabs -> results of tokens begin..end.
void merge_slabs(const HeadProblem& p, const Partials& partials, const std::vector<float>& target_acc, int64_t begin, int64_t end, const TokenStats& stats,
                 Token* tokens) {
  at::parallel_for(begin, end, 64, [&](int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t) {
      double m = -INFINITY, s = 0, x = 0;
      for (int64_t slab = 0; slab < p.cut.slabs; ++slab) m = std::max<double>(m, partials.ref(slab)[t]);
      for (int64_t slab = 0; slab < p.cut.slabs; ++slab) {
        const double lag = partials.ref(slab)[t] - m;
        if (lag < -200) continue;
        const double w = std::exp(lag), sum = partials.sum(slab)[t];
        s += w * sum;
        x += w * (partials.sum_x(slab)[t] + lag * sum);
      }
      const int64_t y = p.targets[t];
      const Merged merged = merge_target(m, s, x, p.logit(target_acc[t], y));
      write(stats, t, merged);
      if (tokens) tokens[t] = {merged.lse, merged.rest, p.cap_slope(target_acc[t], y)};
    }
  });
}

void statistics_pass(const HeadProblem& p, const RowPanels& rows, const TokenStats& stats, Token* tokens) {
  const Partials partials(p.cut.slabs, p.N);
  std::vector<float> target_acc(p.N, 0.0f);
  struct State {
    LogitTile logits;
    RunningSums sums;
  };
  for_tasks(
      p.cut.slabs, [&] { return State{LogitTile(p), RunningSums(p.N)}; },
      [&](State& s, int64_t slab) {
        const int64_t first_tile = p.cut.slab_begin(slab);
        for (int64_t tile = first_tile; tile < p.cut.slab_begin(slab + 1); ++tile) {
          s.logits.load(tile, /*straight=*/false);
          for (int64_t b = 0; b < rows.blocks(); ++b) {
            s.logits.compute(rows, b, /*want_slope=*/false, target_acc.data());
            const int64_t t = b * kRows;
            rowwise().stats(s.logits.tile(), p.alpha, tile == first_tile, partials.ref(slab) + t, s.sums.sum(t), s.sums.sum_x(t));
          }
        }
        s.sums.fold(partials, slab, 0, p.N);
      });
  merge_slabs(p, partials, target_acc, 0, p.N, stats, tokens);
}

// Responses first..last of the batch, and each token's normalised weight.
struct Responses {
  const int64_t* cu;
  const double* weight;  // [N]
  int64_t first, last;
  int64_t token_begin() const { return cu[first]; }
  int64_t token_end() const { return cu[last]; }
  int64_t padded() const { return (last - first + 15) / 16 * 16; }  // rows of a product
};

Tile rows_of(const Tile& t, int64_t begin, int64_t end) { return {t.acc + begin * t.ld, t.ld, static_cast<int>(end - begin), t.cols, t.width}; }

// A thread's rows of R for one tile and their bf16 parts.
struct ResidualTile {
  ResidualTile(const HeadProblem& p, int64_t responses)
      : rows(responses),
        width(p.cut.width),
        sums(rows * width * sizeof(float)),
        part_data(3 * rows * width * sizeof(uint32_t)),
        left{part_data.units(), p.format.amx ? 3 : 1, rows * width / p.format.per_unit(), width / p.format.per_unit()} {}
  void clear() { std::memset(sums.floats(), 0, rows * width * sizeof(float)); }
  void add_product(const HeadProblem& p, const ColumnPanels& panel, float* out) {
    for (int64_t b = 0; b < rows; ++b) left.fill(p.format, sums.floats() + b * width, b, 0, width);
    multiply_straight(p.format, left, rows, panel.straight(), width / p.format.per_unit(), width / p.format.per_unit(), p.depth.padded() * p.format.per_unit(), out);
  }
  int64_t rows, width;
  Buffer sums, part_data;
  LeftParts left;
};

// Phi_b += scale * weight sums of the target rows, and the slabs' partial features, in slab order.
void finish_features(const HeadProblem& p, const Responses& r, const std::vector<Token>& tokens, const float* slabs, float* features) {
  const int64_t row_stride = straight_stride(p.depth.padded() * p.format.per_unit()), slab_stride = r.padded() * row_stride;
  at::parallel_for(r.first, r.last, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(p.d);
    std::vector<double> total(p.d);
    for (int64_t b = begin; b < end; ++b) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t s = 0; s < p.cut.slabs; ++s) {
        const float* part = slabs + s * slab_stride + (b - r.first) * row_stride;
        for (int64_t i = 0; i < p.d; ++i) total[i] += part[i];
      }
      for (int64_t t = r.cu[b]; t < r.cu[b + 1]; ++t) {
        const double a = r.weight[t] * tokens[t].rest * tokens[t].slope;
        rowwise().widen(p.weight.row(p.targets[t]), p.format.dtype, p.d, row.data());
        for (int64_t i = 0; i < p.d; ++i) total[i] += a * row[i];
      }
      for (int64_t i = 0; i < p.d; ++i) features[b * p.d + i] = static_cast<float>(p.scale * total[i]);
    }
  });
}

// Calls f(b, t0, t1) for the runs of one response's tokens inside t_begin..t_end, in order.
template <typename F>
void for_segments(const Responses& r, int64_t t_begin, int64_t t_end, const F& f) {
  int64_t b = std::upper_bound(r.cu + r.first, r.cu + r.last + 1, t_begin) - r.cu - 1;
  for (int64_t t = t_begin; t < t_end; ++b) {
    const int64_t end = std::min(r.cu[b + 1], t_end);
    if (end > t) f(b, t, end);
    t = std::max(t, end);
  }
}

// What the feature pass multiplies exp(u - ref) by, per token.
struct Coefficients {
  std::vector<float> ref, value;
};

// The sums a feature pass collects when the lse it uses is only believed.
struct Collected {
  Partials partials;
  std::vector<float> target_acc;
};

// One pass over the vocabulary for the responses in r: every slab's part of their features, and with `collect` the statistics of their tokens.
Buffer feature_pass(const HeadProblem& p, const RowPanels& rows, const Responses& r, const Coefficients& coef, Collected* collect) {
  const int64_t row_stride = straight_stride(p.depth.padded() * p.format.per_unit()), B = r.padded();
  Buffer slabs(p.cut.slabs * B * row_stride * sizeof(float));
  struct State {
    LogitTile logits;
    ResidualTile residual;
    RunningSums sums;
  };
  for_tasks(
      p.cut.slabs, [&] { return State{LogitTile(p), ResidualTile(p, B), RunningSums(collect ? p.N : 0)}; },
      [&](State& s, int64_t slab) {
        float* out = slabs.floats() + slab * B * row_stride;
        std::memset(out, 0, B * row_stride * sizeof(float));
        const int64_t first_tile = p.cut.slab_begin(slab);
        for (int64_t tile = first_tile; tile < p.cut.slab_begin(slab + 1); ++tile) {
          s.logits.load(tile, /*straight=*/true);
          s.residual.clear();
          for (int64_t block = r.token_begin() / kRows; block * kRows < r.token_end(); ++block) {
            s.logits.compute(rows, block, /*want_slope=*/true, collect ? collect->target_acc.data() : nullptr);
            const int64_t first = block * kRows;
            const int64_t begin = std::max(first, r.token_begin()), end = std::min({first + kRows, p.N, r.token_end()});
            for_segments(r, begin, end, [&](int64_t b, int64_t t0, int64_t t1) {
              const Tile part = rows_of(s.logits.tile(), t0 - first, t1 - first);
              const float* slope = s.logits.slope() ? s.logits.slope() + (t0 - first) * part.ld : nullptr;
              float* sums = s.residual.sums.floats() + (b - r.first) * p.cut.width;
              if (collect) {
                rowwise().exponentials(part, p.alpha, tile == first_tile, coef.ref.data() + t0, s.sums.sum(t0), s.sums.sum_x(t0));
                rowwise().weighted_sum(part, coef.value.data() + t0, slope, sums);
              } else {
                rowwise().residual(part, p.alpha, coef.ref.data() + t0, coef.value.data() + t0, slope, sums);
              }
            });
          }
          s.residual.add_product(p, s.logits.panel(), out);
        }
        if (collect) s.sums.fold(collect->partials, slab, r.token_begin(), r.token_end());
      });
  return slabs;
}

// Features of responses whose tokens' lse is known.
void exact_features(const HeadProblem& p, const RowPanels& rows, const Responses& r, const std::vector<Token>& tokens, float* features) {
  Coefficients coef{std::vector<float>(p.N), std::vector<float>(p.N)};
  for (int64_t t = r.token_begin(); t < r.token_end(); ++t) {
    // An fp32 lse is only good to half a unit in its last place; what it lacks goes into the coefficient.
    coef.ref[t] = static_cast<float>(tokens[t].lse);
    coef.value[t] = static_cast<float>(-r.weight[t] * std::exp(coef.ref[t] - tokens[t].lse));
  }
  const Buffer slabs = feature_pass(p, rows, r, coef, nullptr);
  finish_features(p, r, tokens, slabs.floats(), features);
}

// Features and statistics in one pass, believing `lse`; responses it serves badly are done again with the one just computed.
// False, and nothing usable, if lse is nowhere near.
bool believing_features(const HeadProblem& p, const RowPanels& rows, const Responses& r, const float* lse, const TokenStats& stats,
                        std::vector<Token>& tokens, float* features) {
  Coefficients coef{std::vector<float>(p.N), std::vector<float>(p.N)};
  Collected collected{Partials(p.cut.slabs, p.N), std::vector<float>(p.N)};
  for (int64_t t = r.token_begin(); t < r.token_end(); ++t) {
    coef.ref[t] = std::isfinite(lse[t]) ? lse[t] : 0.0f;
    coef.value[t] = static_cast<float>(-r.weight[t]);
    for (int64_t slab = 0; slab < p.cut.slabs; ++slab) collected.partials.ref(slab)[t] = coef.ref[t];
  }
  const Buffer slabs = feature_pass(p, rows, r, coef, &collected);
  merge_slabs(p, collected.partials, collected.target_acc, r.token_begin(), r.token_end(), stats, tokens.data());
  for (int64_t t = r.token_begin(); t < r.token_end(); ++t)
    if (!(std::abs(tokens[t].lse - coef.ref[t]) <= kLseBelief)) return false;

  const auto served = [&](int64_t b) {
    bool good = true;
    for (int64_t t = r.cu[b]; t < r.cu[b + 1]; ++t) good &= std::abs(tokens[t].lse - coef.ref[t]) <= kLseSlack;
    return good;
  };
  finish_features(p, r, tokens, slabs.floats(), features);
  for (int64_t b = r.first; b < r.last;) {
    int64_t end = b;
    while (end < r.last && !served(end)) ++end;
    if (end > b) exact_features(p, rows, {r.cu, r.weight, b, end}, tokens, features);
    b = std::max(end, b + 1);
  }
  return true;
}

// a_t / sum of a over the response, and 0 where the response is empty or its weights cancel.
std::vector<double> normalised_weights(const int64_t* cu, int64_t B, int64_t N, const float* weights) {
  std::vector<double> out(N, 0.0);
  for (int64_t b = 0; b < B; ++b) {
    double sum = 0;
    for (int64_t t = cu[b]; t < cu[b + 1]; ++t) sum += weights ? weights[t] : 1.0;
    if (sum == 0) continue;
    for (int64_t t = cu[b]; t < cu[b + 1]; ++t) out[t] = (weights ? weights[t] : 1.0) / sum;
  }
  return out;
}

}  // namespace

TokenStats token_logprobs(const at::Tensor& hidden, const Head& head, const at::Tensor& targets, int64_t) {
  const HeadProblem p(hidden, head, targets);
  const TokenStats stats = empty_stats(p.N);
  if (p.N == 0) return stats;
  const RowPanels rows(p.hidden, p.format, p.depth);
  statistics_pass(p, rows, stats, nullptr);
  return stats;
}

std::tuple<at::Tensor, TokenStats> sequence_features(const at::Tensor& hidden, const Head& head, const at::Tensor& targets, const at::Tensor& cu_seqlens,
                                                     const std::optional<at::Tensor>& token_weights, const std::optional<at::Tensor>& lse,
                                                     int64_t workspace_bytes) {
  const HeadProblem p(hidden, head, targets);
  const int64_t B = cu_seqlens.size(0) - 1;
  const int64_t* cu = cu_seqlens.const_data_ptr<int64_t>();
  const TokenStats stats = empty_stats(p.N);
  const at::Tensor features = at::zeros({B, p.d}, at::kFloat);
  if (p.N == 0) return {features, stats};
  const RowPanels rows(p.hidden, p.format, p.depth);
  std::vector<Token> tokens(p.N);
  const std::vector<double> weight = normalised_weights(cu, B, p.N, token_weights ? token_weights->const_data_ptr<float>() : nullptr);
  // Tokens outside every response still get their statistics, which only the statistics pass gives.
  bool one_pass = lse && cu[0] == 0 && cu[B] == p.N;
  if (!one_pass) statistics_pass(p, rows, stats, tokens.data());
  for (int64_t b = 0; b < B; b += kResponses) {
    const Responses group{cu, weight.data(), b, std::min(b + kResponses, B)};
    if (group.token_end() == group.token_begin()) continue;
    float* out = features.mutable_data_ptr<float>();
    if (one_pass && believing_features(p, rows, group, lse->const_data_ptr<float>(), stats, tokens, out)) continue;
    if (one_pass) statistics_pass(p, rows, stats, tokens.data());
    one_pass = false;
    exact_features(p, rows, group, tokens, out);
  }
  return {features, stats};
}

}  // namespace g2rl
