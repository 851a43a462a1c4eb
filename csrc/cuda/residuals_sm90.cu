// Residuals of each response's tokens, summed in vocabulary space from recomputed logits, on Hopper. Rows of a tile are
// words, so that the sum over tokens stays inside a thread but for a last step. An item is a response x 128 words (of
// each block of the cluster); its tokens come in blocks of equal size, counted from its first token: as few as 192
// columns allow. Nothing depends on other responses.
#include "tiles_sm90.h"

namespace g2rl::cuda::sm90 {

namespace {

struct ResidualsArguments {
  Head head;
  Tokens tokens;
  Responses responses;
  Terms terms;
  float* R;
};

template <class C>
struct ResidualsWalk {
  const int* cu_seqlens;
  Order order;  // rows: responses; columns: tiles of words of a cluster
  int item = C::index(), response = 0, v0 = 0, n = 0, width = 0, blocks = 0;

  DEVICE ResidualsWalk(const Responses& responses, int V)
      : cu_seqlens(responses.cu_seqlens), order{responses.B, int(ceil_div(V, kRows * C::kShareB))} {}

  DEVICE bool next(Tile& tile) {
    const bool first = blocks == 0;
    if (first) {
      if (item >= order.rows * order.columns) return false;
      int words;
      order.find(item, response, words);
      item += C::count();
      v0 = (words * C::kShareB + C::row()) * kRows;
      n = cu_seqlens[response];
      const int length = cu_seqlens[response + 1] - n;
      // A response without tokens has one block, all of it masked: its R is 0.
      blocks = length > 0 ? int(ceil_div(length, kMaxRows)) : 1;
      width = length > 0 ? int(ceil_div(ceil_div(length, blocks), kSmallBox)) * kSmallBox : kSmallBox;
    }
    tile = {v0, n, width, response, first, --blocks == 0};
    n += width;
    return true;
  }
};

// A token as the epilogue takes it. Beyond the response every exponential is 0.
struct TokenTerms {
  float shift, weight;
};
constexpr float kBeyond = 1e30f;
constexpr int kTermsBytes = kMaxRows * int(sizeof(TokenTerms) + sizeof(int));

template <bool SOFTCAP>
struct ResidualsEpilogue {
  const ResidualsArguments& p;
  uint8_t* scratch;
  const Options options{p.head};
  const Place at = Place::here();
  const float masked = masked_logit(options);
  float r[2];

  DEVICE TokenTerms* terms() const {
    return reinterpret_cast<TokenTerms*>(scratch + (threadIdx.x / kWarpgroup - 1) * kTermsBytes);
  }
  DEVICE int* targets() const { return reinterpret_cast<int*>(terms() + kMaxRows); }
  DEVICE int word(const Tile& tile, int q) const { return tile.a_row + at.row + 8 * q; }

  DEVICE void operator()(const Tile& tile, Sums& z) {
    if (tile.first) r[0] = r[1] = 0.f;
    const int end = p.responses.cu_seqlens[tile.item + 1];
    const bool targeted = load_terms(tile, end);
    float bias[2] = {0.f, 0.f};
    if (p.head.bias) UNROLL for (int q = 0; q < 2; ++q) bias[q] = bias_at(p.head, word(tile, q));
    if (targeted) take_targets(tile, z);
    if (tile.b_row + tile.b_rows > end) leave_out(tile, end, z);
    add(tile, bias, z);
    if (tile.last) finish(tile);
  }

  // Terms of the tile's tokens to shared memory; whether one of this warp's words is a target.
  DEVICE bool load_terms(const Tile& tile, int end) const {
    const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
    named_barrier(2 + warpgroup, kWarpgroup);  // nobody reads the last tile's
    for (int i = thread; i < tile.b_rows; i += kWarpgroup) {
      const int n = tile.b_row + i;
      const bool inside = n < end;
      terms()[i] = {inside ? p.terms.shift[n] : kBeyond, inside ? p.terms.weight[n] : 0.f};
      targets()[i] = inside ? int(p.tokens.targets[n]) : -1;
    }
    named_barrier(2 + warpgroup, kWarpgroup);
    const int lane = thread % kWarp, words = tile.a_row + at.row - lane / 4;
    bool found = false;
    for (int i = lane; i < tile.b_rows; i += kWarp) found |= unsigned(targets()[i] - words) < 16;
    return __any_sync(kAllLanes, found);
  }

  // Targets have residuals of their own; as one of the others they count as 0.
  DEVICE void take_targets(const Tile& tile, Sums& z) {
    UNROLL for (int i = 0; i < kSums; ++i) {
      const int column = i / 4 * 8 + at.column + i % 2, q = i / 2 % 2;
      if (column < tile.b_rows && targets()[column] == word(tile, q)) {
        r[q] += p.terms.target[tile.b_row + column];
        z[i] = masked;
      }
    }
  }

  // What follows the response may be NaN, which a weight of 0 would not stop.
  DEVICE void leave_out(const Tile& tile, int end, Sums& z) const {
    UNROLL for (int i = 0; i < kSums; ++i) {
      if (tile.b_row + i / 4 * 8 + at.column + i % 2 >= end) z[i] = 0.f;
    }
  }

  DEVICE void add(const Tile& tile, const float (&bias)[2], const Sums& z) {
    UNROLL for (int j = 0; j < kSums / 4; ++j) {
      if (8 * j >= tile.b_rows) break;
      const float4 two = *reinterpret_cast<const float4*>(terms() + 8 * j + at.column);
      UNROLL for (int i = 4 * j; i < 4 * j + 4; ++i) {
        const int q = i / 2 % 2;
        float slope;
        const float x = exponent_above<SOFTCAP>(i % 2 ? two.z : two.x, z[i] + bias[q], options, slope);
        const float others = (i % 2 ? two.w : two.y) * exp2_fast(x);
        r[q] -= SOFTCAP ? others * slope : others;
      }
    }
  }

  DEVICE void finish(const Tile& tile) {
    UNROLL for (int q = 0; q < 2; ++q) {
      r[q] += __shfl_xor_sync(kAllLanes, r[q], 1);
      r[q] += __shfl_xor_sync(kAllLanes, r[q], 2);
      const int v = word(tile, q);
      if (at.column == 0 && v < p.head.V) p.R[int64_t(tile.item) * p.head.V + v] = r[q];
    }
  }
};

template <class T, bool SOFTCAP, class C>
__global__ void __launch_bounds__(kThreads, 1)
    residuals_kernel(const __grid_constant__ TensorMap weight, const __grid_constant__ Boxes hidden,
                     const __grid_constant__ ResidualsArguments p) {
  SHARED(shared);
  const ResidualsWalk<C> walk(p.responses, p.head.V);
  ResidualsEpilogue<SOFTCAP> epilogue{p, shared + kScratch};
  run<T, C, true>(shared, weight, hidden, p.head.d, walk, epilogue);
}

}  // namespace

int residuals(const Head& head, const Tokens& tokens, const Responses& responses, const Terms& terms, float* R,
              Stream stream) {
  if (responses.B == 0) return 0;
  TensorMap weight;
  Boxes hidden;
  int error = map_matrix(weight, head.weight, head.V, head.stride, head, kRows);
  if (!error) error = map_matrix(hidden.big, tokens.hidden, tokens.N, tokens.stride, head, kBigBox);
  if (!error) error = map_matrix(hidden.small, tokens.hidden, tokens.N, tokens.stride, head, kSmallBox);
  if (error) return error;
  const ResidualsArguments p{head, tokens, responses, terms, R};
  const auto run_on = [&](auto cluster) {
    using C = decltype(cluster);
    const auto at = persistent<C>(ceil_div(head.V, kRows * C::kShareB) * responses.B, kConsumers * kTermsBytes);
    return choose_half(head.dtype, [&](auto number) {
      return choose(head.softcap, [&](auto softcap) {
        return launch(at, stream, residuals_kernel<decltype(number), softcap, C>, weight, hidden, p);
      });
    });
  };
  return head.V > kRows ? run_on(Cluster<1, 2>{}) : run_on(Cluster<1, 1>{});
}

}  // namespace g2rl::cuda::sm90
