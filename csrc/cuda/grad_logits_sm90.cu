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

// What an epilogue needs to know of a tile's rows; words are counted from the tile's first.
struct GradRows {
  GradRow rows[kRows];
  float scales[kRows];  // of G, where there is a G_even
};

struct Scratch {
  GradRows of_tiles[2];
  Handover handover;
};

struct WriteGradRows {
  const GradLogitsArguments& p;
  Scratch& scratch;
  GradLogitsWalk walk;

  DEVICE void operator()() const {
    scratch.handover.write_all(walk, scratch.of_tiles, [&](const Tile& tile, GradRows& to) { write(tile, to); });
  }

  // Rows beyond the last token take its numbers and are not stored.
  DEVICE void write(const Tile& tile, GradRows& to) const {
    UNROLL_1 for (int i = threadIdx.x - kWarp; i < kRows; i += kWriters) {
      const int n = tile.row + i < p.tokens.N ? tile.row + i : p.tokens.N - 1;
      to.rows[i] = GradRow::of(p, n, tile.column);
      if (p.strip.G_even) to.scales[i] = p.rows_in[5 * p.rows_stride + n];
    }
  }
};

template <class T, bool SOFTCAP>
struct GradLogitsEpilogue {
  const GradLogitsArguments& p;
  Scratch& scratch;
  const Options options{p.head};
  const Place at = Place::here();
  int calls = 0;

  DEVICE void operator()(const Tile& tile, Sums& z, Held& held) {
    add_bias_of_columns(p.head, tile.column, at, z);
    const GradRows& of_tile = scratch.of_tiles[calls % 2];
    scratch.handover.wait_to_read(calls);
    UNROLL for (int q = 0; q < 2; ++q) {
      GradRow row = of_tile.rows[at.row + 8 * q];
      row.y -= at.column;
      float scale = 1.f;
      if (std::is_same_v<T, fp16> && p.strip.G_even) {
        scale = of_tile.scales[at.row + 8 * q];
      }
      if (q == 1) scratch.handover.was_read(calls);
      become_gradients(row, q, z);
      if (std::is_same_v<T, fp16> && p.strip.G_even) {  // fp16 alone has a range to fit
        store(tile, q, p.strip.G_even, *p.strip.even_scale, z);
      }
      store(tile, q, p.strip.G, scale, z);
      if (q == 0) held.at_most<2>();
    }
    ++calls;
  }

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

  // The four threads of a row exchange pairs, so that each stores eight numbers and they store 64 bytes. All exchanges
  // before the first store: behind a branch for each they would wait for each other.
  DEVICE void store(const Tile& tile, int q, void* G, float scale, const Sums& z) const {
    constexpr int kStores = kSums / 16;
    uint32_t pairs[kStores][4];
    UNROLL for (int j = 0; j < kStores; ++j) {
      UNROLL for (int i = 0; i < 4; ++i) {
        const float* two = &z[16 * j + 4 * i + 2 * q];
        pairs[j][i] = round_pair<T>(two[0] * scale, two[1] * scale);
      }
      transpose(pairs[j]);
    }
    const int n = tile.row + at.row + 8 * q, first = tile.column + 4 * at.column;
    if (n >= p.tokens.N) return;
    T* to = static_cast<T*>(G) + n * p.strip.stride + (first - p.strip.v_start);
    // Alike for the threads of a row. Strips may end, and their rows begin, anywhere: numbers one by one there.
    if (tile.column + kColumnsOfTile <= p.strip.v_end && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      UNROLL for (int j = 0; j < kStores; ++j) {
        *reinterpret_cast<uint4*>(to + 32 * j) = {pairs[j][0], pairs[j][1], pairs[j][2], pairs[j][3]};
      }
    } else {
      UNROLL for (int i = 0; i < 8 * kStores; ++i) {
        const int j = i / 8, v = 32 * j + i % 8;
        if (first + v < p.strip.v_end) to[v] = T{uint16_t(pairs[j][i % 8 / 2] >> (16 * (i % 2)))};
      }
    }
  }
};

template <class T, bool SOFTCAP>
__global__ void __launch_bounds__(kThreads, 1)
    grad_logits_kernel(const __grid_constant__ TensorMap hidden, const __grid_constant__ TensorMap weight,
                       const __grid_constant__ GradLogitsArguments p) {
  SHARED(shared);
  Scratch& scratch = *reinterpret_cast<Scratch*>(shared + kScratch);
  scratch.handover.initialise();
  GradLogitsWalk walk(p.tokens.N, p.strip);
  GradLogitsEpilogue<T, SOFTCAP> epilogue{p, scratch};
  run<T>(shared, RowsAsA{hidden}, RowsAsB{weight}, p.head.d, walk, epilogue, WriteGradRows{p, scratch, walk});
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
      return launch_persistent(items, sizeof(Scratch), stream, grad_logits_kernel<decltype(number), softcap>, hidden,
                               weight, p);
    });
  });
}

}  // namespace g2rl::cuda::sm90
