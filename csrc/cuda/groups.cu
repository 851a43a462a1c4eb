// The whole group mathematics in one launch, one block for each group of m responses:
//
//   S_ij = <Phi_i, Phi_j> / (|Phi_i| |Phi_j|)
//   nu_i = sqrt(max(1 - sum_j w_ij S_ij^2, 0)),  w_ij = exp(r_j) / sum_{k != i} exp(r_k), j and k usable peers of i
//   r~_i = clip(r_i factor(nubar_i), -c_i, c_i),  c_i = max(c, |r_i|),  nubar = (nu - min nu) / (max nu - min nu)
//   A_i  = (r~_i - mean r~) / sqrt(var r~ + 1e-6)
//
// A response is usable if it is marked valid and Phi is not 0. Everything is float64: 1 - S^2 of near-equal directions
// would lose half of fp32's digits, and the sums are short. What is computed of a group depends on the group alone.
#include "groups.h"

namespace g2rl::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

// Inner products of TILE x TILE responses at a time. Each warp takes some of the columns of features and all pairs, of
// which a lane has kRows x kColumns; the warps' sums are joined in fixed order.
template <int TILE>
struct Gram {
  static constexpr int kRows = TILE / 8, kColumns = TILE / 4;
  // A chunk of features lies transposed, [kDepth, kStride], so that lanes read neighbours.
  static constexpr int kDepth = 2048 / TILE, kStride = TILE + 2;
  static constexpr int kLoads = TILE * kDepth / kThreads;
  static constexpr int kNumbers = 2 * kDepth * kStride;
};
constexpr int kSmall = 16, kLarge = 32;
constexpr int kScratch = Gram<kSmall>::kNumbers;
static_assert(kScratch >= Gram<kLarge>::kNumbers && kScratch >= kWarps / 2 * kLarge * kLarge);

// The rows of features that a tile has.
struct Rows {
  const float* at;
  int64_t stride;
  int count, d;
};

template <int TILE>
DEVICE void load_chunk(const Rows& rows, int k0, float (&x)[Gram<TILE>::kLoads]) {
  UNROLL for (int i = 0; i < Gram<TILE>::kLoads; ++i) {
    const int at = i * kThreads + threadIdx.x, row = at / Gram<TILE>::kDepth, k = k0 + at % Gram<TILE>::kDepth;
    x[i] = row < rows.count && k < rows.d ? rows.at[row * rows.stride + k] : 0.f;
  }
}

template <int TILE>
DEVICE void store_chunk(const float (&x)[Gram<TILE>::kLoads], double* chunk) {
  UNROLL for (int i = 0; i < Gram<TILE>::kLoads; ++i) {
    const int at = i * kThreads + threadIdx.x, row = at / Gram<TILE>::kDepth, k = at % Gram<TILE>::kDepth;
    chunk[k * Gram<TILE>::kStride + row] = x[i];
  }
}

struct alignas(16) Pair {
  double x, y;
};

template <int COUNT>
DEVICE void load_pairs(const double* from, double (&x)[COUNT]) {
  UNROLL for (int i = 0; i < COUNT; i += 2) {
    const Pair pair = *reinterpret_cast<const Pair*>(from + i);
    x[i] = pair.x;
    x[i + 1] = pair.y;
  }
}

template <int TILE>
DEVICE void add_chunk(const double* a, const double* b, double (&sums)[Gram<TILE>::kRows][Gram<TILE>::kColumns]) {
  using G = Gram<TILE>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  UNROLL for (int i = 0; i < G::kDepth / kWarps; ++i) {
    const int k = i * kWarps + warp;
    double x[G::kRows], y[G::kColumns];
    load_pairs(a + k * G::kStride + lane / 4 * G::kRows, x);
    load_pairs(b + k * G::kStride + lane % 4 * G::kColumns, y);
    UNROLL for (int r = 0; r < G::kRows; ++r) {
      UNROLL for (int c = 0; c < G::kColumns; ++c) sums[r][c] = fma(x[r], y[c], sums[r][c]);
    }
  }
}

// Writes inner products [TILE, TILE] of the rows of a and b to `scratch`; `same` where a is b.
template <int TILE>
DEVICE void inner_products(const Rows& a, const Rows& b, bool same, double* scratch) {
  using G = Gram<TILE>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  double* chunk_a = scratch;
  double* chunk_b = same ? scratch : scratch + G::kNumbers / 2;
  double sums[G::kRows][G::kColumns] = {};
  float x[G::kLoads], y[G::kLoads];
  load_chunk<TILE>(a, 0, x);
  if (!same) load_chunk<TILE>(b, 0, y);
  for (int k = 0; k < a.d; k += G::kDepth) {
    __syncthreads();
    store_chunk<TILE>(x, chunk_a);
    if (!same) store_chunk<TILE>(y, chunk_b);
    __syncthreads();
    // The next chunk is on its way while this one is multiplied.
    load_chunk<TILE>(a, k + G::kDepth, x);
    if (!same) load_chunk<TILE>(b, k + G::kDepth, y);
    add_chunk<TILE>(chunk_a, chunk_b, sums);
  }

  double* of_lane = scratch + lane / 4 * G::kRows * TILE + lane % 4 * G::kColumns;
  const auto pass = [&](double* to, auto&& f) {
    UNROLL for (int r = 0; r < G::kRows; ++r) {
      UNROLL for (int c = 0; c < G::kColumns; ++c) f(to[r * TILE + c], sums[r][c]);
    }
  };
  for (int half = kWarps / 2; half > 0; half /= 2) {
    __syncthreads();
    if (warp >= half && warp < 2 * half) {
      pass(of_lane + (warp - half) * TILE * TILE, [](double& to, double sum) { to = sum; });
    }
    __syncthreads();
    if (warp < half) pass(of_lane + warp * TILE * TILE, [](double& from, double& sum) { sum += from; });
  }
  if (warp == 0) pass(of_lane, [](double& to, double sum) { to = sum; });
  __syncthreads();
}

// What a block knows of its group's members, in shared memory.
struct Members {
  double *r, *inverse_length, *similar, *nu;
  double *weight, *weight_of_best;  // exp(r_j) relative to the largest, and to the largest but that; 0: not usable
  int* best;                        // the first usable response of the largest reward

  static constexpr int kBytes = 6 * int(sizeof(double));

  DEVICE Members(double* memory, int m)
      : r(memory),
        inverse_length(r + m),
        similar(inverse_length + m),
        nu(similar + m),
        weight(nu + m),
        weight_of_best(weight + m),
        best(reinterpret_cast<int*>(weight_of_best + m)) {}

  DEVICE bool usable(int i) const { return weight[i] != 0; }
};

template <class F>
DEVICE double across_lanes(double value, F combine) {
  UNROLL for (int other = 1; other < kWarp; other *= 2) value =
      combine(value, __shfl_xor_sync(kAllLanes, value, other));
  return value;
}

// The sum, least or largest of f(i) over the members, the same in all lanes of a warp. NaN is neither lost in a sum nor
// as an extreme.
template <class F>
DEVICE double sum_over(int size, F f) {
  double sum = 0;
  for (int i = threadIdx.x % kWarp; i < size; i += kWarp) sum += f(i);
  return across_lanes(sum, [](double x, double y) { return x + y; });
}
template <class F>
DEVICE double largest_of(int size, F f) {
  const auto larger = [](double x, double y) { return x > y || x != x ? x : y; };
  double largest = -INFINITY;
  for (int i = threadIdx.x % kWarp; i < size; i += kWarp) largest = larger(f(i), largest);
  return across_lanes(largest, larger);
}
template <class F>
DEVICE double least_of(int size, F f) {
  return -largest_of(size, [&](int i) { return -f(i); });
}

// Weights of peers; `usable` was left in `weight`. By one warp.
DEVICE void weigh(const Members& of, int size) {
  const int lane = threadIdx.x % kWarp;
  const auto reward = [&](int i) { return of.usable(i) ? of.r[i] : -INFINITY; };
  const double top = largest_of(size, reward);
  const int best =
      int(least_of(size, [&](int i) { return of.usable(i) && of.r[i] == top ? double(i) : double(size); }));
  const double second = largest_of(size, [&](int i) { return i == best ? -INFINITY : reward(i); });
  for (int i = lane; i < size; i += kWarp) {
    of.weight_of_best[i] = of.usable(i) && i != best ? exp(of.r[i] - second) : 0.;
    if (!of.usable(i)) continue;
    const double weight = exp(of.r[i] - top);
    of.weight[i] = weight < 1e-300 ? 1e-300 : weight;  // 0 would say that a response is not usable
  }
  if (lane == 0) *of.best = best;
}

DEVICE double peer_weight(const Members& of, int i, int j) {
  return i == j ? 0. : i == *of.best ? of.weight_of_best[j] : of.weight[j];
}

// Makes cosines of the inner products of tile (I, J), stores them and adds to what `similar` knows of its responses.
template <int TILE>
DEVICE void finish_tile(const Members& of, int size, int I, int J, double* S, float* similarity, int m_max) {
  for (int at = threadIdx.x; at < TILE * TILE; at += kThreads) {
    const int i = I + at / TILE, j = J + at % TILE;
    if (i >= size || j >= size) continue;
    S[at] *= of.inverse_length[i] * of.inverse_length[j];
    similarity[int64_t(i) * m_max + j] = float(S[at]);
    if (I != J) similarity[int64_t(j) * m_max + i] = float(S[at]);  // else another thread's
  }
  __syncthreads();
  const int thread = threadIdx.x;
  if (thread < TILE && I + thread < size) {
    double sum = 0;
    for (int j = 0; j < TILE && J + j < size; ++j) {
      const double s = S[thread * TILE + j];
      sum += peer_weight(of, I + thread, J + j) * s * s;
    }
    of.similar[I + thread] += sum;
  } else if (I != J && thread >= TILE && thread < 2 * TILE && J + thread - TILE < size) {
    double sum = 0;
    for (int i = 0; i < TILE; ++i) {
      const double s = S[i * TILE + thread - TILE];
      sum += peer_weight(of, J + thread - TILE, I + i) * s * s;
    }
    of.similar[J + thread - TILE] += sum;
  }
}

// Scores, from the features of a group.
template <int TILE>
DEVICE void score(const Groups& p, int start, int size, const Members& of, double* scratch, float* similarity) {
  const auto rows = [&](int first) {
    const int left = size - first;
    return Rows{p.features + (start + first) * p.stride, p.stride, left < TILE ? left : TILE, p.d};
  };
  const int thread = threadIdx.x;
  for (int I = 0; I < size; I += TILE) {
    inner_products<TILE>(rows(I), rows(I), true, scratch);
    const int i = I + thread;
    if (thread < TILE && i < size) {
      // Squares of numbers that fp32 holds do not leave the range of float64. NaN is usable: it shows in the scores.
      const double square = scratch[thread * TILE + thread];
      const bool valid = p.valid == nullptr || p.valid[start + i] != 0;
      of.inverse_length[i] = square == 0 ? 0. : 1 / sqrt(square);
      of.weight[i] = valid && square != 0;
      of.r[i] = p.rewards[start + i];
      of.similar[i] = 0;
    }
  }
  __syncthreads();
  if (thread < kWarp) weigh(of, size);
  __syncthreads();
  for (int I = 0; I < size; I += TILE) {
    for (int J = I; J < size; J += TILE) {
      if (size > TILE) inner_products<TILE>(rows(I), rows(J), I == J, scratch);
      finish_tile<TILE>(of, size, I, J, scratch, similarity, p.m_max);
    }
  }
  __syncthreads();
  for (int i = thread; i < size; i += kThreads) {
    double total = 0;
    for (int j = 0; j < size; ++j) total += peer_weight(of, i, j);
    const double novel = 1 - of.similar[i] / total;
    of.nu[i] = !of.usable(i) || total == 0 ? 0. : novel < 0 ? 0. : sqrt(novel);
  }
  __syncthreads();
}

// By one warp.
DEVICE void shape_and_normalize(const Shaping& shaping, const Members& of, int start, int size, const Advantages& to) {
  const double low = least_of(size, [&](int i) { return of.usable(i) ? of.nu[i] : INFINITY; });
  const double high = largest_of(size, [&](int i) { return of.usable(i) ? of.nu[i] : -INFINITY; });
  const double lowest = least_of(size, [&](int i) { return of.usable(i) ? of.r[i] : INFINITY; });
  const double highest = largest_of(size, [&](int i) { return of.usable(i) ? of.r[i] : -INFINITY; });
  const double span = high - low;
  // False comparisons of NaN leave a group as one that is shaped: its rewards become NaN.
  const bool keep = span < shaping.min_range || span <= 0 || (shaping.drop_uniform && highest <= lowest);
  double* shaped = of.similar;
  for (int i = threadIdx.x; i < size; i += kWarp) {
    const double r = of.r[i], nubar = (of.nu[i] - low) / span;
    double x = nubar;
    if (shaping.rule == Rule::centered) x = 2 * nubar - 1;
    if (shaping.rule == Rule::literal) x = nubar * r;
    x = r * (1 + shaping.strength * x);
    const double bound = fabs(r) > shaping.clip ? fabs(r) : shaping.clip;
    if (x > bound) x = bound;
    if (x < -bound) x = -bound;
    shaped[i] = keep || !of.usable(i) ? r : x;
  }
  __syncwarp();
  // Relative to the first response, equal rewards centre to exactly 0 whatever their value.
  const double first = shaped[0], mean = sum_over(size, [&](int i) { return shaped[i] - first; }) / size;
  const auto centered = [&](int i) { return shaped[i] - first - mean; };
  const double variance = sum_over(size, [&](int i) { return centered(i) * centered(i); }) / size;
  const double factor = shaping.by_std ? 1 / sqrt(variance + 1e-6) : 1.;
  for (int i = threadIdx.x; i < size; i += kWarp) {
    to.advantages[start + i] = float(centered(i) * factor);
    to.shaped_rewards[start + i] = float(shaped[i]);
    to.scores[start + i] = float(of.nu[i]);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    group_kernel(const __grid_constant__ Groups p, const __grid_constant__ Shaping shaping,
                 const __grid_constant__ Advantages to) {
  SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  const int g = blockIdx.x, start = p.cu_groups[g], size = p.cu_groups[g + 1] - start;
  float* similarity = to.similarity + int64_t(g) * p.m_max * p.m_max;
  for (int at = threadIdx.x; at < p.m_max * p.m_max; at += kThreads) {
    if (at / p.m_max >= size || at % p.m_max >= size) similarity[at] = 0.f;
  }
  if (size <= 0) return;
  const Members of(scratch + kScratch, p.m_max);
  // By the group's own size, not by the batch's largest.
  if (size <= kSmall) {
    score<kSmall>(p, start, size, of, scratch, similarity);
  } else {
    score<kLarge>(p, start, size, of, scratch, similarity);
  }
  if (threadIdx.x < kWarp) shape_and_normalize(shaping, of, start, size, to);
}

int shared_bytes(int m) { return kScratch * int(sizeof(double)) + m * Members::kBytes + int(sizeof(double)); }

}  // namespace

// By the 99 KiB that a block has on the smallest of chips since sm_80.
int most_members() { return ((99 << 10) - shared_bytes(0)) / Members::kBytes; }

int g2rl_advantages(const Groups& groups, const Shaping& shaping, const Advantages& to, Stream stream) {
  return launch({groups.G, kThreads, shared_bytes(groups.m_max)}, stream, group_kernel, groups, shaping, to);
}

}  // namespace g2rl::cuda
