// From weighted sums in vocabulary space to features, and the plan that keeps the exponentials of a block of tokens
// instead of computing them twice.
#pragma once

#include <algorithm>

#include "head_sums.h"

namespace g2rl {

// Responses first..last of a batch, and each token's normalised weight.
struct Responses {
  const int64_t* cu;
  const double* weight;  // [N]
  int64_t first, last;
  int64_t token_begin() const { return cu[first]; }
  int64_t token_end() const { return cu[last]; }
  int64_t padded() const { return product_rows(last - first); }
};

constexpr int64_t kResponses = 256;  // in a group, at most: their rows of R share the cache with a panel

// What the slabs' parts of Phi take for so many responses.
inline int64_t slab_features_bytes(const HeadProblem& p, int64_t responses) {
  return p.cut.slabs * product_rows(responses) * row_stride(p.padded_d()) * static_cast<int64_t>(sizeof(float));
}

// In a group of a plan that keeps nothing: as many as the workspace holds slabs' parts of, and no fewer than fill the
// rows of an AMX tile.
inline int64_t responses_at_once(const HeadProblem& p, int64_t workspace_bytes) {
  const int64_t held = p.allowed_bytes(workspace_bytes) / (slab_features_bytes(p, kRowStep) / kRowStep);
  return std::clamp(held / kRowStep * kRowStep, kRowStep, kResponses);
}

// Calls f(run) for up to `size` consecutive responses at a time, where `wanted(b)`; runs without tokens are left out.
template <typename Wanted, typename F>
void for_runs(const Responses& r, int64_t size, const Wanted& wanted, const F& f) {
  for (int64_t b = r.first; b < r.last;) {
    int64_t end = b;
    while (end < std::min(b + size, r.last) && wanted(end)) ++end;
    const Responses run{r.cu, r.weight, b, end};
    if (run.token_end() > run.token_begin()) f(run);
    b = std::max(end, b + 1);
  }
}

// The same for all of them.
template <typename F>
void for_groups(const Responses& r, int64_t size, const F& f) {
  for_runs(r, size, [](int64_t) { return true; }, f);
}

// Where in a tile of R [response][width] each of the tokens t_begin..t_end adds up.
inline void point_to_responses(const Responses& r, int64_t t_begin, int64_t t_end, float* residual, int64_t width,
                               float** out) {
  int64_t b = std::upper_bound(r.cu + r.first, r.cu + r.last + 1, t_begin) - r.cu - 1;
  for (int64_t t = t_begin; t < t_end; ++t) {
    while (r.cu[b + 1] <= t) ++b;
    *out++ = residual + (b - r.first) * width;
  }
}

// What a token's exponentials exp(u - ref) are multiplied by, ref being its lse as a float.
struct Coefficients {
  explicit Coefficients(int64_t N) : ref(N), value(N) {}
  void set(const Responses& r, const std::vector<Token>& tokens, int64_t begin, int64_t end);
  std::vector<float> ref, value;
};

// A thread's product of one tile of R with its tile of W: R as fp32 numbers enter products.
class ResidualProduct {
 public:
  ResidualProduct(const HeadProblem& p, int64_t responses);
  // out[responses, d] += sums[responses, width] W, and totals[responses] += the rows' sums. Fetches `soon` meanwhile.
  void add(const HeadProblem& p, const float* sums, const ColumnPanels& panel, float* out, double* totals,
           const Soon& soon = {});

 private:
  int64_t rows_, width_;
  LeftParts left_;
};

// Every slab's part of Phi, one after the other; a slab's rows are padded.
class SlabFeatures {
 public:
  SlabFeatures(const HeadProblem& p, const Responses& r)
      : row_stride_(row_stride(p.padded_d())),
        slab_units_(r.padded() * row_stride_),
        rows_(r.padded()),
        data_(slab_features_bytes(p, r.last - r.first)),
        totals_(p.cut.slabs * rows_) {}
  float* clear(int64_t slab) const;
  const float* row(int64_t slab, int64_t b) const { return data_.floats() + slab * slab_units_ + b * row_stride_; }
  // Sums of a slab's rows of R.
  double* totals(int64_t slab) { return totals_.data() + slab * rows_; }
  double total(int64_t slab, int64_t b) const { return totals_[slab * rows_ + b]; }

 private:
  int64_t row_stride_, slab_units_, rows_;
  Buffer data_;
  std::vector<double> totals_;
};

// Phi_b = scale * (slabs' parts in order + weight sums of the target rows).
void finish_features(const HeadProblem& p, const Responses& r, const std::vector<Token>& tokens,
                     const SlabFeatures& slabs, float* features);

// How the plan that keeps exponentials goes about a batch: at most so many tokens at a time, and rows of R for so many
// responses.
struct KeptPlan {
  int64_t tokens = 0;  // 0: two products serve better
  int64_t responses = 0;
};
KeptPlan plan_kept(const HeadProblem& p, const Responses& all, int64_t workspace_bytes);

// Statistics and features of all responses, with one product per token.
void kept_features(const HeadProblem& p, const Responses& all, const KeptPlan& plan, const TokenStats& stats,
                   float* features);

}  // namespace g2rl
