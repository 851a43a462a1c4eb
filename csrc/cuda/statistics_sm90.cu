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
  int V, item = blockIdx.x, n0 = 0, v0 = 0, end = 0;
  Order order;

  // Rows: blocks of tokens; columns: parts.
  static HOST_DEVICE Order order_of(int N, int V) { return {int(ceil_div(N, kRows)), int(ceil_div(V, kPart))}; }

  DEVICE StatisticsWalk(int N, int V) : V(V), order(order_of(N, V)) {}

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
};

template <bool SOFTCAP, bool KEEP>
struct StatisticsEpilogue {
  // The slopes of a soft cap could not be told from roots.
  static constexpr bool kKeepLogits = KEEP && SOFTCAP, kKeepRoots = KEEP && !SOFTCAP;

  const StatisticsArguments& p;
  const Options options{p.head};
  const Place at = Place::here();
  const float masked = masked_logit(options), scale = fabsf(options.scale);
  int y[2];
  float m[2], S[2], X[2], z_y[2];

  DEVICE int token(const Tile& tile, int q) const { return tile.row + at.row + 8 * q; }

  DEVICE void operator()(const Tile& tile, Sums& z, Held& held) {
    if (tile.first) begin(tile);
    add_bias_of_columns(p.head, tile.column, at, z);
    if (kKeepLogits) keep_logits(tile, z);
    const bool targeted =
        unsigned(y[0] - tile.column) < kColumnsOfTile || unsigned(y[1] - tile.column) < kColumnsOfTile;
    const bool special = __any_sync(kAllLanes, targeted) || tile.column + kColumnsOfTile > p.head.V;
    if (special) take_targets(tile, z);
    if (SOFTCAP) cap(z);
    if (special) leave_out(tile, z);
    if (options.scale < 0.f) negate(z);
    if (kKeepRoots) {
      add_and_keep(tile, z, held);
    } else {
      add(tile, z, held);
    }
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

  DEVICE uint8_t* row_of(int n) const { return static_cast<uint8_t*>(p.kept.rows) + n * p.kept.stride; }

  // Neighbours exchange pairs, so that a thread stores four numbers and the four threads of a row 64 bytes.
  DEVICE void keep_logits(const Tile& tile, const Sums& z) const {
    const bool odd = at.column & 2;
    UNROLL for (int q = 0; q < 2; ++q) {
      const int n = token(tile, q);
      float* to = reinterpret_cast<float*>(row_of(n)) + tile.column + (odd ? 8 : 0) + (at.column & 4);
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

  DEVICE void negate(Sums& z) const { UNROLL for (int i = 0; i < kSums; ++i) z[i] = -z[i]; }

  // The largest exponent of a row but for rounding, by way of four that do not wait for each other. NaN is no maximum,
  // but shows in the sums.
  DEVICE float largest(int q, const Sums& z) const {
    float of[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    UNROLL for (int i = 0; i < kSums / 2; ++i) of[i % 4] = fmaxf(of[i % 4], z[i / 2 * 4 + 2 * q + i % 2]);
    return fmaxf(fmaxf(of[0], of[1]), fmaxf(of[2], of[3])) * scale;
  }

  // Counts exponents from the largest of the first tile, and looks for a larger one only once a thread's sum over a
  // tile says that there is one to mind: by then the sum is 2^10 at least, where it would be 48 at most. Each row
  // decides for itself, or its bits would depend on others.
  DEVICE void add(const Tile& tile, const Sums& z, Held& held) {
    constexpr float kLate = 1024.f;
    float S_tile[2] = {}, X_tile[2] = {};
    if (tile.first) raise({true, true}, z);
    UNROLL for (int i = 0; i < kSums; ++i) {
      add(z[i], i / 2 % 2, S_tile, X_tile);
      if (i + 1 == kSums / 2) held.at_most<2>();
      if (i + 1 == kSums * 3 / 4) held.at_most<1>();
    }
    const Rows late = {!(S_tile[0] <= kLate), !(S_tile[1] <= kLate)};
    if (__any_sync(kAllLanes, late.first || late.second)) {
      raise(late, z);
      UNROLL for (int q = 0; q < 2; ++q) S_tile[q] = X_tile[q] = 0.f;
      UNROLL for (int i = 0; i < kSums; ++i) add(z[i], i / 2 % 2, S_tile, X_tile);
    }
    UNROLL for (int q = 0; q < 2; ++q) {
      S[q] += S_tile[q];
      X[q] += X_tile[q];
    }
  }

  DEVICE void add(float z, int q, float (&S_tile)[2], float (&X_tile)[2]) const {
    const float x = fmaf(z, scale, -m[q]), e = exp2_fast(x);
    S_tile[q] += e;
    X_tile[q] = fmaf(x, e, X_tile[q]);
  }

  struct Rows {
    bool first, second;
  };
  DEVICE void raise(const Rows& which, const Sums& z) {
    UNROLL for (int q = 0; q < 2; ++q) {
      const float found = fmaxf(m[q], rounded_up(largest(q, z)));
      rescale(m[q], S[q], X[q], (q ? which.second : which.first) ? found : m[q]);
    }
  }

  // A root must not pass 1 by half a unit, 2^-17, or it would not fit 16 bits. With exponents below 2^9 none does that
  // counts from the rounded largest. From the number above it, the largest root of every tile would lie a little below
  // 1, and be rounded up to it, in each token of a response alike: an error that does not average out.
  DEVICE float reference_of(int q, const Sums& z) const {
    const float t = largest(q, z);
    return fmaxf(fabsf(t) < 512.f ? t : rounded_up(t), kNoMaximum);
  }

  // The same sums out of roots, and the roots to memory: `Kept`.
  DEVICE void add_and_keep(const Tile& tile, const Sums& z, Held& held) {
    float references[2] = {reference_of(0, z), reference_of(1, z)};
    UNROLL for (int other = 1; other <= 2; other *= 2) {
      UNROLL for (int q = 0; q < 2; ++q) {
        references[q] = fmaxf(references[q], __shfl_xor_sync(kAllLanes, references[q], other));
      }
    }
    UNROLL for (int q = 0; q < 2; ++q) {
      const float reference = references[q];
      const int n = token(tile, q);
      const bool inside = n < p.tokens.N;
      uint8_t* row = row_of(n);
      uint4* to = reinterpret_cast<uint4*>(row + 2 * tile.column) + at.column / 2;
      const float half_scale = 0.5f * scale, half_reference = 0.5f * reference;
      float S_tile = 0.f, X_tile = 0.f;
      UNROLL for (int j = 0; j < kSums / 4; j += 4) {
        uint32_t pairs[4];
        UNROLL for (int i = 0; i < 4; ++i) {
          const float* two = &z[4 * (j + i) + 2 * q];
          float root[2];
          UNROLL for (int e = 0; e < 2; ++e) {
            const float x = fmaf(two[e], half_scale, -half_reference);
            root[e] = exp2_fast(x);
            const float square = root[e] * root[e];
            S_tile += square;
            X_tile = fmaf(x, square, X_tile);
          }
          pairs[i] = pack_roots(root[0], root[1]);
        }
        if (inside) store_once(to + j, uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
      }
      if (inside && at.column == 0) {
        float* references_of_row = reinterpret_cast<float*>(row + bytes_of_roots(p.head.V, kColumnsOfTile));
        references_of_row[tile.column / kColumnsOfTile] = reference;
      }
      rescale(m[q], S[q], X[q], fmaxf(m[q], reference));
      const float moved = reference - m[q], factor = exp2_fast(moved);
      S[q] = fmaf(S_tile, factor, S[q]);
      X[q] = fmaf(fmaf(S_tile, moved, 2.f * X_tile), factor, X[q]);
      if (q == 0) held.at_most<2>();
    }
  }

  // Added to 2^23, a number up to 65535 leaves itself in the low 16 bits.
  static DEVICE uint32_t pack_roots(float low, float high) {
    return low_halves(to_bits(fmaf(low, 65535.f, 0x1p23f)), to_bits(fmaf(high, 65535.f, 0x1p23f)));
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
  StatisticsWalk walk(p.tokens.N, p.head.V);
  StatisticsEpilogue<SOFTCAP, KEEP> epilogue{p};
  run<T>(shared, RowsAsA{hidden}, RowsAsB{weight}, p.head.d, walk, epilogue);
}

}  // namespace

int splits(int V) { return int(ceil_div(V, kPart)); }
int64_t kept_bytes(const Head& head) {
  const int64_t roots = bytes_of_roots(head.V, kColumnsOfTile), references = 4 * ceil_div(head.V, kColumnsOfTile);
  return head.softcap ? 2 * roots : ceil_div(roots + references, 16) * 16;
}
int kept_roots(const Head& head) { return head.softcap ? 0 : kColumnsOfTile; }

int statistics(const Head& head, const Tokens& tokens, const Partials& partials, const Kept& kept, Stream stream) {
  if (tokens.N == 0) return 0;
  TensorMap hidden, weight;
  if (const int error = map_hidden_and_weight(hidden, weight, head, tokens)) return error;
  const StatisticsArguments p{head, tokens, partials, kept};
  const int64_t items = StatisticsWalk::order_of(tokens.N, head.V).items();
  return choose_half(head.dtype, [&](auto number) {
    return choose(head.softcap, [&](auto softcap) {
      return choose(kept.rows != nullptr, [&](auto keep) {
        return launch_persistent(items, 0, stream, statistics_kernel<decltype(number), softcap, keep>, hidden, weight,
                                 p);
      });
    });
  });
}

}  // namespace g2rl::cuda::sm90
