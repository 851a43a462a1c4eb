// The head's options applied to a raw logit, and what CUDA's own functions do too slowly or too roughly.
#pragma once

#include "head.h"

namespace g2rl::cuda {

// tanh x to one unit in the last place or two, and 1 / cosh^2 x, which 1 - tanh^2 x is not where tanh is near 1.
DEVICE float tanh_and_slope(float x, float& slope) {
  const float size = fabsf(x), t = exp2_fast(-2.f * kLog2e * size), r = reciprocal_fast(1.f + t);
  slope = 4.f * t * r * r;
  // Below 0.55, where 1 - 2t / (1 + t) cancels: minimax in x^2, 1.3e-9 of tanh.
  const float s = x * x;
  float p = -0.006207427f;
  p = fmaf(p, s, 0.021027217f);
  p = fmaf(p, s, -0.053842276f);
  p = fmaf(p, s, 0.133325f);
  p = fmaf(p, s, -0.33333316f);
  const float small = fmaf(x, s * p, x), large = fmaf(-2.f * t, r, 1.f);
  return size < 0.55f ? small : x < 0.f ? -large : large;
}

// log(1 + q) for q in [0, 1] to about one unit in the last place: 2 atanh(q / (2 + q)) by its series.
DEVICE float log1p_of_ratio(float q) {
  const float s = q / (2.f + q), x = s * s;
  float p = 1.f / 15;
  p = fmaf(p, x, 1.f / 13);
  p = fmaf(p, x, 1.f / 11);
  p = fmaf(p, x, 1.f / 9);
  p = fmaf(p, x, 1.f / 7);
  p = fmaf(p, x, 1.f / 5);
  p = fmaf(p, x, 1.f / 3);
  return 2.f * s * fmaf(p, x, 1.f);
}

struct Options {
  float inner_scale;
  float scale;  // to exponents: in units of log 2

  DEVICE explicit Options(const Head& head)
      : inner_scale(head.inner_scale), scale(float(head.scale * 1.4426950408889634)) {}
};

// What options.scale makes an exponent: a raw logit, or its tanh under a soft cap, whose slope is 1 / cosh^2 there.
template <bool SOFTCAP>
DEVICE float capped(float z, const Options& options, float& slope) {
  if (SOFTCAP) return tanh_and_slope(z * options.inner_scale, slope);
  slope = 1.f;
  return z;
}

// t - shift, of t = u / ln 2 from a raw logit, rounded once: t alone, up to 173 for the logits that bounds are given
// for, would be off by 7e-6.
template <bool SOFTCAP>
DEVICE float exponent_above(float shift, float z, const Options& options, float& slope) {
  return fmaf(capped<SOFTCAP>(z, options, slope), options.scale, -shift);
}

// A target's residual by an lse that is taken for exact, with e = 2^(t - shift). R gets it before the others' sum is
// known: were all targets added to finished sums, which they nearly cancel, fp32 would lose digits. `merge` takes the
// same number, to its last bit, off what it should be. 0 for a sure token, of which 1 - e is but what lse was rounded
// by.
DEVICE float residual_of_target(float a, float slope, float e) {
  const float others = 1.f - e;
  return others < 0x1p-10f ? 0.f : a * slope * others;
}

// An exponent that was rounded, as a maximum to count others from: no less than it was before. Near 1e10 fp32 rounds by
// hundreds, and what is left of an exponent above its maximum would have an infinite exponential.
DEVICE float rounded_up(float t) { return fmaf(fabsf(t), 0x1p-23f, t); }

// A raw logit (under a soft cap: a hyperbolic tangent) that counts as none: its exponential is 0, and finite times 0.
DEVICE float masked_logit(const Options& options) {
  const float size = fminf(-kMasked / fabsf(options.scale), 3e38f);
  return options.scale > 0.f ? -size : size;
}

// Shift of a token beyond its response: its exponentials are 0.
constexpr float kBeyond = 1e30f;

// 0 beyond the vocabulary, and without a bias.
DEVICE float bias_at(const Head& head, int v) {
  if (head.bias == nullptr || v >= head.V) return 0.f;
  if (head.bias_dtype == Dtype::fp32) return static_cast<const float*>(head.bias)[v];
  if (head.bias_dtype == Dtype::bf16) return to_float(static_cast<const bf16*>(head.bias)[v]);
  return to_float(static_cast<const fp16*>(head.bias)[v]);
}

// Sums of a token in words that were added so far, S and X as in `Partials`, to a larger maximum m.
DEVICE void rescale(float& m, float& S, float& X, float largest) {
  const float moved = m - largest, factor = exp2_fast(moved);
  X = fmaf(S, moved, X) * factor;
  S *= factor;
  m = largest;
}

}  // namespace g2rl::cuda
