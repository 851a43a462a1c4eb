// Features from residuals (projection.h) on Hopper: R is split into terms once, in memory, and then W streams past
// them.
//
// Rows of a tile are features, so W is A as it lies in memory, by columns. Columns are responses, as often as there are
// terms: first the largest terms of them all, then the next ones. An item, and a tile, is 128 features x the responses
// of a tile x one part of the vocabulary.
#include "projection.h"
#include "tiles_sm90.h"

namespace g2rl::cuda::sm90 {

namespace {

// Terms in memory: [tiles, Split<T>::kTerms, responses of a tile, stride] of 16 bits, responses beyond B 0.
template <class T>
constexpr int kResponses = kColumnsOfTile / Split<T>::kTerms;
HOST_DEVICE int64_t stride_of_terms(int V) { return ceil_div(V, 8) * 8; }

int64_t terms_bytes(const Head& head, int B) {
  const int responses = head.dtype == Dtype::bf16 ? kResponses<bf16> : kResponses<fp16>;
  return ceil_div(B, responses) * kColumnsOfTile * stride_of_terms(head.V) * 2;
}

struct ProjectionArguments {
  Head head;
  const float *R, *inverse;
  int B;
  uint8_t* terms;
  float* partials;
};

// ---- terms ----

constexpr int kSplitThreads = 256;
constexpr int kWordsOfBlock = 2 * kSplitThreads;

// A block has one response's words, a thread two neighbours of them.
template <class T>
__global__ void __launch_bounds__(kSplitThreads) split_kernel(const __grid_constant__ ProjectionArguments p) {
  const int64_t stride = stride_of_terms(p.head.V), blocks = ceil_div(stride, kWordsOfBlock);
  const int b = int(blockIdx.x / blocks), v = int(blockIdx.x % blocks) * kWordsOfBlock + 2 * threadIdx.x;
  if (v >= stride) return;
  float x[2] = {};
  if (b < p.B) {
    const float factor = p.inverse[b] * Split<T>::kRange;
    UNROLL for (int e = 0; e < 2; ++e) {
      if (v + e < p.head.V) x[e] = p.R[int64_t(b) * p.head.V + v + e] * factor;
    }
  }
  uint32_t pairs[Split<T>::kTerms];
  split<T>(x, pairs);
  const int64_t row = b / kResponses<T> * kColumnsOfTile + b % kResponses<T>;
  UNROLL for (int term = 0; term < Split<T>::kTerms; ++term) {
    *reinterpret_cast<uint32_t*>(p.terms + 2 * ((row + term * kResponses<T>)*stride + v)) = pairs[term];
  }
}

template <class T>
int launch_split(const ProjectionArguments& p, Stream stream) {
  const int64_t rows = ceil_div(p.B, kResponses<T>) * kResponses<T>;
  return launch({rows * ceil_div(stride_of_terms(p.head.V), kWordsOfBlock), kSplitThreads}, stream, split_kernel<T>, p);
}

// ---- the product ----

// In stages. What rows of W have in common cancels over the vocabulary, but not what tensor cores cut off of it: where
// it is ten times their spread, chains of 192 words would leave a token's features off by 2e-5, those of 64 by 6e-6.
constexpr int kChainOfTerms = 1;

// A tile's row: its first feature; column: its first row of terms; item: its part.
struct ProjectionWalk {
  int b_tiles, d_tiles, parts;
  int item = blockIdx.x;

  DEVICE ProjectionWalk(const ProjectionArguments& p, int responses)
      : b_tiles(int(ceil_div(p.B, responses))),
        d_tiles(int(ceil_div(p.head.d, kRows))),
        parts(projection_parts(p.head.V)) {}

  DEVICE bool next(Tile& tile) {
    // Neighbours share W, or terms, and find them in L2.
    const int part = item / b_tiles / d_tiles;
    if (part >= parts) return false;
    tile = {item / b_tiles % d_tiles * kRows, item % b_tiles * kColumnsOfTile, part, true, true, false};
    item += gridDim.x;
    return true;
  }
};

// 64 features for each of the warpgroups, a row for each word.
struct WeightAsA {
  static constexpr bool kByColumns = true;
  const TensorMap& weight;

  DEVICE void load(uint32_t barrier, uint32_t to, const Tile& tile, int k) const {
    if (threadIdx.x != 0) return;
    UNROLL for (int i = 0; i < kConsumers; ++i) {
      tma_load(weight, barrier, to + i * (kBytesA / kConsumers), tile.row + i * kColumns, tile.item * kWordsOfPart + k);
    }
  }
};

struct TermsAsB {
  const TensorMap& terms;

  DEVICE void load(uint32_t barrier, uint32_t to, const Tile& tile, int k) const {
    if (threadIdx.x == 0) tma_load(terms, barrier, to, tile.item * kWordsOfPart + k, tile.column);
  }
};

template <class T>
struct ProjectionEpilogue {
  static constexpr int kTerms = Split<T>::kTerms, kOfTerm = kSums / kTerms;

  const ProjectionArguments& p;
  const Place at = Place::here();

  DEVICE void operator()(const Tile& tile, const Sums& z, Held&) const {
    const int first = tile.column / kColumnsOfTile * kResponses<T>;
    UNROLL for (int i = 0; i < kOfTerm; ++i) {
      const int b = first + i / 4 * 8 + at.column + i % 2, k = tile.row + at.row + i / 2 % 2 * 8;
      float sum = z[(kTerms - 1) * kOfTerm + i];
      UNROLL for (int term = kTerms - 2; term >= 0; --term) sum = sum / Split<T>::kDigits + z[term * kOfTerm + i];
      if (b < p.B && k < p.head.d) {
        p.partials[(int64_t(tile.item) * p.B + b) * p.head.d + k] = sum / Split<T>::kRange;
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    projection_kernel(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap terms,
                      const __grid_constant__ ProjectionArguments p) {
  SHARED(shared);
  ProjectionWalk walk(p, kResponses<T>);
  const ProjectionEpilogue<T> epilogue{p};
  run<T, kChainOfTerms>(shared, WeightAsA{weight}, TermsAsB{terms}, kWordsOfPart, walk, epilogue);
}

}  // namespace

int64_t projection_bytes(const Head& head, int B) { return terms_bytes(head, B) + sm80::projection_bytes(head, B); }

int project(const Head& head, const float* R, const float* inverse, int B, float logit_scale, void* memory,
            float* features, Stream stream) {
  if (B == 0) return 0;
  uint8_t* terms = static_cast<uint8_t*>(memory);
  const ProjectionArguments p{head, R, inverse, B, terms, reinterpret_cast<float*>(terms + terms_bytes(head, B))};
  const int parts = projection_parts(head.V);
  const int error = choose_half(head.dtype, [&](auto number) {
    using T = decltype(number);
    TensorMap weight, of_terms;
    const int64_t stride = stride_of_terms(head.V), b_tiles = ceil_div(B, kResponses<T>);
    int error = map_matrix(weight, head.weight, head.V, head.stride, head, kColumns);
    if (!error)
      error = make_tensor_map(of_terms, terms, head.dtype, b_tiles * kColumnsOfTile, head.V, stride, kColumnsOfTile);
    if (!error) error = launch_split<T>(p, stream);
    if (error) return error;
    const int64_t items = parts * b_tiles * ceil_div(head.d, kRows);
    return launch_persistent(items, 0, stream, projection_kernel<T>, weight, of_terms, p);
  });
  return error ? error : join_parts(p.partials, parts, int64_t(B) * head.d, logit_scale, features, stream);
}

}  // namespace g2rl::cuda::sm90
