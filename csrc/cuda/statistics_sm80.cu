// Sums over the vocabulary for each token: rows of a tile are tokens, columns words, so that sums stay inside a thread
// but for a last step. A block has 128 tokens and one part of the vocabulary.
#include "pipeline_sm80.h"

namespace g2rl::cuda::sm80 {

namespace {

constexpr int kPart = 8 * kTile;
constexpr int kRowsOfThread = 2 * kRowBlocks;

struct Arguments {
  Head head;
  Tokens tokens;
  Partials partials;
  Kept kept;
};

template <bool SOFTCAP>
struct Statistics {
  const Arguments& p;
  const int n0, v0;
  const Options options{p.head};
  const Place at = Place::here();
  int y[kRowsOfThread];
  float m[kRowsOfThread], S[kRowsOfThread], X[kRowsOfThread], z_y[kRowsOfThread];

  // Rows of a thread are numbered 2 i + q.
  DEVICE int token(int row) const { return n0 + at.row + 8 * row; }

  DEVICE void begin() {
    UNROLL for (int row = 0; row < kRowsOfThread; ++row) {
      y[row] = token(row) < p.tokens.N ? int(p.tokens.targets[token(row)]) : -1;
      m[row] = kNoMaximum;
      S[row] = X[row] = z_y[row] = 0.f;
    }
  }

  DEVICE void operator()(int tile, Sums& z) {
    const int v = v0 + tile * kTile + at.column;
    add_bias_of_columns(p.head, v, z);
    if (p.kept.rows != nullptr) keep(v, z);
    cap(v, z);
    UNROLL for (int row = 0; row < kRowsOfThread; ++row) add(row, z[row / 2] + row % 2 * 2);
  }

  DEVICE void keep(int v, const Sums& z) const {
    UNROLL for (int row = 0; row < kRowsOfThread; ++row) {
      if (token(row) >= p.tokens.N) continue;
      float* to = reinterpret_cast<float*>(static_cast<uint8_t*>(p.kept.rows) + token(row) * p.kept.stride) + v;
      const float* from = z[row / 2] + row % 2 * 2;
      UNROLL for (int j = 0; j < kColumnBlocks; ++j) {
        *reinterpret_cast<float2*>(to + 8 * j) = {from[4 * j], from[4 * j + 1]};
      }
    }
  }

  // Targets, and what lies beyond the vocabulary, are left out.
  DEVICE void cap(int v, Sums& z) {
    const float masked = masked_logit(options);
    UNROLL for (int i = 0; i < kRowBlocks; ++i) {
      UNROLL for (int s = 0; s < kSums; ++s) {
        const int row = 2 * i + s / 2 % 2, word = v + s / 4 * 8 + s % 2;
        float slope;
        if (word == y[row]) z_y[row] = z[i][s];
        z[i][s] = word == y[row] || word >= p.head.V ? masked : capped<SOFTCAP>(z[i][s], options, slope);
      }
    }
  }

  // `of_row`: what options.scale makes exponents. NaN is no maximum, but shows in the sums.
  DEVICE void add(int row, const float* of_row) {
    float largest = -INFINITY;
    UNROLL for (int s = 0; s < kSums; s += 4) {
      largest = fmaxf(largest, fmaxf(of_row[s] * options.scale, of_row[s + 1] * options.scale));
    }
    largest = fmaxf(m[row], rounded_up(largest));
    rescale(m[row], S[row], X[row], largest);
    UNROLL for (int s = 0; s < kSums; s += 4) {
      UNROLL for (int e = 0; e < 2; ++e) {
        const float x = fmaf(of_row[s + e], options.scale, -largest), exponential = exp2_fast(x);
        S[row] += exponential;
        X[row] = fmaf(x, exponential, X[row]);
      }
    }
  }

  DEVICE void join(int row, float other_m, float other_S, float other_X, float other_z_y) {
    const float largest = fmaxf(m[row], other_m), moved = other_m - largest, factor = exp2_fast(moved);
    rescale(m[row], S[row], X[row], largest);
    S[row] = fmaf(other_S, factor, S[row]);
    X[row] = fmaf(fmaf(other_S, moved, other_X), factor, X[row]);
    z_y[row] += other_z_y;
  }

  // Joins the four threads and the two warps that share a token, and stores its sums.
  DEVICE void finish(int part, float* scratch) {
    UNROLL for (int row = 0; row < kRowsOfThread; ++row) {
      UNROLL for (int lane = 1; lane <= 2; lane *= 2) {
        const auto of_other = [&](float x) { return __shfl_xor_sync(kAllLanes, x, lane); };
        const float other[4] = {of_other(m[row]), of_other(S[row]), of_other(X[row]), of_other(z_y[row])};
        join(row, other[0], other[1], other[2], other[3]);
      }
      if (at.column == 64) {
        float* to = scratch + 4 * (at.row + 8 * row);
        to[0] = m[row], to[1] = S[row], to[2] = X[row], to[3] = z_y[row];
      }
    }
    __syncthreads();
    const int64_t N = p.tokens.N, plane = N * p.partials.splits;
    UNROLL for (int row = 0; row < kRowsOfThread; ++row) {
      if (at.column != 0 || token(row) >= N) continue;
      const float* other = scratch + 4 * (at.row + 8 * row);
      join(row, other[0], other[1], other[2], other[3]);
      float* to = p.partials.planes + part * N + token(row);
      to[0] = m[row], to[plane] = S[row], to[2 * plane] = X[row], to[3 * plane] = z_y[row];
    }
  }
};

template <class T, bool SOFTCAP>
__global__ void __launch_bounds__(kThreads, 1)
    statistics_kernel(const __grid_constant__ Arguments p, const __grid_constant__ Matrix<T> hidden,
                      const __grid_constant__ Matrix<T> weight) {
  SHARED(shared);
  int block, part;
  Order{int(ceil_div(p.tokens.N, kTile)), p.partials.splits}.find(blockIdx.x, block, part);
  const int v0 = part * kPart, end = v0 + kPart < p.head.V ? v0 + kPart : p.head.V;
  Statistics<SOFTCAP> epilogue{p, block * kTile, v0};
  epilogue.begin();
  multiply_tiles(shared, hidden, block * kTile, weight, v0, int(ceil_div(end - v0, kTile)), p.head.d, epilogue);
  epilogue.finish(part, reinterpret_cast<float*>(shared + kScratch));
}

}  // namespace

int splits(int V) { return int(ceil_div(V, kPart)); }
int64_t kept_bytes(const Head& head) { return ceil_div(head.V, kTile) * kTile * 4; }
int kept_roots(const Head&) { return 0; }

int statistics(const Head& head, const Tokens& tokens, const Partials& partials, const Kept& kept, Stream stream) {
  const Arguments p{head, tokens, partials, kept};
  return choose(head.dtype, [&](auto number) {
    using T = decltype(number);
    const auto hidden = Matrix<T>::of(tokens.hidden, tokens.stride, tokens.N);
    const auto weight = Matrix<T>::of(head.weight, head.stride, head.V);
    const Launch at = blocks(ceil_div(tokens.N, kTile) * partials.splits);
    return choose(head.softcap,
                  [&](auto softcap) { return launch(at, stream, statistics_kernel<T, softcap>, p, hidden, weight); });
  });
}

}  // namespace g2rl::cuda::sm80
