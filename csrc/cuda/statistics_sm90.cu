// For each token, sums over the vocabulary that leave the target out (`Partials`), on Hopper. Rows of a tile are
// tokens, so that sums stay inside a thread until the end of an item: 128 tokens x one part of the vocabulary,
// kTilesOfPart tiles.
#include "tiles_sm90.h"

namespace g2rl::cuda::sm90 {

namespace {

constexpr int kTilesOfPart = 8;
constexpr int kPart = kTilesOfPart * kColumnsOfTile;

struct StatisticsArguments {
  Head head;
  Tokens tokens;
  Partials partials;
  Kept kept;
};

struct StatisticsWalk {
  const TensorMap& weight;
  int V, item = blockIdx.x, n0 = 0, v0 = 0, end = 0;
  Order order;

  // Rows: blocks of tokens; columns: parts.
  static HOST_DEVICE Order order_of(int N, int V) { return {int(ceil_div(N, kRows)), int(ceil_div(V, kPart))}; }

  DEVICE StatisticsWalk(const TensorMap& weight, int N, int V) : weight(weight), V(V), order(order_of(N, V)) {}

  DEVICE bool next(Tile& tile) {
    const bool first = v0 >= end;
    if (first) {
      if (item >= order.items()) return false;
      int block, part;
      order.find(item, block, part);
      item += gridDim.x;
      n0 = block * kRows;
      v0 = part * kPart;
      end = v0 + kPart < V ? v0 + kPart : V;
    }
    tile = {n0, v0, v0 / kPart, first, v0 + kColumnsOfTile >= end};
    v0 += kColumnsOfTile;
    return true;
  }

  DEVICE void load(uint32_t barrier, uint32_t to, int k) const {
    if (threadIdx.x == 0) tma_load(weight, barrier, to, k, v0 - kColumnsOfTile);
  }
};

template <bool SOFTCAP, bool KEEP>
struct StatisticsEpilogue {
  const StatisticsArguments& p;
  const Options options{p.head};
  const Place at = Place::here();
  const float masked = masked_logit(options);
  int y[2];
  float m[2], S[2], X[2], z_y[2];

  DEVICE int token(const Tile& tile, int q) const { return tile.row + at.row + 8 * q; }

  DEVICE void operator()(const Tile& tile, Sums& z) {
    if (tile.first) begin(tile);
    add_bias_of_columns(p.head, tile.column, at, z);
    if (KEEP) keep(tile, z);
    const bool targeted =
        unsigned(y[0] - tile.column) < kColumnsOfTile || unsigned(y[1] - tile.column) < kColumnsOfTile;
    const bool special = __any_sync(kAllLanes, targeted) || tile.column + kColumnsOfTile > p.head.V;
    if (special) take_targets(tile, z);
    if (SOFTCAP) cap(z);
    if (special) leave_out(tile, z);
    add(z);
    if (tile.last) end(tile);
  }

  DEVICE void begin(const Tile& tile) {
    UNROLL for (int q = 0; q < 2; ++q) {
      const int n = token(tile, q);
      y[q] = n < p.tokens.N ? int(p.tokens.targets[n]) : -1;
      m[q] = kNoMaximum;
      S[q] = X[q] = z_y[q] = 0.f;
    }
  }

  // Neighbours exchange pairs, so that a thread stores four numbers and the four threads of a row 64 bytes.
  DEVICE void keep(const Tile& tile, const Sums& z) const {
    const bool odd = at.column & 2;
    UNROLL for (int q = 0; q < 2; ++q) {
      const int n = token(tile, q);
      float* to = p.kept.logits + n * p.kept.stride + tile.column + (odd ? 8 : 0) + (at.column & 4);
      UNROLL for (int j = 0; j < kSums / 4; j += 2) {
        const float *even = &z[4 * j + 2 * q], *next = &z[4 * j + 4 + 2 * q];
        float other[2];
        UNROLL for (int e = 0; e < 2; ++e) other[e] = __shfl_xor_sync(kAllLanes, odd ? even[e] : next[e], 1);
        const float4 four =
            odd ? float4{other[0], other[1], next[0], next[1]} : float4{even[0], even[1], other[0], other[1]};
        if (n < p.tokens.N) store_once(reinterpret_cast<float4*>(to + 8 * j), four);
      }
    }
  }

  DEVICE int column(const Tile& tile, int i) const { return tile.column + i / 4 * 8 + at.column + i % 2; }

  DEVICE void take_targets(const Tile& tile, const Sums& z) {
    UNROLL for (int i = 0; i < kSums; ++i) z_y[i / 2 % 2] = column(tile, i) == y[i / 2 % 2] ? z[i] : z_y[i / 2 % 2];
  }

  DEVICE void cap(Sums& z) const {
    float slope;
    UNROLL for (int i = 0; i < kSums; ++i) z[i] = capped<SOFTCAP>(z[i], options, slope);
  }

  // Targets and what lies beyond the vocabulary.
  DEVICE void leave_out(const Tile& tile, Sums& z) const {
    UNROLL for (int i = 0; i < kSums; ++i) {
      const int v = column(tile, i);
      z[i] = v == y[i / 2 % 2] || v >= p.head.V ? masked : z[i];
    }
  }

  DEVICE void add(const Sums& z) {
    float largest[2] = {m[0], m[1]};
    // NaN is no maximum, but shows in the sums.
    UNROLL for (int i = 0; i < kSums; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], z[i] * options.scale);
    UNROLL for (int q = 0; q < 2; ++q) rescale(m[q], S[q], X[q], largest[q]);
    UNROLL for (int i = 0; i < kSums; ++i) {
      const int q = i / 2 % 2;
      const float x = fmaf(z[i], options.scale, -m[q]), e = exp2_fast(x);
      S[q] += e;
      X[q] = fmaf(x, e, X[q]);
    }
  }

  // Joins the four threads of a row and stores its sums.
  DEVICE void end(const Tile& tile) {
    UNROLL for (int q = 0; q < 2; ++q) {
      UNROLL for (int other = 1; other <= 2; other *= 2) {
        const float m_other = __shfl_xor_sync(kAllLanes, m[q], other), largest = fmaxf(m[q], m_other);
        rescale(m[q], S[q], X[q], largest);
        S[q] += __shfl_xor_sync(kAllLanes, S[q], other);
        X[q] += __shfl_xor_sync(kAllLanes, X[q], other);
        z_y[q] += __shfl_xor_sync(kAllLanes, z_y[q], other);
      }
      const int n = token(tile, q);
      if (at.column != 0 || n >= p.tokens.N) continue;
      const int64_t N = p.tokens.N, plane = N * p.partials.splits;
      float* to = p.partials.planes + tile.item * N + n;
      to[0] = m[q];
      to[plane] = S[q];
      to[2 * plane] = X[q];
      to[3 * plane] = z_y[q];
    }
  }
};

template <class T, bool SOFTCAP, bool KEEP>
__global__ void __launch_bounds__(kThreads, 1)
    statistics_kernel(const __grid_constant__ TensorMap hidden, const __grid_constant__ TensorMap weight,
                      const __grid_constant__ StatisticsArguments p) {
  SHARED(shared);
  StatisticsWalk walk(weight, p.tokens.N, p.head.V);
  StatisticsEpilogue<SOFTCAP, KEEP> epilogue{p};
  run<T>(shared, hidden, p.head.d, walk, epilogue);
}

}  // namespace

int splits(int V) { return int(ceil_div(V, kPart)); }
int64_t kept_columns(int V) { return ceil_div(V, kColumnsOfTile) * kColumnsOfTile; }

int statistics(const Head& head, const Tokens& tokens, const Partials& partials, const Kept& kept, Stream stream) {
  if (tokens.N == 0) return 0;
  TensorMap hidden, weight;
  if (const int error = map_hidden_and_weight(hidden, weight, head, tokens)) return error;
  const StatisticsArguments p{head, tokens, partials, kept};
  const int64_t items = StatisticsWalk::order_of(tokens.N, head.V).items();
  return choose_half(head.dtype, [&](auto number) {
    return choose(head.softcap, [&](auto softcap) {
      return choose(kept.logits != nullptr, [&](auto keep) {
        return launch_persistent(items, 0, stream, statistics_kernel<decltype(number), softcap, keep>, hidden, weight,
                                 p);
      });
    });
  });
}

}  // namespace g2rl::cuda::sm90
