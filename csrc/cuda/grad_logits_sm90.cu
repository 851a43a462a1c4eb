// Gradients of raw logits for a strip of the vocabulary, from recomputed logits, on Hopper: see grad_row.h. They are
// rounded once, to the model's dtype. An item is a tile: 128 tokens x 192 columns of the strip.
#include "grad_row.h"
#include "tiles_sm90.h"

namespace g2rl::cuda::sm90 {

namespace {

struct GradLogitsWalk {
  int item = blockIdx.x, v_start;
  Order order;

  // Rows: blocks of tokens; columns: tiles of the strip.
  static HOST_DEVICE Order order_of(int N, const Strip& strip) {
    return {int(ceil_div(N, kRows)), int(ceil_div(strip.v_end - strip.v_start, kColumnsOfTile))};
  }
  DEVICE GradLogitsWalk(int N, const Strip& strip) : v_start(strip.v_start), order(order_of(N, strip)) {}

  DEVICE bool next(Tile& tile) {
    if (item >= order.items()) return false;
    int block, column;
    order.find(item, block, column);
    item += gridDim.x;
    tile = {block * kRows, v_start + column * kColumnsOfTile, 0, true, true};
    return true;
  }
};

template <class T, bool SOFTCAP>
struct GradLogitsEpilogue {
  const GradLogitsArguments& p;
  const Options options{p.head};
  const Place at = Place::here();

  DEVICE void operator()(const Tile& tile, Sums& z, Held& held) const {
    add_bias_of_columns(p.head, tile.column, at, z);
    UNROLL for (int q = 0; q < 2; ++q) {
      become_gradients(of_row(tile, q), q, z);
      const int n = row(tile, q);
      if (p.strip.G_even) store(tile, q, p.strip.G_even, *p.strip.even_scale, z);
      store(tile, q, p.strip.G, p.strip.G_even ? p.rows_in[5 * p.rows_stride + n] : 1.f, z);
      if (q == 0) held.at_most<2>();
    }
  }

  // Rows beyond the last token take its numbers and are not stored.
  DEVICE int row(const Tile& tile, int q) const {
    const int n = tile.row + at.row + 8 * q;
    return n < p.tokens.N ? n : p.tokens.N - 1;
  }

  DEVICE GradRow of_row(const Tile& tile, int q) const { return GradRow::of(p, row(tile, q), tile.column + at.column); }

  // Few tiles hold a target of a warp's rows. A soft cap leaves no registers for two ways.
  DEVICE void become_gradients(const GradRow& of_row, int q, Sums& z) const {
    if (SOFTCAP || __any_sync(kAllLanes, unsigned(of_row.y) < kColumnsOfTile)) {
      become_gradients<true>(of_row, q, z);
    } else {
      become_gradients<false>(of_row, q, z);
    }
  }

  template <bool TARGETS>
  DEVICE void become_gradients(const GradRow& of_row, int q, Sums& z) const {
    UNROLL for (int i = 0; i < kSums / 2; ++i) {
      float& x = z[i / 2 * 4 + 2 * q + i % 2];
      x = of_row.template at<SOFTCAP, TARGETS>(i / 2 * 8 + i % 2, x, options);
    }
  }

  // The four threads of a row exchange pairs, so that each stores eight numbers and they store 64 bytes. Strips may end
  // or begin anywhere: numbers one by one there.
  DEVICE void store(const Tile& tile, int q, void* G, float scale, const Sums& z) const {
    const bool inside = tile.row + at.row + 8 * q < p.tokens.N;
    T* to = static_cast<T*>(G) + row(tile, q) * p.strip.stride - p.strip.v_start;
    UNROLL for (int j = 0; j < kSums / 4; j += 4) {
      uint32_t pairs[4];
      UNROLL for (int i = 0; i < 4; ++i) {
        const float* two = &z[4 * (j + i) + 2 * q];
        pairs[i] = round_pair<T>(two[0] * scale, two[1] * scale);
      }
      transpose(pairs);
      const int v = tile.column + 8 * j + 4 * at.column;
      if (inside) store_eight(to + v, p.strip.v_end - v, pairs);
    }
  }

  // As many of eight numbers as there is room for.
  static DEVICE void store_eight(T* to, int room, const uint32_t (&pairs)[4]) {
    if (room >= 8 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      *reinterpret_cast<uint4*>(to) = {pairs[0], pairs[1], pairs[2], pairs[3]};
      return;
    }
    UNROLL for (int i = 0; i < 8; ++i) {
      if (i < room) to[i] = T{uint16_t(pairs[i / 2] >> (16 * (i % 2)))};
    }
  }
};

template <class T, bool SOFTCAP>
__global__ void __launch_bounds__(kThreads, 1)
    grad_logits_kernel(const __grid_constant__ TensorMap hidden, const __grid_constant__ TensorMap weight,
                       const __grid_constant__ GradLogitsArguments p) {
  SHARED(shared);
  GradLogitsWalk walk(p.tokens.N, p.strip);
  const GradLogitsEpilogue<T, SOFTCAP> epilogue{p};
  run<T>(shared, RowsAsA{hidden}, RowsAsB{weight}, p.head.d, walk, epilogue);
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
