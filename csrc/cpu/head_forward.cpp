// Forward passes of the head.
//
// Statistics pass: every (slab of vocabulary, block of tokens) gives per row a reference m near its largest entry and
// the sums of e = exp(u - m) and e (u - m), the target's own entry left out. They merge, in double precision and in
// slab order, into log p, entropy, lse and 1 - p_y = S_rest / S.
//
// Feature pass: the logits once more, now with lse known; the weighted sums over a response's tokens stay in vocabulary
// space,
//   R[b, v] = - sum_t a_t p_tv D_tv        for v != y_t,
// and each tile of R meets its tile of W while both are in cache: Phi_b = scale (R W + sum_t a_t (1 - p_y) D_y W[y_t]).
// Where the batch is large enough, head_kept.cpp saves this second product.
//
// With lse given the feature pass comes first and alone: its own sums say how far the given lse was off, and a response
// for which that matters is done again with the right one.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "head_features.h"

namespace g2rl {
namespace {

// exp(u - lse) sums to 1 within this, or the response is done again: about the rounding of an fp32 lse near 100.
constexpr double kLseSlack = 4e-6;
// Beyond this the sums themselves may have overflowed: the given lse is not of this head.
constexpr double kLseBelief = 0.5;
// Of a larger one doubles do not hold how far it is off. It is not of this head either, whose logits are floats.
constexpr float kLargestLse = 1e15f;

Tile rows_of(const Tile& t, int64_t begin, int64_t end) {
  return {t.acc + begin * t.ld, t.ld, static_cast<int>(end - begin), t.cols, t.width};
}

// The sums of all tokens. `scales`, if not null, is what the features of the same tokens will be rounded by.
Partials statistics_pass(const HeadProblem& p, const RowPanels& rows, const TileScales* scales) {
  Partials found(p.cut.slabs, 0, p.N);
  struct State {
    LogitTile logits;
    RunningSums sums;
  };
  for_tasks(
      p.cut.slabs, [&] { return State{LogitTile(p), RunningSums(p.N)}; },
      [&](State& s, int64_t slab) { slab_statistics(p, rows, slab, s.logits, s.sums, found, scales, KeepNothing{}); });
  return found;
}

// One pass over the vocabulary for the responses in r: every slab's part of their features. With `scales` the
// exponentials are rounded as the plan that keeps them would round them; with `collect` the statistics of the tokens
// come too.
SlabFeatures feature_pass(const HeadProblem& p, const RowPanels& rows, const Responses& r, const Coefficients& coef,
                          const TileScales* scales, const Partials* collect) {
  const int64_t B = r.padded(), width = p.cut.width;
  SlabFeatures slabs(p, r);
  // In several parts a second panel would be much of the op's memory, and converting W again little of its time.
  const bool both_layouts = p.format.parts == 1;
  struct State {
    LogitTile logits;
    Buffer residual;  // [B, width], a tile of R
    ResidualProduct product;
    RunningSums sums;
  };
  for_tasks(
      p.cut.slabs,
      [&] {
        return State{LogitTile(p), Buffer(B * width * sizeof(float)), ResidualProduct(p, B),
                     RunningSums(collect ? p.N : 0)};
      },
      [&](State& s, int64_t slab) {
        float* out = slabs.clear(slab);
        const int64_t first_tile = p.cut.slab_begin(slab);
        for (int64_t tile = first_tile; tile < p.cut.slab_begin(slab + 1); ++tile) {
          s.logits.load(tile, both_layouts);
          std::memset(s.residual.floats(), 0, B * width * sizeof(float));
          ResidualJob pending;
          for (int64_t block = r.token_begin() / kRows; block * kRows < r.token_end(); ++block) {
            rowwise().residual(pending, s.logits.start(rows, block));
            const int64_t first = rows.first(block);
            const Tile whole = s.logits.finish(/*want_slope=*/true, collect ? collect->target(first) : nullptr);
            const int64_t begin = std::max(first, r.token_begin()), end = std::min(first + whole.rows, r.token_end());
            pending.tile = rows_of(whole, begin - first, end - first);
            pending.alpha = p.alpha;
            pending.slope = s.logits.slope() ? s.logits.slope() + (begin - first) * whole.ld : nullptr;
            pending.ref = coef.ref.data() + begin;
            std::copy_n(coef.value.data() + begin, end - begin, pending.coef);
            point_to_responses(r, begin, end, s.residual.floats(), width, pending.out);
            if (collect) {
              pending.first = tile == first_tile;
              pending.sum = s.sums.sum(begin), pending.sum_x = s.sums.sum_x(begin);
            } else if (scales) {
              pending.rounded = true;
              pending.ref = scales->ref(tile, begin);
              rowwise().kept_scales(pending.tile.rows, pending.ref, scales->top(tile, begin), coef.ref.data() + begin,
                                    coef.value.data() + begin, pending.unit, pending.coef);
            }
          }
          rowwise().residual(pending, {});
          if (!both_layouts) s.logits.straighten();
          s.product.add(p, s.residual.floats(), s.logits.panel(), out, slabs.totals(slab));
        }
        if (collect) s.sums.fold(*collect, slab, r.token_begin(), r.token_end(), 0);
      });
  return slabs;
}

// Features of responses whose tokens' lse is known.
void exact_features(const HeadProblem& p, const RowPanels& rows, const Responses& r, const std::vector<Token>& tokens,
                    const TileScales* scales, float* features) {
  Coefficients coef(p.N);
  coef.set(r, tokens, r.token_begin(), r.token_end());
  finish_features(p, r, tokens, feature_pass(p, rows, r, coef, scales, nullptr), features);
}

// Features and statistics in one pass, believing `lse`; responses it serves badly are done again with the one just
// computed. Tokens that it is nowhere near are marked in `unknown` [N], and their responses left to the caller.
void believing_features(const HeadProblem& p, const RowPanels& rows, const Responses& r, const float* lse,
                        const TokenStats& stats, std::vector<Token>& tokens, float* features,
                        std::vector<char>& unknown) {
  Coefficients coef(p.N);
  const Partials partials(p.cut.slabs, 0, p.N);
  for (int64_t t = r.token_begin(); t < r.token_end(); ++t) {
    coef.ref[t] = std::abs(lse[t]) < kLargestLse ? lse[t] : 0.0f;
    coef.value[t] = static_cast<float>(-r.weight[t]);
    for (int64_t slab = 0; slab < p.cut.slabs; ++slab) *partials.ref(slab, t) = coef.ref[t];
  }
  std::optional<SlabFeatures> slabs = feature_pass(p, rows, r, coef, nullptr, &partials);
  merge_slabs(p, partials, r.token_begin(), r.token_end(), stats, tokens.data());
  for (int64_t t = r.token_begin(); t < r.token_end(); ++t)
    unknown[t] = !(std::abs(tokens[t].lse - coef.ref[t]) <= kLseBelief);
  const auto badly_served = [&](int64_t b) {
    bool well = true, known = true;
    for (int64_t t = r.cu[b]; t < r.cu[b + 1]; ++t) {
      well &= std::abs(tokens[t].lse - coef.ref[t]) <= kLseSlack;
      known &= !unknown[t];
    }
    return known && !well;
  };
  // The other entries were not divided by the sum found here, so the target's is not either.
  std::vector<Token> believed = tokens;
  for (int64_t t = r.token_begin(); t < r.token_end(); ++t) believed[t].rest *= std::exp(tokens[t].lse - coef.ref[t]);
  finish_features(p, r, believed, *slabs, features);
  slabs.reset();  // those of responses done again take their place
  for_runs(r, r.last - r.first, badly_served,
           [&](const Responses& run) { exact_features(p, rows, run, tokens, nullptr, features); });
}

// The statistics of tokens marked in `unknown`, and the features of their responses, `at_once` of them, by two passes.
// All others keep their bits: a NaN of one does not choose the way for all.
void two_passes(const HeadProblem& p, const RowPanels& rows, const Responses& all, const std::vector<char>& unknown,
                const TokenStats& stats, std::vector<Token>& tokens, int64_t at_once, float* features) {
  std::optional<TileScales> scales;
  if (p.cap <= 0) scales.emplace(p.cut.tiles, p.N);
  const TileScales* rounding = scales ? &*scales : nullptr;
  std::vector<float> memory(3 * p.N);
  const TokenStats found{memory.data(), memory.data() + p.N, memory.data() + 2 * p.N};
  merge_slabs(p, statistics_pass(p, rows, rounding), 0, p.N, found, tokens.data());
  for (int64_t t = 0; t < p.N; ++t)
    if (unknown[t]) stats.logps[t] = found.logps[t], stats.entropy[t] = found.entropy[t], stats.lse[t] = found.lse[t];
  // A response without tokens does not end a run.
  const auto wanted = [&](int64_t b) {
    const auto begin = unknown.begin() + all.cu[b], end = unknown.begin() + all.cu[b + 1];
    return begin == end || std::find(begin, end, 1) != end;
  };
  for_runs(all, at_once, wanted,
           [&](const Responses& run) { exact_features(p, rows, run, tokens, rounding, features); });
}

// a_t / sum of a over the response, and 0 where the response is empty or has no weight.
std::vector<double> normalised_weights(const Batch& batch, int64_t N) {
  const int64_t* cu = batch.cu_seqlens;
  const float* weights = batch.token_weights;
  std::vector<double> out(N, 0.0);
  for (int64_t b = 0; b < batch.B; ++b) {
    double sum = 0;
    for (int64_t t = cu[b]; t < cu[b + 1]; ++t) sum += weights ? weights[t] : 1.0;
    if (sum == 0) continue;
    for (int64_t t = cu[b]; t < cu[b + 1]; ++t) out[t] = (weights ? weights[t] : 1.0) / sum;
  }
  return out;
}

// The responses as passes add up their tokens: cut every kSegment tokens, counted from a response's first. An fp32 sum
// of more would lose digits that features are made of, the small difference between it and what the targets add.
class Segments {
 public:
  static constexpr int64_t kSegment = 512;

  // features [B, d] are those of the batch.
  Segments(const Batch& batch, int64_t d, float* features) : d_(d), features_(features) {
    const int64_t *cu = batch.cu_seqlens, B = batch.B;
    for (int64_t b = 0; b < B; ++b) {
      firsts_.push_back(static_cast<int64_t>(cu_.size()));
      cu_.push_back(cu[b]);
      for (int64_t t = cu[b] + kSegment; t < cu[b + 1]; t += kSegment) cu_.push_back(t);
    }
    firsts_.push_back(static_cast<int64_t>(cu_.size()));
    cu_.push_back(cu[B]);
    if (count() > B) of_segments_.resize(count() * d);
  }

  // `weight` [N]: normalised over whole responses.
  Responses all(const std::vector<double>& weight) const { return {cu_.data(), weight.data(), 0, count()}; }
  // [count, d], 0 at first.
  float* features() { return of_segments_.empty() ? features_ : of_segments_.data(); }

  // Adds up the responses' features, once those of segments are there.
  void join() const {
    if (of_segments_.empty()) return;
    std::vector<double> total(d_);
    for (size_t b = 0; b + 1 < firsts_.size(); ++b) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t s = firsts_[b]; s < firsts_[b + 1]; ++s)
        for (int64_t i = 0; i < d_; ++i) total[i] += of_segments_[s * d_ + i];
      std::copy(total.begin(), total.end(), features_ + b * d_);
    }
  }

 private:
  int64_t count() const { return firsts_.back(); }

  const int64_t d_;
  float* features_;
  std::vector<int64_t> cu_, firsts_;  // offsets of tokens; first segments of responses
  std::vector<float> of_segments_;
};

// Features of all segments, and statistics of all tokens.
void features_of(const HeadProblem& p, const Responses& all, const float* lse, int64_t workspace_bytes,
                 const TokenStats& stats, float* out) {
  const KeptPlan kept = lse ? KeptPlan{} : plan_kept(p, all, workspace_bytes);
  if (kept.tokens > 0) return kept_features(p, all, kept, stats, out);
  std::vector<Token> tokens(p.N);
  const RowPanels rows = p.rows(0, p.N);
  const int64_t at_once = responses_at_once(p, workspace_bytes);
  std::vector<char> unknown(p.N, !lse);
  if (lse)
    for_groups(all, at_once,
               [&](const Responses& r) { believing_features(p, rows, r, lse, stats, tokens, out, unknown); });
  if (std::count(unknown.begin(), unknown.end(), 1)) two_passes(p, rows, all, unknown, stats, tokens, at_once, out);
}

}  // namespace

void token_logprobs(const Tokens& tokens, const Head& head, const TokenStats& stats) {
  const HeadProblem p(tokens, head);
  if (p.N == 0) return;
  merge_slabs(p, statistics_pass(p, p.rows(0, p.N), nullptr), 0, p.N, stats, nullptr);
}

void sequence_features(const Tokens& tokens, const Head& head, const Batch& batch, const float* lse,
                       int64_t workspace_bytes, float* features, const TokenStats& stats) {
  const HeadProblem p(tokens, head);
  std::fill_n(features, batch.B * p.d, 0.0f);
  if (p.N == 0) return;
  const std::vector<double> weight = normalised_weights(batch, p.N);
  Segments segments(batch, p.d, features);
  features_of(p, segments.all(weight), lse, workspace_bytes, stats, segments.features());
  segments.join();
}

void token_sums(const Tokens& tokens, const Head& head, float* sums) {
  const HeadProblem p(tokens, head, /*whole=*/false);
  if (p.N == 0) return;
  sum_slabs(p, statistics_pass(p, p.rows(0, p.N), nullptr), sums);
}

void part_features(const Tokens& tokens, const Head& head, const Batch& batch, const float* sums, int64_t parts,
                   int64_t workspace_bytes, float* features, const TokenStats& stats) {
  const HeadProblem p(tokens, head, /*whole=*/false);
  std::fill_n(features, batch.B * p.d, 0.0f);
  std::vector<Token> merged(p.N);
  merge_parts(p, sums, parts, stats, merged.data());
  if (p.N == 0 || batch.B == 0) return;
  const std::vector<double> weight = normalised_weights(batch, p.N);
  const RowPanels rows = p.rows(0, p.N);
  Segments segments(batch, p.d, features);
  const int64_t at_once = responses_at_once(p, workspace_bytes);
  for_groups(segments.all(weight), at_once,
             [&](const Responses& r) { exact_features(p, rows, r, merged, nullptr, segments.features()); });
  segments.join();
}

}  // namespace g2rl
