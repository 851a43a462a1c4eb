// Residuals of each response's tokens, summed in vocabulary space, on Hopper: of known statistics, from recomputed
// logits, or with a given lse in their place, when the statistics come out of the same product.
//
// Rows of a tile are words, columns are tokens (packing.h), so that the sum over a response's tokens stays inside a
// thread but for a last step. An item is 128 words x a range of responses. Nothing depends on other responses.
#include "packing.h"
#include "tiles_sm90.h"

namespace g2rl::cuda::sm90 {

namespace {

struct ResidualsArguments {
  Head head;
  Tokens tokens;
  Packing packing;
  const float* shift;   // [N] in units of log 2; a given lse in natural ones
  const float* weight;  // [N]
  const float* target;  // [N], or null: targets are left out
  float* R;             // [B, V]
  Partials partials;    // where an lse is given
};

constexpr int kGroups = kColumnsOfTile / kGroupColumns;
constexpr int kAtATime = 3;  // groups
static_assert(kGroups % kAtATime == 0);
constexpr int kWarpRows = kRows * kWarp / (kConsumers * kWarpgroup);

// Boxes of 64, 32, 16 and 8 tokens.
constexpr int kBoxes = 4;
struct TokenMaps {
  TensorMap of_rows[kBoxes];
};

// All threads of a warp walk alike; each loads the tokens of the box that begins at its group, if one does.
struct ResidualsWalk {
  const TokenMaps& maps;
  const Packing packing;
  Order order;  // rows: tiles of words; columns: ranges
  int item = blockIdx.x, v0 = 0, group = 0, end = 0;
  int box = kBoxes, token = 0;  // of this thread: the box's map, kBoxes for none, and its first token

  DEVICE ResidualsWalk(const TokenMaps& maps, const Packing& packing, int V)
      : maps(maps), packing(packing), order{int(ceil_div(V, kRows)), packing.ranges()[0]} {}

  DEVICE bool next(Tile& tile) {
    bool first = group >= end;
    while (group >= end) {
      if (item >= order.items()) return false;
      int words, range;
      order.find(item, words, range);
      item += gridDim.x;
      v0 = words * kRows;
      group = packing.ranges()[1 + range];
      end = packing.ranges()[2 + range];
    }
    choose_box();
    tile = {v0, group, end, first, group + kGroups >= end};
    group += kGroups;
    return true;
  }

  // A run of n groups that hold consecutive tokens is loaded in boxes of eight groups, then of 4, 2 and 1.
  DEVICE void choose_box() {
    const int lane = threadIdx.x % kWarp, g = group + lane;
    const Group mine = lane < kGroups && g < end ? packing.groups()[g] : Group{0, 0, kGroups - lane, -1};
    // The first of this tile's groups in my run: the one after the last that ends a run before me.
    const unsigned ends = __ballot_sync(kAllLanes, mine.run == 1) & ((1u << lane) - 1);
    int start = 0;
    for (unsigned rest = ends; rest; rest >>= 1) ++start;
    const int rest_of_tile = kGroups - lane, offset = lane - start;
    const int length = offset + (mine.run < rest_of_tile ? mine.run : rest_of_tile);
    token = mine.token;
    box = kBoxes;
    if (lane >= kGroups) return;
    const int eights = length / 8 * 8, after = offset - eights, odd = length % 8;
    if (after < 0) {
      if (offset % 8 == 0) box = 0;
    } else {
      for (int i = 1, at = 0; i < kBoxes; ++i) {
        const int size = 8 >> i;
        if (!(odd & size)) continue;
        if (after == at) box = i;
        at += size;
      }
    }
  }

  DEVICE void load(uint32_t barrier, uint32_t to, int k) const {
    const int lane = threadIdx.x % kWarp;
    if (box < kBoxes) tma_load(maps.of_rows[box], barrier, to + lane * kGroupColumns * kRowBytes, k, token);
  }
};

// What an epilogue needs to know of a tile's columns. Written by the warps that neither copy nor multiply, a tile
// ahead.
struct Columns {
  float4 terms[kColumnsOfTile / 2];  // of two tokens: shift, weight, shift, weight
  int targets[kColumnsOfTile];       // -1 beyond a response
  int tokens[kColumnsOfTile];        // -1 beyond a response
  int ends[kGroups];                 // the response whose last group it is, or -1
  // Bit w: warp w of the multiplying ones cannot take the group like any other. It ends a response, does not have eight
  // tokens, or has one of the warp's words for a target.
  unsigned special[kGroups];
};

// Shared by all: columns of two tiles, each with a barrier for "written" and one for "read", at which every writer and
// every reader arrives; sums of either warpgroup.
struct Scratch {
  Columns columns[2];
  float sums[kConsumers][4][kColumnsOfTile][2];
  uint64_t written[2], read[2];
};
constexpr int kWriters = kWarpgroup - kWarp;

DEVICE void initialise(Scratch& scratch) {
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 2; ++i) {
    barrier_init(shared_address(&scratch.written[i]), kWriters);
    barrier_init(shared_address(&scratch.read[i]), kConsumers * kWarpgroup);
  }
}

// Tiles in the order of the epilogue's calls, the one before the first included.
template <bool STATISTICS>
struct WriteColumns {
  const ResidualsArguments& p;
  Scratch& scratch;
  ResidualsWalk walk;

  DEVICE void operator()() const {
    ResidualsWalk tiles = walk;
    Tile tile = kNoTile;
    for (int i = 0;; ++i) {
      barrier_wait(shared_address(&scratch.read[i % 2]), (i / 2 & 1) ^ 1);
      write(tile, scratch.columns[i % 2]);
      __syncwarp();  // nvcc 13.0 spills without
      barrier_arrive(shared_address(&scratch.written[i % 2]));
      if (!tiles.next(tile)) return;
    }
  }

  DEVICE void write(const Tile& tile, Columns& to) const {
    for (int i = threadIdx.x - kWarp; i < kColumnsOfTile; i += kWriters) {
      const int g = tile.column + i / kGroupColumns, place = i % kGroupColumns;
      const Group group = g < tile.item ? p.packing.groups()[g] : Group{0, 0, 0, -1};
      const bool inside = place < group.count;
      const int n = group.token + place;
      const float shift = inside ? p.shift[n] : kBeyond;
      float* terms = &to.terms[i / 2].x + i % 2 * 2;
      terms[0] = STATISTICS && inside ? shift * kLog2e : shift;
      terms[1] = inside ? p.weight[n] : 0.f;
      const int target = inside ? int(p.tokens.targets[n]) : -1;
      to.targets[i] = target;
      to.tokens[i] = inside ? n : -1;
      const unsigned word = unsigned(target - tile.row), mine = word < kRows ? 1u << word / kWarpRows : 0u;
      const unsigned special = or_of_eight(!inside || group.response >= 0 ? ~0u : mine);
      if (place == 0) {
        to.ends[i / kGroupColumns] = group.response;
        to.special[i / kGroupColumns] = special;
      }
    }
  }

  // Of the eight lanes of a group.
  static DEVICE unsigned or_of_eight(unsigned bits) {
    UNROLL for (int other = 1; other < kGroupColumns; other *= 2) bits |= __shfl_xor_sync(kAllLanes, bits, other);
    return bits;
  }
};

template <bool SOFTCAP, bool STATISTICS>
struct ResidualsEpilogue {
  const ResidualsArguments& p;
  Scratch& scratch;
  const Options options{p.head};
  const Place at = Place::here();
  const float masked = masked_logit(options);
  float r[2];
  int calls = 0;

  DEVICE int word(const Tile& tile, int q) const { return tile.row + at.row + 8 * q; }
  static DEVICE int consumer() { return threadIdx.x / kWarpgroup - 1; }

  DEVICE void operator()(const Tile& tile, Sums& z, Held& held) {
    if (tile.first) r[0] = r[1] = 0.f;
    const Columns& columns = scratch.columns[calls % 2];
    barrier_wait(shared_address(&scratch.written[calls % 2]), calls / 2 & 1);
    if (p.head.bias) add_bias(tile, z);
    add(tile, columns, z, held);
    if (STATISTICS) store_statistics(tile, columns, z);
    if (STATISTICS) named_barrier(3 + consumer(), kWarpgroup);
    barrier_arrive(shared_address(&scratch.read[calls % 2]));
    ++calls;
  }

  DEVICE void add_bias(const Tile& tile, Sums& z) const {
    const float bias[2] = {bias_at(p.head, word(tile, 0)), bias_at(p.head, word(tile, 1))};
    UNROLL for (int i = 0; i < kSums; ++i) z[i] += bias[i / 2 % 2];
  }

  // Bit j: group j is special to this warp.
  DEVICE unsigned special_groups(const Tile& tile, const Columns& columns) const {
    const int lane = threadIdx.x % kWarp;
    const bool special = lane < kGroups && columns.special[lane] >> at.row / kWarpRows & 1;
    return __ballot_sync(kAllLanes, special || (STATISTICS && tile.row + kRows > p.head.V));
  }

  // Sums of a response go to R with its last group. With STATISTICS, z becomes what `store_statistics` sums.
  //
  // A few groups at a time, whose exponentials the compiler can then interleave: a branch for each group costs twice
  // the time of all else.
  DEVICE void add(const Tile& tile, const Columns& columns, Sums& z, Held& held) {
    const unsigned special = special_groups(tile, columns);
    UNROLL for (int first = 0; first < kGroups; first += kAtATime) {
      float of_groups[kAtATime][2] = {};
      if (special >> first & ((1u << kAtATime) - 1)) {
        UNROLL for (int j = 0; j < kAtATime; ++j) {
          leave_out(tile, columns, 8 * (first + j) + at.column, group_of(z, first + j), of_groups[j]);
        }
      }
      UNROLL for (int j = 0; j < kAtATime; ++j) {
        add_group(columns.terms[4 * (first + j) + at.column / 2], group_of(z, first + j), of_groups[j]);
      }
      UNROLL for (int j = 0; j < kAtATime; ++j) {
        UNROLL for (int q = 0; q < 2; ++q) r[q] += of_groups[j][q];
        if (special >> (first + j) & 1) finish(tile, columns, first + j);
      }
      if (first + kAtATime == kGroups / 2) held.at_most<2>();
    }
  }

  static DEVICE float (&group_of(Sums& z, int j))[4] { return reinterpret_cast<float (&)[4]>(z[4 * j]); }

  // `two`: the terms of the two columns; `sums`: of the two rows.
  DEVICE void add_group(const float4& two, float (&z)[4], float (&sums)[2]) const {
    float e[4], x[4];
    UNROLL for (int i = 0; i < 4; ++i) {
      float slope;
      x[i] = exponent_above<SOFTCAP>(i % 2 ? two.z : two.x, z[i], options, slope);
      if (SOFTCAP && STATISTICS && z[i] == masked) x[i] = kMasked;  // the cap would let it count
      e[i] = exp2_fast(x[i]);
      const float others = (i % 2 ? two.w : two.y) * e[i];
      sums[i / 2] -= SOFTCAP ? others * slope : others;
    }
    if (STATISTICS) {
      UNROLL for (int i = 0; i < 2; ++i) {
        z[i] = e[i] + e[2 + i];
        z[2 + i] = fmaf(x[i], e[i], x[2 + i] * e[2 + i]);
      }
    }
  }

  // Targets count as 0 among the others and have a residual of their own. So does what lies beyond a response, where z
  // may be NaN, which a weight of 0 would not stop; and with statistics, words beyond the vocabulary.
  DEVICE void leave_out(const Tile& tile, const Columns& columns, int column, float (&z)[4], float (&sums)[2]) const {
    UNROLL for (int i = 0; i < 4; ++i) {
      const int n = columns.tokens[column + i % 2], v = word(tile, i / 2);
      const bool target = columns.targets[column + i % 2] == v;
      if (target && STATISTICS) p.partials.planes[n] = z[i];
      if (target && !STATISTICS) sums[i / 2] += p.target[n];
      z[i] = target || (STATISTICS && v >= p.head.V) ? masked : n < 0 ? 0.f : z[i];
    }
  }

  DEVICE void finish(const Tile& tile, const Columns& columns, int j) {
    const int64_t response = columns.ends[j];
    if (response < 0) return;
    UNROLL for (int q = 0; q < 2; ++q) {
      r[q] += __shfl_xor_sync(kAllLanes, r[q], 1);
      r[q] += __shfl_xor_sync(kAllLanes, r[q], 2);
      const int v = word(tile, q);
      if (at.column == 0 && v < p.head.V) p.R[response * p.head.V + v] = r[q];
      r[q] = 0.f;
    }
  }

  // Of 2 HALF numbers keeps HALF, and adds to them those of the thread that keeps the others. Whether it kept the
  // upper.
  template <int HALF, int OTHER>
  static DEVICE bool exchange(Sums& z) {
    const bool upper = threadIdx.x & OTHER;
    UNROLL for (int i = 0; i < HALF; ++i) {
      const float mine = upper ? z[HALF + i] : z[i], theirs = upper ? z[i] : z[HALF + i];
      z[i] = mine + __shfl_xor_sync(kAllLanes, theirs, OTHER);
    }
    return upper;
  }

  // Sums over the warpgroup's 64 words: each exchange halves the columns of a thread, and doubles the rows they are of.
  DEVICE void store_statistics(const Tile& tile, const Columns& columns, Sums& z) {
    const int thread = threadIdx.x % kWarpgroup;
    int first = 0;  // of the eights of columns that this thread has left
    if (exchange<48, 16>(z)) first += 12;
    if (exchange<24, 8>(z)) first += 6;
    if (exchange<12, 4>(z)) first += 3;
    auto& sums = scratch.sums[consumer()];
    UNROLL for (int i = 0; i < 12; ++i) {
      sums[thread / kWarp][8 * (first + i / 4) + at.column + i % 2][i / 2 % 2] = z[i];
    }
    named_barrier(3 + consumer(), kWarpgroup);
    const int64_t N = p.tokens.N, plane = N * p.partials.splits;
    const int part = tile.row / (kRows / kConsumers) + consumer();
    for (int i = thread; i < kColumnsOfTile; i += kWarpgroup) {
      const int n = columns.tokens[i];
      if (n < 0 || part >= p.partials.splits) continue;
      UNROLL for (int what = 0; what < 2; ++what) {
        const float sum = (sums[0][i][what] + sums[1][i][what]) + (sums[2][i][what] + sums[3][i][what]);
        p.partials.planes[(1 + what) * plane + part * N + n] = sum;
      }
    }
  }
};

template <class T, bool SOFTCAP, bool STATISTICS>
__global__ void __launch_bounds__(kThreads, 1)
    residuals_kernel(const __grid_constant__ TensorMap weight, const __grid_constant__ TokenMaps hidden,
                     const __grid_constant__ ResidualsArguments p) {
  SHARED(shared);
  Scratch& scratch = *reinterpret_cast<Scratch*>(shared + kScratch);
  initialise(scratch);
  ResidualsWalk walk(hidden, p.packing, p.head.V);
  ResidualsEpilogue<SOFTCAP, STATISTICS> epilogue{p, scratch};
  run<T>(shared, RowsAsA{weight}, p.head.d, walk, epilogue, WriteColumns<STATISTICS>{p, scratch, walk});
}

// Ranges such that the tiles of the weight that are in use at one time take a quarter of an H100's L2 cache: with half
// of it a third of all reads missed.
int ranges_for(int d) {
  constexpr int64_t kInUse = 132 * int64_t(kRows) * 2, kCache = 12 << 20;
  return int(ceil_div(kInUse * d, kCache));
}

int launch_residuals(const ResidualsArguments& p, const Responses& responses, const int* flags, Stream stream) {
  if (responses.B == 0) return 0;
  TensorMap weight;
  TokenMaps hidden;
  int error = map_matrix(weight, p.head.weight, p.head.V, p.head.stride, p.head, kRows);
  for (int i = 0; i < kBoxes && !error; ++i) {
    error = map_matrix(hidden.of_rows[i], p.tokens.hidden, p.tokens.N, p.tokens.stride, p.head, 64 >> i);
  }
  if (!error) error = pack(responses, flags, ranges_for(p.head.d), p.packing, stream);
  if (error) return error;
  const int64_t items = ceil_div(p.head.V, kRows) * kMaxRanges;
  return choose_half(p.head.dtype, [&](auto number) {
    return choose(p.head.softcap, [&](auto softcap) {
      return choose(p.partials.planes != nullptr, [&](auto statistics) {
        return launch_persistent(items, sizeof(Scratch), stream,
                                 residuals_kernel<decltype(number), softcap, statistics>, weight, hidden, p);
      });
    });
  });
}

}  // namespace

int residual_splits(int V) { return int(ceil_div(V, kRows / kConsumers)); }

int residuals(const Head& head, const Tokens& tokens, const Responses& responses, const Terms& terms, const int* flags,
              int* packing, float* R, Stream stream) {
  return launch_residuals({head, tokens, {packing}, terms.shift, terms.weight, terms.target, R, {}}, responses, flags,
                          stream);
}

int residuals_and_statistics(const Head& head, const Tokens& tokens, const Responses& responses, const float* lse,
                             const float* a, int* packing, float* R, const Partials& partials, Stream stream) {
  return launch_residuals({head, tokens, {packing}, lse, a, nullptr, R, partials}, responses, nullptr, stream);
}

}  // namespace g2rl::cuda::sm90
