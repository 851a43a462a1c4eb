// Residuals of each response's tokens, summed in vocabulary space, on Hopper: of known statistics, from recomputed
// logits.
//
// Rows of a tile are words, columns are tokens (packing.h), so that the sum over a response's tokens stays inside a
// thread but for a last step. An item is 128 words x a range of responses. Nothing depends on other responses.
#include "packed_sm90.h"

namespace g2rl::cuda::sm90 {

namespace {

struct ResidualsArguments {
  Head head;
  Tokens tokens;
  Packing packing;
  Terms terms;
  float* R;  // [B, V]
};

constexpr int kGroupColumns = 8;
using Walk = PackedWalk<true, kGroupColumns>;
constexpr int kGroups = Walk::kGroups;
constexpr int kAtATime = 3;  // groups
static_assert(kGroups % kAtATime == 0);
constexpr int kGroupsOfSegment = kSegment / kGroupColumns;
constexpr int kGoesOn = -2;
constexpr int kWarpRows = kRows * kWarp / (kConsumers * kWarpgroup);

// What an epilogue needs to know of a tile's columns.
struct Columns {
  float4 terms[kColumnsOfTile / 2];  // of two tokens: shift, weight, shift, weight
  int targets[kColumnsOfTile];       // -1 beyond a response
  int tokens[kColumnsOfTile];        // -1 beyond a response
  // Where a segment ends with the group, counted from the response's last: the response if it is the last, or -1.
  // Elsewhere kGoesOn.
  int ends[kGroups];
  // Bit w: warp w of the multiplying ones cannot take the group like any other. It closes a segment, does not have
  // eight tokens, or has one of the warp's words for a target.
  unsigned special[kGroups];
};

struct Scratch {
  Columns columns[2];
  float r[kRows];  // of a response's segments so far
  Handover handover;
};

struct WriteColumns {
  const ResidualsArguments& p;
  Scratch& scratch;
  Walk walk;

  DEVICE void operator()() const {
    scratch.handover.write_all(walk, scratch.columns, [&](const Tile& tile, Columns& to) { write(tile, to); });
  }

  DEVICE void write(const Tile& tile, Columns& to) const {
    for (int i = threadIdx.x - kWarp; i < kColumnsOfTile; i += kWriters) {
      const auto [group, n, inside] = Walk::token_at(p.packing, tile.column, tile.item, i);
      float* terms = &to.terms[i / 2].x + i % 2 * 2;
      terms[0] = inside ? p.terms.shift[n] : kBeyond;
      terms[1] = inside ? p.terms.weight[n] : 0.f;
      const int target = inside ? int(p.tokens.targets[n]) : -1;
      to.targets[i] = target;
      to.tokens[i] = inside ? n : -1;
      const unsigned word = unsigned(target - tile.row), mine = word < kRows ? 1u << word / kWarpRows : 0u;
      const bool closes = group.run % kGroupsOfSegment == 1;
      const unsigned special = or_of_eight(!inside || closes ? ~0u : mine);
      if (i % kGroupColumns == 0) {
        to.ends[i / kGroupColumns] = closes ? group.response : kGoesOn;
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

template <bool SOFTCAP>
struct ResidualsEpilogue {
  const ResidualsArguments& p;
  Scratch& scratch;
  const Options options{p.head};
  const Place at = Place::here();
  const float masked = masked_logit(options);
  float segment[2];
  int calls = 0;

  DEVICE int word(const Tile& tile, int q) const { return tile.row + at.row + 8 * q; }

  DEVICE void operator()(const Tile& tile, Sums& z, Held& held) {
    if (tile.first) start_item();
    scratch.handover.wait_to_read(calls);
    if (p.head.bias) add_bias(tile, z);
    add(tile, scratch.columns[calls % 2], z, held);
    scratch.handover.was_read(calls);
    ++calls;
  }

  DEVICE void start_item() {
    UNROLL for (int q = 0; q < 2; ++q) {
      segment[q] = 0.f;
      if (at.column == 0) scratch.r[at.row + 8 * q] = 0.f;
    }
  }

  DEVICE void add_bias(const Tile& tile, Sums& z) const {
    const float bias[2] = {bias_at(p.head, word(tile, 0)), bias_at(p.head, word(tile, 1))};
    UNROLL for (int i = 0; i < kSums; ++i) z[i] += bias[i / 2 % 2];
  }

  // Bit j: group j is special to this warp.
  DEVICE unsigned special_groups(const Columns& columns) const {
    const int lane = threadIdx.x % kWarp;
    return __ballot_sync(kAllLanes, lane < kGroups && columns.special[lane] >> at.row / kWarpRows & 1);
  }

  // Sums of a response go to R with its last group.
  //
  // A few groups at a time, whose exponentials the compiler can then interleave: a branch for each group costs twice
  // the time of all else.
  DEVICE void add(const Tile& tile, const Columns& columns, Sums& z, Held& held) {
    const unsigned special = special_groups(columns);
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
        UNROLL for (int q = 0; q < 2; ++q) segment[q] += of_groups[j][q];
        if (special >> (first + j) & 1) end_group(tile, columns, first + j);
      }
      if (first + kAtATime == kGroups / 2) held.at_most<2>();
    }
  }

  static DEVICE float (&group_of(Sums& z, int j))[4] { return reinterpret_cast<float (&)[4]>(z[4 * j]); }

  // `two`: the terms of the two columns; `sums`: of the two rows.
  DEVICE void add_group(const float4& two, const float (&z)[4], float (&sums)[2]) const {
    UNROLL for (int i = 0; i < 4; ++i) {
      float slope;
      const float e = exp2_fast(exponent_above<SOFTCAP>(i % 2 ? two.z : two.x, z[i], options, slope));
      const float others = (i % 2 ? two.w : two.y) * e;
      sums[i / 2] -= SOFTCAP ? others * slope : others;
    }
  }

  // Targets count as 0 among the others and have a residual of their own. So does what lies beyond a response, where z
  // may be NaN, which a weight of 0 would not stop.
  DEVICE void leave_out(const Tile& tile, const Columns& columns, int column, float (&z)[4], float (&sums)[2]) const {
    UNROLL for (int i = 0; i < 4; ++i) {
      const int n = columns.tokens[column + i % 2];
      const bool target = columns.targets[column + i % 2] == word(tile, i / 2);
      if (target) sums[i / 2] += p.terms.target[n];
      z[i] = target ? masked : n < 0 ? 0.f : z[i];
    }
  }

  DEVICE void end_group(const Tile& tile, const Columns& columns, int j) {
    const int64_t response = columns.ends[j];
    if (response == kGoesOn) return;
    UNROLL for (int q = 0; q < 2; ++q) {
      segment[q] += __shfl_xor_sync(kAllLanes, segment[q], 1);
      segment[q] += __shfl_xor_sync(kAllLanes, segment[q], 2);
      if (at.column == 0) {
        const float sum = scratch.r[at.row + 8 * q] + segment[q];
        const int v = word(tile, q);
        if (response >= 0 && v < p.head.V) p.R[response * p.head.V + v] = sum;
        scratch.r[at.row + 8 * q] = response >= 0 ? 0.f : sum;
      }
      segment[q] = 0.f;
    }
  }
};

template <class T, bool SOFTCAP>
__global__ void __launch_bounds__(kThreads, 1)
    residuals_kernel(const __grid_constant__ TensorMap weight, const __grid_constant__ TokenMaps hidden,
                     const __grid_constant__ ResidualsArguments p) {
  SHARED(shared);
  Scratch& scratch = *reinterpret_cast<Scratch*>(shared + kScratch);
  scratch.handover.initialise();
  Walk walk(hidden, p.packing, p.head.V);
  ResidualsEpilogue<SOFTCAP> epilogue{p, scratch};
  run<T>(shared, RowsAsA{weight}, PackedTokens<Walk>{walk}, p.head.d, walk, epilogue, WriteColumns{p, scratch, walk});
}

}  // namespace

int residuals(const Head& head, const Tokens& tokens, const Responses& responses, const Terms& terms, const int* flags,
              int* packing, float* R, Stream stream) {
  if (responses.B == 0) return 0;
  const ResidualsArguments p{head, tokens, {packing}, terms, R};
  TensorMap weight;
  TokenMaps hidden;
  int error = map_matrix(weight, head.weight, head.V, head.stride, head, kRows);
  if (!error) error = map_tokens(hidden, tokens, head, kGroupColumns);
  if (!error) error = pack(responses, flags, Walk::grouping_for(head.d), p.packing, stream);
  if (error) return error;
  return choose_half(head.dtype, [&](auto number) {
    return choose(head.softcap, [&](auto softcap) {
      return launch_persistent(Walk::most_items(head.V), sizeof(Scratch), stream,
                               residuals_kernel<decltype(number), softcap>, weight, hidden, p);
    });
  });
}

}  // namespace g2rl::cuda::sm90
