// Residuals summed over the tokens of each response: rows of a tile are words, columns tokens counted from the
// response's first, so that sums stay inside a thread but for a last step. A block has a response and 128 words: it
// writes its part of R once, and nothing depends on other responses.
#include "pipeline_sm80.h"

namespace g2rl::cuda::sm80 {

namespace {

constexpr int kRowsOfThread = 2 * kRowBlocks, kColumnsOfThread = 2 * kColumnBlocks;

struct Arguments {
  Head head;
  const int64_t* targets;
  Responses responses;
  const int* flags;  // responses whose flag is 0 are left out; null: none is
  Terms terms;       // under STATISTICS shift is lse in natural units, and no other but weight is read
  float* R;
  Partials partials;  // of STATISTICS
};

// A token as a tile takes it. Beyond the response every exponential is 0.
struct TokenTerms {
  float shift, weight, target;
  int y;
};

// What an epilogue has of shared memory: terms, and in their place sums, of four warps or a word each, when terms were
// read.
struct Scratch {
  uint8_t* memory;

  DEVICE TokenTerms* terms() const { return reinterpret_cast<TokenTerms*>(memory); }
  DEVICE float* sums() const { return reinterpret_cast<float*>(memory); }
};
static_assert(4 * kTile * sizeof(float) <= kTile * sizeof(TokenTerms));
static_assert(kTile * sizeof(TokenTerms) <= kScratchBytes);

template <bool SOFTCAP, bool STATISTICS>
struct Residuals {
  const Arguments& p;
  const Scratch scratch;
  const int v0, start, end;
  const Place at = Place::here();
  float segment[kRowsOfThread] = {};
  float r[kRowsOfThread] = {};  // of the segments before

  // Rows of a thread are numbered 2 i + q.
  DEVICE int word(int row) const { return v0 + at.row + 8 * row; }

  DEVICE void operator()(int tile, const Sums& z) {
    load_terms(start + tile * kTile);
    // Read anew for each tile: between them registers are scarce.
    const Options options(p.head);
    float bias[kRowsOfThread];
    UNROLL for (int row = 0; row < kRowsOfThread; ++row) { bias[row] = bias_at(p.head, word(row)); }
    float S[kColumnsOfThread] = {}, X[kColumnsOfThread] = {};
    float of_tile[kRowsOfThread] = {};
    UNROLL for (int j = 0; j < kColumnBlocks; ++j) {
      UNROLL for (int e = 0; e < 2; ++e) {
        const int column = at.column + 8 * j + e;
        const TokenTerms token = scratch.terms()[column];
        float logits[kRowsOfThread];
        UNROLL for (int row = 0; row < kRowsOfThread; ++row) {
          logits[row] = z[row / 2][4 * j + row % 2 * 2 + e] + bias[row];
          add(options, token, row, logits[row], S[2 * j + e], X[2 * j + e], of_tile[row]);
        }
        add_target(options, token, start + tile * kTile + column, logits, of_tile);
      }
    }
    if (STATISTICS) store_statistics(start + tile * kTile, S, X);
    UNROLL for (int row = 0; row < kRowsOfThread; ++row) segment[row] += of_tile[row];
    if ((tile + 1) % (kSegment / kTile) == 0) end_segment();
  }

  DEVICE void end_segment() {
    UNROLL for (int row = 0; row < kRowsOfThread; ++row) {
      r[row] += segment[row];
      segment[row] = 0.f;
    }
  }

  DEVICE void add(const Options& options, const TokenTerms& token, int row, float z, float& S, float& X,
                  float& r) const {
    float slope;
    const float x = exponent_above<SOFTCAP>(token.shift, z, options, slope), e = exp2_fast(x);
    const float others = fmaf(-token.weight * slope, e, r);
    const bool target = token.y == word(row);
    if (STATISTICS) {
      const bool counts = !target && word(row) < p.head.V;
      S += counts ? e : 0.f;
      X += counts ? x * e : 0.f;
    }
    r = target ? r : others;
  }

  // Few threads have a target: in a branch of its own it takes no registers of the others.
  DEVICE void add_target(const Options& options, const TokenTerms& token, int n, const float (&z)[kRowsOfThread],
                         float (&r)[kRowsOfThread]) const {
    const int from_first = token.y - word(0);
    if (from_first % 8 != 0 || unsigned(from_first) >= 8 * kRowsOfThread) return;
    float residual = token.target;
    if (STATISTICS) {
      float z_y = 0.f, slope;
      UNROLL for (int row = 0; row < kRowsOfThread; ++row) z_y = from_first == 8 * row ? z[row] : z_y;
      p.partials.planes[n] = z_y;
      const float e = exp2_fast(exponent_above<SOFTCAP>(token.shift, z_y, options, slope));
      residual = residual_of_target(token.weight, slope, e);
    }
    UNROLL for (int row = 0; row < kRowsOfThread; ++row) r[row] += from_first == 8 * row ? residual : 0.f;
  }

  DEVICE void load_terms(int n0) const {
    __syncthreads();  // nobody reads the last tile's
    if (threadIdx.x < kTile) {
      const int n = n0 + threadIdx.x;
      TokenTerms token{kBeyond, 0.f, 0.f, -1};
      if (n < end) {
        const float shift = p.terms.shift[n];
        token = {STATISTICS ? shift * kLog2e : shift, p.terms.weight[n], STATISTICS ? 0.f : p.terms.target[n],
                 int(p.targets[n])};
      }
      scratch.terms()[threadIdx.x] = token;
    }
    __syncthreads();
  }

  // Sums over the tile's words of each token.
  DEVICE void store_statistics(int n0, float (&S)[kColumnsOfThread], float (&X)[kColumnsOfThread]) const {
    const int64_t N = p.responses.cu_seqlens[p.responses.B], plane = N * p.partials.splits;
    const int n = n0 + threadIdx.x;
    const bool stores = threadIdx.x < kTile && n < end;
    float* to = p.partials.planes + v0 / kTile * N + n;
    const float S_n = over_warps(S);
    if (stores) to[plane] = S_n;
    const float X_n = over_warps(X);
    if (stores) to[2 * plane] = X_n;
  }

  // The sum of the column that threads below 128 are named after.
  DEVICE float over_warps(float (&x)[kColumnsOfThread]) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    // The eight lanes that share columns: of the two values of each eight columns, lane l keeps those of eight l / 4.
    exchange<8, 16>(x), exchange<4, 8>(x), exchange<2, 4>(x);
    __syncthreads();
    float* to = scratch.sums() + warp / 2 * kTile + at.column + lane / 4 * 8;
    to[0] = x[0];
    to[1] = x[1];
    __syncthreads();
    const float* from = scratch.sums() + threadIdx.x % kTile;
    return (from[0] + from[kTile]) + (from[2 * kTile] + from[3 * kTile]);
  }

  // Joins the four threads and the two warps that share a word.
  DEVICE void finish(int response) {
    end_segment();
    __syncthreads();
    UNROLL for (int row = 0; row < kRowsOfThread; ++row) {
      r[row] += __shfl_xor_sync(kAllLanes, r[row], 1);
      r[row] += __shfl_xor_sync(kAllLanes, r[row], 2);
      if (at.column == 64) scratch.sums()[at.row + 8 * row] = r[row];
    }
    __syncthreads();
    UNROLL for (int row = 0; row < kRowsOfThread; ++row) {
      if (at.column != 0 || word(row) >= p.head.V) continue;
      p.R[int64_t(response) * p.head.V + word(row)] = r[row] + scratch.sums()[at.row + 8 * row];
    }
  }
};

template <class T, bool SOFTCAP, bool STATISTICS>
__global__ void __launch_bounds__(kThreads, 1)
    residuals_kernel(const __grid_constant__ Arguments p, const __grid_constant__ Matrix<T> weight,
                     const __grid_constant__ Matrix<T> hidden) {
  SHARED(shared);
  int response, words;
  Order{p.responses.B, int(ceil_div(p.head.V, kTile))}.find(blockIdx.x, response, words);
  if (p.flags != nullptr && p.flags[response] == 0) return;
  const int start = p.responses.cu_seqlens[response], end = p.responses.cu_seqlens[response + 1];
  // Rows of the next response count as 0: its NaN stays its own.
  const Matrix<T> of_response{hidden.base, hidden.stride, end, hidden.aligned};
  Residuals<SOFTCAP, STATISTICS> epilogue{p, {shared + kScratch}, words * kTile, start, end};
  multiply_tiles(shared, weight, words * kTile, of_response, start, int(ceil_div(end - start, kTile)), p.head.d,
                 epilogue);
  epilogue.finish(response);
}

template <bool STATISTICS>
int launch_residuals(const Arguments& p, const Tokens& tokens, Stream stream) {
  return choose(p.head.dtype, [&](auto number) {
    using T = decltype(number);
    const auto weight = Matrix<T>::of(p.head.weight, p.head.stride, p.head.V);
    const auto hidden = Matrix<T>::of(tokens.hidden, tokens.stride, tokens.N);
    const Launch at = blocks(p.responses.B * ceil_div(p.head.V, kTile));
    return choose(p.head.softcap, [&](auto softcap) {
      return launch(at, stream, residuals_kernel<T, softcap, STATISTICS>, p, weight, hidden);
    });
  });
}

}  // namespace

int residuals(const Head& head, const Tokens& tokens, const Responses& responses, const Terms& terms, const int* flags,
              int*, float* R, Stream stream) {
  return launch_residuals<false>({head, tokens.targets, responses, flags, terms, R, {}}, tokens, stream);
}

int residual_splits(int V) { return int(ceil_div(V, kTile)); }

int residuals_and_statistics(const Head& head, const Tokens& tokens, const Responses& responses, const float* lse,
                             const float* a, int*, float* R, const Partials& partials, Stream stream) {
  const Terms terms{const_cast<float*>(lse), const_cast<float*>(a), nullptr, nullptr, nullptr};
  return launch_residuals<true>({head, tokens.targets, responses, nullptr, terms, R, partials}, tokens, stream);
}

}  // namespace g2rl::cuda::sm80
