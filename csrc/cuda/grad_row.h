// The gradient of a token's raw logits, from its row of `rows_in`. With p = 2^(t - lse / ln 2):
//
//     G_tv = slope_tv (-p_tv (g_t + g'_t (log p_tv + H_t)))   v != y_t;   slope_ty times the target's gradient at y_t
//
// g and g' include logit_scale / T.
#pragma once

#include "options.h"

namespace g2rl::cuda {

struct GradLogitsArguments {
  Head head;
  Tokens tokens;
  const float* rows_in;
  int64_t rows_stride;
  Strip strip;
};

// Words are counted from a thread's first, so that with loops unrolled theirs are constants.
struct GradRow {
  int y;
  float lse, constant, factor, of_target;  // lse in units of log 2

  static DEVICE GradRow of(const GradLogitsArguments& p, int n, int first_word) {
    const float* of_row = p.rows_in + n;
    const float lse = of_row[0] * kLog2e, H = of_row[p.rows_stride], g = of_row[2 * p.rows_stride];
    const float g_entropy = of_row[3 * p.rows_stride], of_target = of_row[4 * p.rows_stride];
    // g + g' (log p + H), by log p in units of log 2.
    return {int(p.tokens.targets[n]) - first_word, lse, fmaf(g_entropy, H, g), g_entropy * kLn2, of_target};
  }

  // Without TARGETS no word is the target.
  template <bool SOFTCAP, bool TARGETS = true>
  DEVICE float at(int word, float z, const Options& options) const {
    float slope;
    const float log_p = exponent_above<SOFTCAP>(lse, z, options, slope);
    const float others = -exp2_fast(log_p) * fmaf(factor, log_p, constant);  // made for all: a branch costs more
    const float grad = TARGETS && word == y ? of_target : others;
    return SOFTCAP ? grad * slope : grad;
  }
};

}  // namespace g2rl::cuda
