// For each token, sums over the vocabulary that leave the target out (`Partials`), on Hopper. Rows of a tile are
// tokens, so that sums stay inside a thread until the end of an item: 128 tokens (of each block of the cluster) x one
// part of the vocabulary, kTilesOfPart tiles.
#include "kept.h"
#include "sm80.h"
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

// The pass over logits that an earlier launch kept, by the warps that neither copy nor multiply: it waits for memory,
// they for nothing. A warp owns (response, 128 words); tokens are added one by one, as `add_kept` does. Their logits
// are on the way kAhead tokens ahead, each thread's to a place of its own in shared memory: registers are the others'.
template <bool SOFTCAP>
struct KeptAside {
  const Head& head;
  const KeptPass& p;
  uint8_t* shared;
  static constexpr int kWarps = kWarpgroup / kWarp - 1, kWords = 4 * kWarp, kAhead = 8;
  static constexpr int kBytes = kWarps * kWarp * kAhead * int(sizeof(float4));

  DEVICE void operator()() const {
    if (!p.kept.logits) return;
    const int warp = threadIdx.x / kWarp - 1, pieces = int(ceil_div(head.V, kWords));
    for (int item = int(blockIdx.x) * kWarps + warp; item < pieces * p.responses.B; item += int(gridDim.x) * kWarps) {
      const int b = item / pieces, *cu = p.responses.cu_seqlens + b;
      const int start = cu[0] > p.first ? cu[0] : p.first, end = cu[1] < p.last ? cu[1] : p.last;
      if (start < end) add(b, start, end, item % pieces * kWords + int(threadIdx.x) % kWarp * 4);
    }
  }

  DEVICE uint8_t* place(int n) const {
    return shared + ((threadIdx.x - kWarp) * kAhead + n % kAhead) * int(sizeof(float4));
  }

  // Threads past the vocabulary copy nothing and store nothing.
  DEVICE void copy(int n, int end, int v) const {
    const float* from = p.kept.logits + (n < end ? n - p.first : 0) * p.kept.stride + v;
    if (n < end && v < head.V) sm80::copy_async(place(n), from, sizeof(float4));
    sm80::copy_commit();
  }

  DEVICE void add(int b, int start, int end, int v) const {
    const Options options(head);
    const int lane = threadIdx.x % kWarp;
    float r[4] = {}, *to = p.R + int64_t(b) * head.V + v;
    UNROLL for (int i = 0; i < 4; ++i) {
      if (v + i < head.V) r[i] = to[i];
    }
    UNROLL_1 for (int n = start; n < start + kAhead; ++n) copy(n, end, v);
    TokenTerms mine{};  // of one token of the next 32
    UNROLL_1 for (int n = start; n < end; ++n) {
      const int of = (n - start) % kWarp;
      if (of == 0 && n + lane < end) {
        const int t = n + lane - p.first;
        mine = {p.terms.shift[t], p.terms.weight[t], p.terms.target[t], int(p.targets[n + lane])};
      }
      const TokenTerms token{__shfl_sync(kAllLanes, mine.shift, of), __shfl_sync(kAllLanes, mine.weight, of),
                             __shfl_sync(kAllLanes, mine.target, of), __shfl_sync(kAllLanes, mine.y, of)};
      sm80::copy_wait<kAhead - 1>();
      if (v < head.V) add_token<SOFTCAP>(*reinterpret_cast<const float4*>(place(n)), token, v, options, r);
      copy(n + kAhead, end, v);
    }
    UNROLL for (int i = 0; i < 4; ++i) {
      if (v + i < head.V) to[i] = r[i];
    }
  }
};

template <class T, bool SOFTCAP, bool KEEP>
__global__ void __launch_bounds__(kThreads, 1)
    statistics_kernel(const __grid_constant__ TensorMap hidden, const __grid_constant__ TensorMap weight,
                      const __grid_constant__ StatisticsArguments p, const __grid_constant__ KeptPass meanwhile) {
  SHARED(shared);
  StatisticsWalk walk(weight, p.tokens.N, p.head.V);
  StatisticsEpilogue<SOFTCAP, KEEP> epilogue{p};
  run<T>(shared, hidden, p.head.d, walk, epilogue, KeptAside<SOFTCAP>{p.head, meanwhile, shared + kScratch});
}

}  // namespace

int splits(int V) { return int(ceil_div(V, kPart)); }
int64_t kept_rows(int rows) { return rows; }
int64_t kept_columns(int V) { return ceil_div(V, kColumnsOfTile) * kColumnsOfTile; }

int statistics(const Head& head, const Tokens& tokens, const Partials& partials, const Kept& kept,
               const KeptPass& meanwhile, Stream stream) {
  if (tokens.N == 0) return 0;
  TensorMap hidden, weight;
  if (const int error = map_hidden_and_weight(hidden, weight, head, tokens)) return error;
  const StatisticsArguments p{head, tokens, partials, kept};
  const int64_t items = StatisticsWalk::order_of(tokens.N, head.V).items();
  return choose_half(head.dtype, [&](auto number) {
    return choose(head.softcap, [&](auto softcap) {
      return choose(kept.logits != nullptr, [&](auto keep) {
        return launch_persistent(items, KeptAside<softcap>::kBytes, stream,
                                 statistics_kernel<decltype(number), softcap, keep>, hidden, weight, p, meanwhile);
      });
    });
  });
}

}  // namespace g2rl::cuda::sm90
