// For each token, sums over the vocabulary that leave the target out (`Partials`), on Hopper. Rows of a tile are
// tokens, so that sums stay inside a thread until the end of an item: 128 tokens (of each block of the cluster) x one
// part of the vocabulary, kTilesOfPart tiles.
#include "tiles_sm90.h"

namespace g2rl::cuda::sm90 {

namespace {

constexpr int kTilesOfPart = 8;
constexpr int kPart = kTilesOfPart * kMaxRows;

struct StatisticsArguments {
  Head head;
  Tokens tokens;
  Partials partials;
  Kept kept;
};

// Blocks that share tiles of hidden states work on neighbouring parts, as many tiles of each.
template <class C>
struct StatisticsWalk {
  Order order;
  int V, item = C::index(), n0 = 0, part = 0, tile = 0, tiles = 0;

  // Rows: blocks of tokens of a cluster; columns: its parts.
  static HOST_DEVICE Order order_of(int N, int V) {
    return {int(ceil_div(N, kRows * C::kShareB)), int(ceil_div(V, kPart * C::kShareA))};
  }
  DEVICE StatisticsWalk(int N, int V) : order(order_of(N, V)), V(V) {}

  DEVICE bool next(Tile& t) {
    if (tile == tiles) {
      if (item >= order.rows * order.columns) return false;
      int block, parts;
      order.find(item, block, parts);
      item += C::count();
      n0 = (block * C::kShareB + C::row()) * kRows;
      const int rest = int(ceil_div(V - parts * C::kShareA * kPart, kMaxRows));
      part = parts * C::kShareA + C::column();
      tile = 0, tiles = rest < kTilesOfPart ? rest : kTilesOfPart;
    }
    t = {n0, part * kPart + tile * kMaxRows, kMaxRows, part, tile == 0, tile + 1 == tiles};
    ++tile;
    return true;
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

  DEVICE int token(const Tile& tile, int q) const { return tile.a_row + at.row + 8 * q; }

  DEVICE void operator()(const Tile& tile, Sums& z) {
    if (tile.first) begin(tile);
    add_bias_of_columns(p.head, tile.b_row, at, z);
    if (KEEP) keep(tile, z);
    const bool targeted = unsigned(y[0] - tile.b_row) < kMaxRows || unsigned(y[1] - tile.b_row) < kMaxRows;
    const bool special = __any_sync(kAllLanes, targeted) || tile.b_row + kMaxRows > p.head.V;
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

  DEVICE void keep(const Tile& tile, const Sums& z) const {
    UNROLL for (int q = 0; q < 2; ++q) {
      const int n = token(tile, q);
      if (n >= p.tokens.N || tile.b_row >= p.head.V) continue;
      float* to = p.kept.logits + n * p.kept.stride + tile.b_row + at.column;
      UNROLL for (int j = 0; j < kSums / 4; ++j) {
        *reinterpret_cast<float2*>(to + 8 * j) = {z[4 * j + 2 * q], z[4 * j + 2 * q + 1]};
      }
    }
  }

  DEVICE int column(const Tile& tile, int i) const { return tile.b_row + i / 4 * 8 + at.column + i % 2; }

  DEVICE void take_targets(const Tile& tile, const Sums& z) {
    UNROLL for (int i = 0; i < kSums; ++i) z_y[i / 2 % 2] = column(tile, i) == y[i / 2 % 2] ? z[i] : z_y[i / 2 % 2];
  }

  DEVICE void cap(Sums& z) const {
    float slope;
    UNROLL for (int i = 0; i < kSums; ++i) z[i] = tanh_and_slope(z[i] * options.inner_scale, slope);
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
    UNROLL for (int q = 0; q < 2; ++q) rescale(q, largest[q]);
    UNROLL for (int i = 0; i < kSums; ++i) {
      const int q = i / 2 % 2;
      const float x = fmaf(z[i], options.scale, -m[q]), e = exp2_fast(x);
      S[q] += e;
      X[q] = fmaf(x, e, X[q]);
    }
  }

  DEVICE void rescale(int q, float largest) {
    const float moved = m[q] - largest, factor = exp2_fast(moved);
    X[q] = fmaf(S[q], moved, X[q]) * factor;
    S[q] *= factor;
    m[q] = largest;
  }

  // Joins the four threads of a row and stores its sums.
  DEVICE void end(const Tile& tile) {
    UNROLL for (int q = 0; q < 2; ++q) {
      UNROLL for (int other = 1; other <= 2; other *= 2) {
        const float m_other = __shfl_xor_sync(kAllLanes, m[q], other), largest = fmaxf(m[q], m_other);
        rescale(q, largest);
        S[q] += __shfl_xor_sync(kAllLanes, S[q], other);
        X[q] += __shfl_xor_sync(kAllLanes, X[q], other);
        z_y[q] += __shfl_xor_sync(kAllLanes, z_y[q], other);
      }
      const int n = token(tile, q);
      if (at.column != 0 || n >= p.tokens.N || tile.item >= p.partials.splits) continue;
      const int64_t N = p.tokens.N, plane = N * p.partials.splits;
      float* to = p.partials.planes + tile.item * N + n;
      to[0] = m[q];
      to[plane] = S[q];
      to[2 * plane] = X[q];
      to[3 * plane] = z_y[q];
    }
  }
};

template <class T, bool SOFTCAP, bool KEEP, class C>
__global__ void __launch_bounds__(kThreads, 1)
    statistics_kernel(const __grid_constant__ TensorMap hidden, const __grid_constant__ Boxes weight,
                      const __grid_constant__ StatisticsArguments p) {
  SHARED(shared);
  const StatisticsWalk<C> walk(p.tokens.N, p.head.V);
  StatisticsEpilogue<SOFTCAP, KEEP> epilogue{p};
  run<T, C, false>(shared, hidden, weight, p.head.d, walk, epilogue);
}

}  // namespace

int splits(int V) { return int(ceil_div(V, kPart)); }
int64_t kept_rows(int rows) { return rows; }
int64_t kept_columns(int V) { return ceil_div(V, kMaxRows) * kMaxRows; }

int statistics(const Head& head, const Tokens& tokens, const Partials& partials, const Kept& kept, Stream stream) {
  if (tokens.N == 0) return 0;
  const StatisticsArguments p{head, tokens, partials, kept};
  const auto run_on = [&](auto cluster) {
    using C = decltype(cluster);
    TensorMap hidden;
    Boxes weight;
    if (const int error = map_hidden_and_weight<C>(hidden, weight, head, tokens)) return error;
    const auto at = persistent<C>(StatisticsWalk<C>::order_of(tokens.N, head.V).items());
    return choose_half(head.dtype, [&](auto number) {
      return choose(head.softcap, [&](auto softcap) {
        return choose(kept.logits != nullptr, [&](auto keep) {
          return launch(at, stream, statistics_kernel<decltype(number), softcap, keep, C>, hidden, weight, p);
        });
      });
    });
  };
  return tokens.N > kRows ? run_on(Cluster<2, 2>{}) : run_on(Cluster<1, 1>{});
}

}  // namespace g2rl::cuda::sm90
