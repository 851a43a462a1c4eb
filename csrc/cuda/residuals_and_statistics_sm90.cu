// Where an lse is given: statistics of each token and residuals summed over each response's tokens, out of one product,
// on Hopper.
//
// Rows of a tile are tokens (packing.h), so that the sum over words stays inside a thread. A warp has the 16 tokens of
// a group, whose residuals it adds up from lane to lane: 42 exchanges, where sums over the 64 words of a warpgroup
// would take 84. The warps that neither copy nor multiply add up the groups of a response, in their order, and segments
// of them. An item is 192 words x a range of responses. Nothing depends on other responses.
#include "packed_sm90.h"

namespace g2rl::cuda::sm90 {

namespace {

struct GivenArguments {
  Head head;
  Tokens tokens;
  Packing packing;
  const float *lse, *a;  // [N]; lse in natural units
  float* R;              // [B, V]
  Partials partials;     // a part for each tile's words, z_y in the place of m
};

constexpr int kGroupRows = 16;
using Walk = PackedWalk<false, kGroupRows>;
constexpr int kGroups = Walk::kGroups;
constexpr int kGroupsOfSegment = kSegment / kGroupRows;
static_assert(kGroups == kConsumers * kWarpgroup / kWarp, "a group for each warp");

// What an epilogue needs to know of a tile's rows, and what becomes of them.
struct Rows {
  float2 terms[kRows];                    // shift, weight
  alignas(8) float bias[kColumnsOfTile];  // where the head has one
  int targets[kRows];                     // -1 beyond a response
  int tokens[kRows];                      // -1 beyond a response
  int v0;
  int ends[kGroups];                                // the response whose last group it is, or -1
  bool closes[kGroups];                             // whether a segment ends with it, counted from the response's last
  alignas(16) float sums[kGroups][kColumnsOfTile];  // over the tokens of a group, of a 2^(t - shift) slope
};

struct Scratch {
  Rows of_tiles[2];
  float r[kColumnsOfTile];  // of a response's segments so far
  Handover handover;
};

// Writes a tile's rows, and adds up its sums once they are there, two tiles later.
struct WriteRowsAndAddGroups {
  const GivenArguments& p;
  Scratch& scratch;
  Walk walk;

  DEVICE void operator()() const {
    Walk tiles = walk;
    Tile tile = kNoTile;
    float segment[2] = {};
    float* r = scratch.r + first_column();
    r[0] = r[1] = 0.f;
    int last = -1;  // call of the epilogue, once it is known
    for (int i = 0; last < 0 || i <= last + 2; ++i) {
      Rows& of_tile = scratch.of_tiles[i % 2];
      scratch.handover.wait_to_write(i);
      if (i >= 2) add_groups(of_tile, segment, r);
      named_barrier(3, kWriters);  // all have added
      if (last >= 0) continue;
      write(tile, of_tile);
      scratch.handover.was_written(i);
      if (!tiles.next(tile)) last = i;
    }
  }

  DEVICE void write(const Tile& tile, Rows& to) const {
    UNROLL_1 for (int i = threadIdx.x - kWarp; i < kRows; i += kWriters) {
      const auto [group, n, inside] = Walk::token_at(p.packing, tile.row, tile.item, i);
      to.terms[i] = inside ? float2{p.lse[n] * kLog2e, p.a[n]} : float2{kBeyond, 0.f};
      to.targets[i] = inside ? int(p.tokens.targets[n]) : -1;
      to.tokens[i] = inside ? n : -1;
      if (i % kGroupRows == 0) {
        to.ends[i / kGroupRows] = group.response;
        to.closes[i / kGroupRows] = group.run % kGroupsOfSegment == 1;
      }
    }
    if (threadIdx.x == kWarp) to.v0 = tile.column;
    if (p.head.bias == nullptr) return;
    UNROLL for (int e = 0; e < 2; ++e) to.bias[first_column() + e] = bias_at(p.head, tile.column + first_column() + e);
  }

  // Each thread has two words.
  static DEVICE int first_column() { return 2 * (threadIdx.x - kWarp); }

  // To their sums over the segment, and with its last group to the response's.
  DEVICE void add_groups(const Rows& from, float (&segment)[2], float* r) const {
    const int column = first_column();
    UNROLL for (int g = 0; g < kGroups; ++g) {
      const float2 two = *reinterpret_cast<const float2*>(&from.sums[g][column]);
      segment[0] -= two.x;
      segment[1] -= two.y;
      if (!from.closes[g]) continue;
      UNROLL for (int e = 0; e < 2; ++e) {
        r[e] += segment[e];
        segment[e] = 0.f;
      }
      const int64_t response = from.ends[g];
      if (response < 0) continue;
      UNROLL for (int e = 0; e < 2; ++e) {
        const int v = from.v0 + column + e;
        if (v < p.head.V) p.R[response * p.head.V + v] = r[e];
        r[e] = 0.f;
      }
    }
  }
};
static_assert(2 * kWriters == kColumnsOfTile);

template <bool SOFTCAP>
struct GivenEpilogue {
  const GivenArguments& p;
  Scratch& scratch;
  const Options options{p.head};
  const Place at = Place::here();
  const float masked = masked_logit(options);
  int calls = 0;

  DEVICE void operator()(const Tile& tile, Sums& z, Held& held) {
    Rows& of_tile = scratch.of_tiles[calls % 2];
    scratch.handover.wait_to_read(calls);
    if (p.head.bias) add_bias(of_tile, z);
    const bool targets = leave_out(tile, of_tile, z);
    const float2 terms[2] = {of_tile.terms[at.row], of_tile.terms[at.row + 8]};
    float statistics[4] = {};  // S of the two rows, X of them
    add(terms, z, statistics, held);
    if (targets) add_targets(tile, of_tile, z);
    store_statistics(tile, of_tile, statistics);
    store_sums(of_tile.sums[at.row / kGroupRows], z);
    scratch.handover.was_read(calls);
    ++calls;
  }

  DEVICE void add_bias(const Rows& of_tile, Sums& z) const {
    UNROLL for (int j = 0; j < kSums / 4; ++j) {
      const float2 bias = *reinterpret_cast<const float2*>(&of_tile.bias[8 * j + at.column]);
      UNROLL for (int q = 0; q < 2; ++q) {
        z[4 * j + 2 * q] += bias.x;
        z[4 * j + 2 * q + 1] += bias.y;
      }
    }
  }

  // Targets, words beyond the vocabulary, and what lies beyond a response, where z may be NaN, which a weight of 0
  // would not stop. Returns whether the warp had a target.
  DEVICE bool leave_out(const Tile& tile, const Rows& of_tile, Sums& z) const {
    const int first = tile.column + at.column, room = p.head.V - first;
    int y[2], n[2];  // targets, from the first word of this thread
    bool target = false, beyond = false;
    UNROLL for (int q = 0; q < 2; ++q) {
      y[q] = of_tile.targets[at.row + 8 * q] - first;
      n[q] = of_tile.tokens[at.row + 8 * q];
      target |= unsigned(y[q] + at.column) < kColumnsOfTile;
      beyond |= n[q] < 0;
    }
    target = __any_sync(kAllLanes, target);
    if (target) leave_out_targets(y, n, z);
    // Most responses end in a group that is not full, and it meets all words.
    if (__any_sync(kAllLanes, beyond)) {
      UNROLL for (int i = 0; i < kSums; ++i) z[i] = n[i / 2 % 2] < 0 ? 0.f : z[i];
    }
    if (tile.column + kColumnsOfTile > p.head.V) {
      UNROLL for (int i = 0; i < kSums; ++i) z[i] = i / 4 * 8 + i % 2 >= room ? masked : z[i];
    }
    return target;
  }

  DEVICE void leave_out_targets(const int (&y)[2], const int (&n)[2], Sums& z) const {
    float z_y[2] = {};
    UNROLL for (int i = 0; i < kSums; ++i) {
      const int q = i / 2 % 2;
      const bool target = i / 4 * 8 + i % 2 == y[q];
      z_y[q] = target ? z[i] : z_y[q];
      z[i] = target ? masked : z[i];
    }
    UNROLL for (int q = 0; q < 2; ++q) {
      if (has(y[q])) p.partials.planes[n[q]] = z_y[q];
    }
  }

  // A thread has the first two of every eight words from its first on.
  static DEVICE bool has(int y) { return unsigned(y) < kColumnsOfTile && y % 8 < 2; }

  // To sums over two rows each, from which residuals are subtracted. It hardly ever happens: in no registers till then.
  DEVICE void add_targets(const Tile& tile, const Rows& of_tile, Sums& z) const {
    UNROLL for (int q = 0; q < 2; ++q) {
      const int row = at.row + 8 * q, y = of_tile.targets[row] - tile.column - at.column;
      float residual = 0.f;
      if (has(y)) {
        const float2 terms = of_tile.terms[row];
        float slope, x = exponent_above<SOFTCAP>(terms.x, p.partials.planes[of_tile.tokens[row]], options, slope);
        residual = residual_of_target(terms.y, slope, exp2_fast(x));
      }
      UNROLL for (int i = 0; i < kSums / 2; ++i) z[i] -= i / 2 * 8 + i % 2 == y ? residual : 0.f;
    }
  }

  // Of two rows each time, the sum of their residuals takes the place of two logits.
  DEVICE void add(const float2 (&terms)[2], Sums& z, float (&statistics)[4], Held& held) const {
    UNROLL for (int i = 0; i < kSums / 2; ++i) {
      float residuals = 0.f;
      UNROLL for (int q = 0; q < 2; ++q) {
        const float of_word = z[i / 2 * 4 + 2 * q + i % 2];
        float slope, x = exponent_above<SOFTCAP>(terms[q].x, of_word, options, slope);
        if (SOFTCAP && of_word == masked) x = kMasked;  // the cap would let it count
        const float e = exp2_fast(x);
        statistics[q] += e;
        statistics[2 + q] = fmaf(x, e, statistics[2 + q]);
        residuals = fmaf(terms[q].y, SOFTCAP ? e * slope : e, residuals);
      }
      z[i] = residuals;
      if (i + 1 == kSums / 4) held.at_most<2>();
      if (i + 1 == kSums * 3 / 8) held.at_most<1>();
    }
  }

  // Over the four threads of a row, each of which stores one of four sums.
  DEVICE void store_statistics(const Tile& tile, const Rows& of_tile, float (&statistics)[4]) const {
    const int what = exchange<2, 2>(statistics), q = exchange<1, 1>(statistics), n = of_tile.tokens[at.row + 8 * q];
    if (n < 0) return;
    const int64_t N = p.tokens.N, plane = N * p.partials.splits;
    p.partials.planes[(1 + what) * plane + tile.column / kColumnsOfTile * N + n] = statistics[0];
  }

  // Over the eight lanes that have the same columns: each exchange halves the columns of a thread.
  static DEVICE void store_sums(float (&sums)[kColumnsOfTile], Sums& z) {
    const Place at = Place::here();
    int first = 0;  // of the eights of columns that this thread has left
    if (exchange<24, 16>(z)) first += 12;
    if (exchange<12, 8>(z)) first += 6;
    if (exchange<6, 4>(z)) first += 3;
    UNROLL for (int i = 0; i < 3; ++i) {
      *reinterpret_cast<float2*>(&sums[8 * (first + i) + at.column]) = {z[2 * i], z[2 * i + 1]};
    }
  }
};

template <class T, bool SOFTCAP>
__global__ void __launch_bounds__(kThreads, 1)
    residuals_and_statistics_kernel(const __grid_constant__ TokenMaps hidden, const __grid_constant__ TensorMap weight,
                                    const __grid_constant__ GivenArguments p) {
  SHARED(shared);
  Scratch& scratch = *reinterpret_cast<Scratch*>(shared + kScratch);
  scratch.handover.initialise();
  Walk walk(hidden, p.packing, p.head.V);
  GivenEpilogue<SOFTCAP> epilogue{p, scratch};
  run<T>(shared, PackedTokens<Walk>{walk}, RowsAsB{weight}, p.head.d, walk, epilogue,
         WriteRowsAndAddGroups{p, scratch, walk});
}

}  // namespace

int residual_splits(int V) { return int(ceil_div(V, kColumnsOfTile)); }

int residuals_and_statistics(const Head& head, const Tokens& tokens, const Responses& responses, const float* lse,
                             const float* a, int* packing, float* R, const Partials& partials, Stream stream) {
  if (responses.B == 0) return 0;
  const GivenArguments p{head, tokens, {packing}, lse, a, R, partials};
  TokenMaps hidden;
  TensorMap weight;
  int error = map_tokens(hidden, tokens, head, kGroupRows);
  if (!error) error = map_matrix(weight, head.weight, head.V, head.stride, head, kColumnsOfTile);
  if (!error) error = pack(responses, nullptr, Walk::grouping_for(head.d), p.packing, stream);
  if (error) return error;
  return choose_half(head.dtype, [&](auto number) {
    return choose(head.softcap, [&](auto softcap) {
      return launch_persistent(Walk::most_items(head.V), sizeof(Scratch), stream,
                               residuals_and_statistics_kernel<decltype(number), softcap>, hidden, weight, p);
    });
  });
}

}  // namespace g2rl::cuda::sm90
