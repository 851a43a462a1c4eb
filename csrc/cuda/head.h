// Kernels of the head: log-probabilities, entropy and features, forward and backward. MATH.md has the formulas.
//
// Symbols: N tokens, d hidden, V vocabulary, B responses, y targets. z = W h + b raw logits; u = scale * z, or
// scale * tanh(inner_scale * z) under a soft cap; slope = dz/dz_raw of the cap, 1 without one. Exponents are kept in
// units of log 2: t = u / ln 2.
//
// All pointers are memory of the current device. Rows of hidden and weight have unit stride. Every function launches on
// `stream` and returns 0 or CUDA's error code; none allocates or waits.
#pragma once

#include "platform.h"

namespace g2rl::cuda {

enum class Dtype : int { bf16, fp16, fp32 };

struct Head {
  const void* weight;       // [V, d]
  const void* bias;         // [V], or null
  int64_t stride;           // elements from one row of weight to the next
  int V, d;                 //
  Dtype dtype, bias_dtype;  // dtype: of weight and hidden
  float inner_scale, scale;
  bool softcap;
};

struct Tokens {
  const void* hidden;  // [N, d]
  const int64_t* targets;
  int64_t stride;  // elements from one row of hidden to the next
  int N;
};

// Response b owns tokens cu_seqlens[b] to cu_seqlens[b + 1].
struct Responses {
  const int* cu_seqlens;  // [B + 1]
  int B;
};

// Sums over the vocabulary that leave the target out, for each token in `splits` parts: planes [4, splits, N] of
//   m = max t_v, or less by 10 at most,  S = sum 2^(t_v - m),  X = sum 2^(t_v - m) (t_v - m)  over v != y;
//   z_y, 0 in parts without y.
// A part in which nothing is left has m <= kNoMaximum and S = X = 0.
struct Partials {
  float* planes;
  int splits;
};
constexpr float kNoMaximum = -1e29f;
// Stands for a logit that is left out: 2^(kMasked - m) = 0 for every m, and 0 * (kMasked - m) is no NaN.
constexpr float kMasked = -1e30f;

// What features need to know of each token, fp32 [N] each, `rest` with a given lse alone. S is 1 where that, as shift,
// was exact.
struct Terms {
  float* shift;   // of exponents, in units of log 2
  float* weight;  // a / S, of the others' 2^(t - shift)
  float* target;  // a slope_y S_rest / S, what the target's residual adds
  float* S;
  float* rest;  // a slope_y S_rest, less what R has of it already
};

// What a chunk of tokens leaves for `add_kept`, a row for each, `stride` bytes apart; null: nothing is left.
//
// With roots_of = 0 raw logits in fp32. Otherwise, with t* the largest t of `roots_of` words, target left out:
//   round(65535 * 2^((t - t*) / 2)) in 16 bits for each word, 0 for the target, then t* in fp32 for each `roots_of`
//   words.
// A square grows with its root, and so does its error: 1.5e-5 of the largest at most, where fp16 would leave 5e-4. Of
// each 32 words, place 8 l + 2 j + e has word 8 j + 2 l + e, as threads have them that multiply (l, j < 4; e < 2).
struct Kept {
  void* rows;
  int64_t stride;
  int roots_of;
};
constexpr float kRootUnit = 1.f / 65535;

// Residuals of kSegment tokens are added up at a time, and their sums: one sum of tens of thousands would lose digits.
constexpr int kSegment = 512;

// `add_kept` counts segments from a response's first token. Where a chunk ends inside a segment, its sums so far [V]
// come `from` the chunk before and go `to` the next.
struct Carry {
  const float* from;
  float* to;
};
// Where references begin in a row that holds roots, those of whole tiles.
HOST_DEVICE int64_t bytes_of_roots(int V, int roots_of) { return ceil_div(V, roots_of) * roots_of * 2; }

// Gradients of raw logits for columns v_start to v_end, [N, stride] each in the head's dtype.
struct Strip {
  void* G;       // rows scaled by row 5 of `rows_in` where `G_even` is not null
  void* G_even;  // all scaled by *even_scale; null but for fp16
  const float* even_scale;
  int64_t stride;
  int v_start, v_end;
};

// ---- kernels with a product, for each generation of tensor cores ----
//
// sm90: TMA and wgmma; 16-bit inputs whose rows are aligned to 16 bytes (`sm90::serves`), d > 0, and N > 0 for sums
// over responses. sm80: mma.sync for 16-bit inputs, FMA for fp32; any stride, any alignment.

int64_t packing_bytes(int N, int B);

#define G2RL_HEAD_KERNELS                                                                                              \
  /* Parts of the vocabulary in Partials; fixed by V, so that a token's sums do not depend on its batch. */            \
  int splits(int V);                                                                                                   \
  /* A row of `Kept`, and `roots_of`. */                                                                               \
  int64_t kept_bytes(const Head&);                                                                                     \
  int kept_roots(const Head&);                                                                                         \
  int statistics(const Head&, const Tokens&, const Partials&, const Kept&, Stream);                                    \
  /* R[b, v] = sum over tokens t of b of: target_t at v = y_t, else -weight_t slope_tv 2^(t_tv - shift_t); [B, V].     \
     For responses whose flag is not 0; null: for all. `packing`: memory of packing_bytes(N, B). */                    \
  int residuals(const Head&, const Tokens&, const Responses&, const Terms&, const int* flags, int* packing, float* R,  \
                Stream);                                                                                               \
  /* The same with lse (natural units) for shift, a for weight, and for target_t what it is if lse_t is exact:         \
     `residual_of_target`. And Partials of `residual_splits(V)` parts, with z_y [N] in the place of m. */              \
  int residual_splits(int V);                                                                                          \
  int residuals_and_statistics(const Head&, const Tokens&, const Responses&, const float* lse, const float* a,         \
                               int* packing, float* R, const Partials&, Stream);                                       \
  /* rows_in [6, rows_stride]: lse, H, g, g', the target's gradient, row scale; grad_row.h has G's formula of them. */ \
  int grad_logits(const Head&, const Tokens&, const float* rows_in, int64_t rows_stride, const Strip&, Stream);        \
  /* features [B, d] = logit_scale * (R * inverse) W. `memory`: of projection_bytes(head, B). */                       \
  int64_t projection_bytes(const Head&, int B);                                                                        \
  int project(const Head&, const float* R, const float* inverse, int B, float logit_scale, void* memory,               \
              float* features, Stream);

namespace sm90 {
bool serves(const Head&, const Tokens&);
G2RL_HEAD_KERNELS
}  // namespace sm90
namespace sm80 {
G2RL_HEAD_KERNELS
}  // namespace sm80

// ---- kernels of single tokens and responses, tokens.cu ----

// Joins parts: writes log p, entropy and lse to results [3, stride]; with token weights a [N] also `terms`, else null.
// `lse`: the shift that the partials were made with, where one was given; else null.
int merge(const Head&, const Partials&, int N, const float* lse, const float* a, float* results, int64_t stride,
          const Terms&, Stream);
// inverse[b] = 1 / sum a (0 without weight); flags[b] = 1 where a token of weight has S too far from 1 for its lse.
int responses(const Responses&, const float* a, const float* S, const float* lse, float* inverse, int* flags, Stream);
// R [B, V] += residuals of tokens first to last, of which `kept` tells; terms count from `first`. R is 0 at first, and
// chunks follow each other.
int add_kept(const Head&, const Kept&, const int64_t* targets, const Responses&, const Terms&, const Carry&, int first,
             int last, float* R, Stream);
// R [B, V] += rest_t at y_t, for responses whose flag is 0; none has more than N tokens.
int add_targets(const int64_t* targets, int N, const Responses&, const Terms&, const int* flags, int V, float* R,
                Stream);

}  // namespace g2rl::cuda
