// One token's part of the residuals, from its logits that were kept: what `add_kept` and kernels that do it aside
// share.
#pragma once

#include "options.h"

namespace g2rl::cuda {

struct TokenTerms {
  float shift, weight, target;
  int y;
};

// Adds four words, v to v + 3, of a token to r.
template <bool SOFTCAP>
DEVICE void add_token(const float4& z, const TokenTerms& token, int v, const Options& options, float (&r)[4]) {
  const float of_columns[4] = {z.x, z.y, z.z, z.w};
  UNROLL for (int i = 0; i < 4; ++i) {
    float slope;
    const float e = exp2_fast(exponent_above<SOFTCAP>(token.shift, of_columns[i], options, slope));
    const float others = fmaf(-token.weight * slope, e, r[i]);
    r[i] = v + i == token.y ? r[i] + token.target : others;
  }
}

}  // namespace g2rl::cuda
