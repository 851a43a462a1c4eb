// Gradients of raw logits for a strip of the vocabulary: a block has 128 tokens and 128 words.
#include "grad_row.h"
#include "pipeline_sm80.h"

namespace g2rl::cuda::sm80 {

namespace {

template <class T, bool SOFTCAP>
struct GradLogits {
  const GradLogitsArguments& p;
  const int n0, v0;
  const Options options{p.head};
  const Place at = Place::here();

  DEVICE void operator()(int, Sums& z) const {
    add_bias_of_columns(p.head, v0 + at.column, z);
    UNROLL for (int i = 0; i < kRowBlocks; ++i) {
      UNROLL for (int q = 0; q < 2; ++q) {
        const int n = n0 + at.row + 16 * i + 8 * q;
        if (n < p.tokens.N) write_row(n, z[i] + 2 * q);
      }
    }
  }

  DEVICE void write_row(int n, const float* z) const {
    const GradRow of_row = GradRow::of(p, n, v0 + at.column);
    const float row_scale = p.strip.G_even ? p.rows_in[5 * p.rows_stride + n] : 1.f;
    const float even_scale = p.strip.G_even ? *p.strip.even_scale : 1.f;
    const int64_t row = n * p.strip.stride - p.strip.v_start;
    UNROLL for (int j = 0; j < kColumnBlocks; ++j) {
      UNROLL for (int e = 0; e < 2; ++e) {
        const int v = v0 + at.column + 8 * j + e;
        const float grad = of_row.template at<SOFTCAP>(8 * j + e, z[4 * j + e], options);
        if (v >= p.strip.v_end) continue;
        static_cast<T*>(p.strip.G)[row + v] = round_to<T>(grad * row_scale);
        if (p.strip.G_even) static_cast<T*>(p.strip.G_even)[row + v] = round_to<T>(grad * even_scale);
      }
    }
  }
};

template <class T, bool SOFTCAP>
__global__ void __launch_bounds__(kThreads, 1)
    grad_logits_kernel(const __grid_constant__ GradLogitsArguments p, const __grid_constant__ Matrix<T> hidden,
                       const __grid_constant__ Matrix<T> weight) {
  SHARED(shared);
  int block, words;
  const int strip_tiles = int(ceil_div(p.strip.v_end - p.strip.v_start, kTile));
  Order{int(ceil_div(p.tokens.N, kTile)), strip_tiles}.find(blockIdx.x, block, words);
  const GradLogits<T, SOFTCAP> epilogue{p, block * kTile, p.strip.v_start + words * kTile};
  multiply_tiles(shared, hidden, epilogue.n0, weight, epilogue.v0, 1, p.head.d, epilogue);
}

}  // namespace

int grad_logits(const Head& head, const Tokens& tokens, const float* rows_in, int64_t rows_stride, const Strip& strip,
                Stream stream) {
  const GradLogitsArguments p{head, tokens, rows_in, rows_stride, strip};
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
