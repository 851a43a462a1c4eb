// Gradients of raw logits for a strip of the vocabulary: a block has 128 tokens and 128 words.
//
//   G_tv = -slope_tv p_tv (g_t + g'_t (log p_tv + H_t)),  v != y_t;   slope_ty times the target's gradient at y_t
#include "pipeline_sm80.h"

namespace g2rl::cuda::sm80 {

namespace {

struct Arguments {
  Head head;
  Tokens tokens;
  const float* rows_in;
  int64_t rows_stride;
  Strip strip;
};

template <class T, bool SOFTCAP>
struct GradLogits {
  const Arguments& p;
  const int n0, v0;
  const Options options{p.head};
  const Place at = Place::here();

  DEVICE void operator()(int, Sums& z) const {
    add_bias_of_columns(p.head, v0 + at.column, p.strip.v_end, z);
    UNROLL for (int i = 0; i < kRowBlocks; ++i) {
      UNROLL for (int q = 0; q < 2; ++q) {
        const int n = n0 + at.row + 16 * i + 8 * q;
        if (n < p.tokens.N) write_row(n, z[i] + 2 * q);
      }
    }
  }

  DEVICE void write_row(int n, const float* z) const {
    const float* of_row = p.rows_in + n;
    const float lse = of_row[0] * kLog2e, H = of_row[p.rows_stride], g = of_row[2 * p.rows_stride];
    const float g_entropy = of_row[3 * p.rows_stride], of_target = of_row[4 * p.rows_stride];
    const float row_scale = p.strip.G_even ? of_row[5 * p.rows_stride] : 1.f;
    const float even_scale = p.strip.G_even ? *p.strip.even_scale : 1.f;
    // g + g' (log p + H), by log p in units of log 2.
    const float constant = fmaf(g_entropy, H, g), factor = g_entropy * kLn2;
    const int y = int(p.tokens.targets[n]);
    const int64_t row = n * p.strip.stride - p.strip.v_start;
    UNROLL for (int j = 0; j < kColumnBlocks; ++j) {
      UNROLL for (int e = 0; e < 2; ++e) {
        const int v = v0 + at.column + 8 * j + e;
        float slope;
        const float log_p = exponent_above<SOFTCAP>(lse, z[4 * j + e], options, slope);
        const float others = -exp2_fast(log_p) * fmaf(factor, log_p, constant);
        const float grad = (v == y ? of_target : others) * slope;
        if (v >= p.strip.v_end) continue;
        static_cast<T*>(p.strip.G)[row + v] = round_to<T>(grad * row_scale);
        if (p.strip.G_even) static_cast<T*>(p.strip.G_even)[row + v] = round_to<T>(grad * even_scale);
      }
    }
  }
};

template <class T, bool SOFTCAP>
__global__ void __launch_bounds__(kThreads, 1)
    grad_logits_kernel(const __grid_constant__ Arguments p, const __grid_constant__ Matrix<T> hidden,
                       const __grid_constant__ Matrix<T> weight) {
  SHARED(shared);
  int block, words;
  find_work(int(ceil_div(p.tokens.N, kTile)), int(ceil_div(p.strip.v_end - p.strip.v_start, kTile)), block, words);
  const GradLogits<T, SOFTCAP> epilogue{p, block * kTile, p.strip.v_start + words * kTile};
  multiply_tiles(shared, hidden, epilogue.n0, weight, epilogue.v0, 1, p.head.d, epilogue);
}

}  // namespace

int grad_logits(const Head& head, const Tokens& tokens, const float* rows_in, int64_t rows_stride, const Strip& strip,
                Stream stream) {
  const Arguments p{head, tokens, rows_in, rows_stride, strip};
  return choose(head.dtype, [&](auto number) {
    using T = decltype(number);
    const auto hidden = Matrix<T>::of(tokens.hidden, tokens.stride, tokens.N);
    const auto weight = Matrix<T>::of(head.weight, head.stride, strip.v_end);
    const Launch at = blocks(ceil_div(tokens.N, kTile) * ceil_div(strip.v_end - strip.v_start, kTile));
    return choose(head.softcap,
                  [&](auto softcap) { return launch(at, stream, grad_logits_kernel<T, softcap>, p, hidden, weight); });
  });
}

}  // namespace g2rl::cuda::sm80
