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

template <class C>
struct GradLogitsWalk {
  Order order;
  int item = C::index(), v_start;

  // Rows: blocks of tokens of a cluster; columns: its tiles of the strip.
  static HOST_DEVICE Order order_of(int N, const Strip& strip) {
    return {int(ceil_div(N, kRows * C::kShareB)), int(ceil_div(strip.v_end - strip.v_start, kMaxRows * C::kShareA))};
  }
  DEVICE GradLogitsWalk(int N, const Strip& strip) : order(order_of(N, strip)), v_start(strip.v_start) {}

  DEVICE bool next(Tile& tile) {
    if (item >= order.rows * order.columns) return false;
    int block, column;
    order.find(item, block, column);
    item += C::count();
    tile = {(block * C::kShareB + C::row()) * kRows,
            v_start + (column * C::kShareA + C::column()) * kMaxRows,
            kMaxRows,
            0,
            true,
            true};
    return true;
  }
};

template <class T, bool SOFTCAP>
struct GradLogitsEpilogue {
  const GradLogitsArguments& p;
  const Options options{p.head};
  const Place at = Place::here();

  DEVICE void operator()(const Tile& tile, Sums& z) const {
    add_bias_of_columns(p.head, tile.b_row, at, z);
    const float even_scale = p.strip.G_even ? *p.strip.even_scale : 1.f;
    UNROLL for (int q = 0; q < 2; ++q) {
      const int n = tile.a_row + at.row + 8 * q;
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
        const int v = tile.b_row + 8 * j + at.column;
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

template <class T, bool SOFTCAP, class C>
__global__ void __launch_bounds__(kThreads, 1)
    grad_logits_kernel(const __grid_constant__ TensorMap hidden, const __grid_constant__ Boxes weight,
                       const __grid_constant__ GradLogitsArguments p) {
  SHARED(shared);
  const GradLogitsWalk<C> walk(p.tokens.N, p.strip);
  const GradLogitsEpilogue<T, SOFTCAP> epilogue{p};
  run<T, C, false>(shared, hidden, weight, p.head.d, walk, epilogue);
}

}  // namespace

int grad_logits(const Head& head, const Tokens& tokens, const float* rows_in, int64_t rows_stride, const Strip& strip,
                Stream stream) {
  if (tokens.N == 0) return 0;
  const GradLogitsArguments p{head, tokens, rows_in, rows_stride, strip};
  const auto run_on = [&](auto cluster) {
    using C = decltype(cluster);
    TensorMap hidden;
    Boxes weight;
    if (const int error = map_hidden_and_weight<C>(hidden, weight, head, tokens)) return error;
    const auto at = persistent<C>(GradLogitsWalk<C>::order_of(tokens.N, strip).items());
    return choose_half(head.dtype, [&](auto number) {
      return choose(head.softcap, [&](auto softcap) {
        return launch(at, stream, grad_logits_kernel<decltype(number), softcap, C>, hidden, weight, p);
      });
    });
  };
  return tokens.N > kRows ? run_on(Cluster<2, 2>{}) : run_on(Cluster<1, 1>{});
}

}  // namespace g2rl::cuda::sm90
