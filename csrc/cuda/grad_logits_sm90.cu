// Gradients of raw logits for a strip of the vocabulary, from recomputed logits, on Hopper. An item is a tile: 128
// tokens (of each block of the cluster) x 192 columns of the strip. With p = 2^(t - lse / ln 2):
//
//     G_tv = slope_tv (-p_tv (g_t + g'_t (log p_tv + H_t)))   v != y_t;   given for v = y_t
//
// rounded once, to the model's dtype; g and g' include logit_scale / T.
#include "tiles_sm90.h"

namespace g2rl::cuda::sm90 {

namespace {

struct GradLogitsArguments {
  Head head;
  Tokens tokens;
  const float* rows_in;
  int64_t rows_stride;
  Strip strip;
};

struct GradLogitsWalk {
  const TensorMap& weight;
  int item = blockIdx.x, v0, v_start;
  Order order;

  // Rows: blocks of tokens; columns: tiles of the strip.
  static HOST_DEVICE Order order_of(int N, const Strip& strip) {
    return {int(ceil_div(N, kRows)), int(ceil_div(strip.v_end - strip.v_start, kColumnsOfTile))};
  }
  DEVICE GradLogitsWalk(const TensorMap& weight, int N, const Strip& strip)
      : weight(weight), v_start(strip.v_start), order(order_of(N, strip)) {}

  DEVICE bool next(Tile& tile) {
    if (item >= order.items()) return false;
    int block, column;
    order.find(item, block, column);
    item += gridDim.x;
    v0 = v_start + column * kColumnsOfTile;
    tile = {block * kRows, v0, 0, true, true};
    return true;
  }

  DEVICE void load(uint32_t barrier, uint32_t to, int k) const {
    if (threadIdx.x == 0) tma_load(weight, barrier, to, k, v0);
  }
};

template <class T, bool SOFTCAP>
struct GradLogitsEpilogue {
  const GradLogitsArguments& p;
  const Options options{p.head};
  const Place at = Place::here();

  DEVICE void operator()(const Tile& tile, Sums& z) const {
    add_bias_of_columns(p.head, tile.column, at, z);
    const float even_scale = p.strip.G_even ? *p.strip.even_scale : 1.f;
    UNROLL for (int q = 0; q < 2; ++q) {
      const int n = tile.row + at.row + 8 * q;
      // Rows beyond the last token take its numbers and are not stored.
      const bool inside = n < p.tokens.N;
      const float* of_row = p.rows_in + (inside ? n : p.tokens.N - 1);
      const float lse = of_row[0] * kLog2e, H = of_row[p.rows_stride], g = of_row[2 * p.rows_stride];
      const float g_entropy = of_row[3 * p.rows_stride], of_target = of_row[4 * p.rows_stride];
      const float row_scale = p.strip.G_even ? of_row[5 * p.rows_stride] : 1.f;
      // g + g' (log p + H), by log p in units of log 2.
      const float constant = fmaf(g_entropy, H, g), factor = g_entropy * kLn2;
      const int y = int(p.tokens.targets[inside ? n : p.tokens.N - 1]), v_end = inside ? p.strip.v_end : 0;
      const int64_t row = n * p.strip.stride - p.strip.v_start;
      UNROLL for (int j = 0; j < kSums / 4; ++j) {
        const int v = tile.column + 8 * j + at.column;
        float grad[2];
        UNROLL for (int e = 0; e < 2; ++e) {
          float slope;
          const float log_p = exponent_above<SOFTCAP>(lse, z[4 * j + 2 * q + e], options, slope);
          grad[e] = -exp2_fast(log_p) * fmaf(factor, log_p, constant);
          if (v + e == y) grad[e] = of_target;
          if (SOFTCAP) grad[e] *= slope;
        }
        if (p.strip.G_even) store(p.strip.G_even, row + v, v, v_end, grad, even_scale);
        store(p.strip.G, row + v, v, v_end, grad, row_scale);
      }
    }
  }

  // Both numbers at once where memory allows: rows of the strip may start anywhere.
  static DEVICE void store(void* G, int64_t offset, int v, int v_end, const float (&grad)[2], float scale) {
    T* to = static_cast<T*>(G) + offset;
    const T low = round_to<T>(grad[0] * scale), high = round_to<T>(grad[1] * scale);
    if (v + 1 < v_end && offset % 2 == 0) {
      *reinterpret_cast<uint32_t*>(to) = uint32_t(low.bits) | uint32_t(high.bits) << 16;
      return;
    }
    if (v < v_end) to[0] = low;
    if (v + 1 < v_end) to[1] = high;
  }
};

template <class T, bool SOFTCAP>
__global__ void __launch_bounds__(kThreads, 1)
    grad_logits_kernel(const __grid_constant__ TensorMap hidden, const __grid_constant__ TensorMap weight,
                       const __grid_constant__ GradLogitsArguments p) {
  SHARED(shared);
  GradLogitsWalk walk(weight, p.tokens.N, p.strip);
  const GradLogitsEpilogue<T, SOFTCAP> epilogue{p};
  run<T>(shared, hidden, p.head.d, walk, epilogue);
}

}  // namespace

int grad_logits(const Head& head, const Tokens& tokens, const float* rows_in, int64_t rows_stride, const Strip& strip,
                Stream stream) {
  if (tokens.N == 0) return 0;
  TensorMap hidden, weight;
  if (const int error = map_hidden_and_weight(hidden, weight, head, tokens)) return error;
  const GradLogitsArguments p{head, tokens, rows_in, rows_stride, strip};
  const int64_t items = GradLogitsWalk::order_of(tokens.N, strip).items();
  return choose_half(head.dtype, [&](auto number) {
    return choose(head.softcap, [&](auto softcap) {
      return launch_persistent(items, 0, stream, grad_logits_kernel<decltype(number), softcap>, hidden, weight, p);
    });
  });
}

}  // namespace g2rl::cuda::sm90
