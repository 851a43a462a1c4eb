// Features from residuals (projection.h) by mma.sync, for fp32 weights by FMA: any stride, any alignment.
#include "choices.h"
#include "projection.h"
#include "sm80.h"

namespace g2rl::cuda::sm80 {

namespace {

constexpr int kDepth = 64;                       // words at a time
constexpr int kResponses = 64, kFeatures = 128;  // a tile of them is a block's
constexpr int kThreads = 256;
constexpr int kStages = 3;

struct Arguments {
  Head head;
  const float *R, *inverse;
  int B;
  float* partials;
};

// A block's work: rows `b` on of R, columns `k` on of W, words `v` to `end`.
struct Work {
  int part, b, k, v, end;

  DEVICE explicit Work(const Arguments& p) {
    const int b_tiles = int(ceil_div(p.B, kResponses)), d_tiles = int(ceil_div(p.head.d, kFeatures));
    // Neighbours share a part of R, or of W, and find it in L2.
    const int index = blockIdx.x;
    b = index % b_tiles * kResponses;
    k = index / b_tiles % d_tiles * kFeatures;
    part = index / b_tiles / d_tiles;
    v = part * kWordsOfPart;
    end = v + kWordsOfPart < p.head.V ? v + kWordsOfPart : p.head.V;
  }
};

// The second term of fp16, which is smaller than it looks, has a chain of sums of its own.
template <class T>
constexpr int kChains = Split<T>::kDigits == 1.f ? 1 : Split<T>::kTerms;

// A tile of R: each thread has two neighbouring words of eight responses.
constexpr int kPairs = kResponses * kDepth / 2 / kThreads;

DEVICE void load_residuals(const Arguments& p, const Work& work, int v0, float (&x)[kPairs][2]) {
  const int v = v0 + 2 * (threadIdx.x % kWarp);
  int b = work.b + threadIdx.x / kWarp;
  const float* at = p.R + int64_t(b) * p.head.V + v;
  UNROLL for (int i = 0; i < kPairs; ++i) {
    UNROLL for (int e = 0; e < 2; ++e) x[i][e] = b < p.B && v + e < work.end ? at[e] : 0.f;
    b += kThreads / kWarp;
    at += int64_t(kThreads / kWarp) * p.head.V;
  }
}

// Tiles of 16-bit terms in shared memory, one after another, rows of 128 bytes.
constexpr int kTermBytes = kResponses * kDepth * 2;

template <class T>
DEVICE void store_terms(const float (&x)[kPairs][2], const float* factors, uint8_t* terms) {
  UNROLL for (int i = 0; i < kPairs; ++i) {
    const int row = threadIdx.x / kWarp + i * (kThreads / kWarp), byte = threadIdx.x % kWarp * 4;
    uint8_t* to = terms + swizzled(row, byte / 16) + byte % 16;
    const float factor = factors[row];
    float scaled[2] = {x[i][0] * factor, x[i][1] * factor};
    uint32_t pairs[Split<T>::kTerms];
    split<T>(scaled, pairs);
    UNROLL for (int term = 0; term < Split<T>::kTerms; ++term) {
      *reinterpret_cast<uint32_t*>(to + term * kTermBytes) = pairs[term];
    }
  }
}

// A stage holds rows of W, one a word, of 256 bytes.
constexpr int kStageBytes = kDepth * kFeatures * 2;

template <class T, bool ALIGNED>
DEVICE void load_weight(const Arguments& p, const Work& work, int v0, uint8_t* stage) {
  constexpr int kChunks = kFeatures / 8, kRows = kThreads / kChunks;
  const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks, k = work.k + 8 * chunk;
  const T* from = static_cast<const T*>(p.head.weight) + (v0 + first) * p.head.stride + k;
  UNROLL for (int row = first; row < first + kDepth; row += kRows) {
    // Beyond the vocabulary W counts as 0: 0 * NaN would be NaN.
    const int count = v0 + row < work.end ? p.head.d - k : 0;
    copy_chunk<T, ALIGNED>(stage + swizzled<2 * kFeatures>(row, chunk), from, count);
    from += kRows * p.head.stride;
  }
}

// Warps: four along responses, two along features, of 16 x 64 sums each. Eight columns are four sums of a thread.
constexpr int kColumns = 64, kSums = kColumns / 2;

template <class T>
DEVICE void multiply_step(const uint8_t* terms, const uint8_t* stage, float (&sums)[kSums]) {
  constexpr int kTerms = Split<T>::kTerms;
  // As many columns at a time as leave registers for two blocks a multiprocessor.
  constexpr int kAtOnce = kColumns / kChains<T>, kChain = kSums / kChains<T>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, row = warp / 2 * 16;
  UNROLL for (int part = 0; part < kChains<T>; ++part) {
    const int column = warp % 2 * kColumns + part * kAtOnce;
    float chains[kChains<T>][kChain] = {};
    // Unrolled, it would keep the addresses of all its steps in registers.
    UNROLL_1 for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[kTerms][4];
      UNROLL for (int term = 0; term < kTerms; ++term) {
        load_matrices(terms + term * kTermBytes + swizzled(row + lane % 16, k / 8 + lane / 16), a[term]);
      }
      UNROLL for (int j = 0; j < kAtOnce / 16; ++j) {
        uint32_t b[4];
        load_matrices_transposed(stage + swizzled<2 * kFeatures>(k + lane % 16, column / 8 + 2 * j + lane / 16), b);
        // Small terms first.
        UNROLL for (int term = kTerms - 1; term >= 0; --term) {
          float* chain = chains[kChains<T> == 1 ? 0 : term];
          multiply(T{}, chain + 8 * j, a[term], b[0], b[1]);
          multiply(T{}, chain + 8 * j + 4, a[term], b[2], b[3]);
        }
      }
    }
    UNROLL for (int i = 0; i < kChain; ++i) {
      const float small = kChains<T> == 1 ? 0.f : chains[kChains<T> - 1][i] / Split<T>::kDigits;
      sums[part * kChain + i] += chains[0][i] + small;
    }
  }
}

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, 2) projection_kernel(const __grid_constant__ Arguments p) {
  SHARED(shared);
  uint8_t* terms = shared + kStages * kStageBytes;
  const Work work(p);
  float* factors = reinterpret_cast<float*>(terms + Split<T>::kTerms * kTermBytes);
  if (threadIdx.x < kResponses) {
    const int b = work.b + threadIdx.x;
    factors[threadIdx.x] = b < p.B ? p.inverse[b] * Split<T>::kRange : 0.f;
  }
  float x[kPairs][2], sums[kSums] = {};
  load_residuals(p, work, work.v, x);
  UNROLL for (int s = 0; s < kStages - 1; ++s) {
    load_weight<T, ALIGNED>(p, work, work.v + s * kDepth, shared + s * kStageBytes);
    copy_commit();
  }
  int stage = 0;
  for (int v = work.v; v < work.end; v += kDepth) {
    __syncthreads();  // nobody reads the last step's terms and stage
    store_terms<T>(x, factors, terms);
    copy_wait<kStages - 2>();
    __syncthreads();
    const int ahead = stage == 0 ? kStages - 1 : stage - 1;
    load_weight<T, ALIGNED>(p, work, v + (kStages - 1) * kDepth, shared + ahead * kStageBytes);
    copy_commit();
    load_residuals(p, work, v + kDepth, x);
    multiply_step<T>(terms, shared + stage * kStageBytes, sums);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  copy_wait<0>();

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  UNROLL for (int i = 0; i < kSums; ++i) {
    const int b = work.b + warp / 2 * 16 + lane / 4 + i / 2 % 2 * 8;
    const int k = work.k + warp % 2 * kColumns + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (b < p.B && k < p.head.d) {
      p.partials[(int64_t(work.part) * p.B + b) * p.head.d + k] = sums[i] / Split<T>::kRange;
    }
  }
}

// fp32 weights. A thread has one column of features and half of the responses.
constexpr int kRowsOfThread = kResponses * kFeatures / kThreads;
// Of a word's residuals in shared memory: in rows of 64 the words of a warp would all be in one bank.
constexpr int kStride = kResponses + 4;
constexpr int kAtOnce = 8;  // entries of W on their way; more would leave registers for one block a multiprocessor

__global__ void __launch_bounds__(kThreads) fp32_projection_kernel(const __grid_constant__ Arguments p) {
  SHARED(shared);
  float* residuals = reinterpret_cast<float*>(shared);  // [kDepth, kStride]
  const Work work(p);
  const int k = work.k + threadIdx.x % kFeatures, row = threadIdx.x / kFeatures * kRowsOfThread;
  const float* weight = static_cast<const float*>(p.head.weight) + k;
  float sums[kRowsOfThread] = {};
  for (int v0 = work.v; v0 < work.end; v0 += kDepth) {
    __syncthreads();
    for (int at = threadIdx.x; at < kDepth * kResponses; at += kThreads) {
      const int v = v0 + at % kDepth, b = work.b + at / kDepth;
      const bool inside = v < work.end && b < p.B;
      residuals[at % kDepth * kStride + at / kDepth] = inside ? p.R[int64_t(b) * p.head.V + v] * p.inverse[b] : 0.f;
    }
    __syncthreads();
    // Steps start from 0, so that long sums round less.
    float step[kRowsOfThread] = {};
    const int count = work.end - v0 < kDepth ? work.end - v0 : kDepth;
    for (int i0 = 0; i0 < count; i0 += kAtOnce) {
      float w[kAtOnce];
      UNROLL for (int i = 0; i < kAtOnce; ++i) {
        w[i] = k < p.head.d && i0 + i < count ? weight[(v0 + i0 + i) * p.head.stride] : 0.f;
      }
      // Residuals beyond the vocabulary are 0.
      UNROLL for (int i = 0; i < kAtOnce; ++i) {
        UNROLL for (int r = 0; r < kRowsOfThread; ++r) {
          step[r] = fmaf(residuals[(i0 + i) * kStride + row + r], w[i], step[r]);
        }
      }
    }
    UNROLL for (int r = 0; r < kRowsOfThread; ++r) sums[r] += step[r];
  }
  UNROLL for (int r = 0; r < kRowsOfThread; ++r) {
    const int b = work.b + row + r;
    if (b < p.B && k < p.head.d) p.partials[(int64_t(work.part) * p.B + b) * p.head.d + k] = sums[r];
  }
}

}  // namespace

int64_t projection_bytes(const Head& head, int B) {
  return int64_t(projection_parts(head.V)) * B * head.d * sizeof(float);
}

int project(const Head& head, const float* R, const float* inverse, int B, float logit_scale, void* memory,
            float* features, Stream stream) {
  const Arguments p{head, R, inverse, B, static_cast<float*>(memory)};
  const int parts = projection_parts(head.V);
  const int64_t blocks = parts * ceil_div(B, kResponses) * ceil_div(head.d, kFeatures);
  const int error = choose(head.dtype, [&](auto number) {
    using T = decltype(number);
    if constexpr (std::is_same_v<T, float>) {
      return launch({blocks, kThreads, kDepth * kStride * 4}, stream, fp32_projection_kernel, p);
    } else {
      const int shared = kStages * kStageBytes + Split<T>::kTerms * kTermBytes + kResponses * int(sizeof(float));
      const bool aligned = head.stride % 8 == 0 && reinterpret_cast<uintptr_t>(head.weight) % 16 == 0;
      return choose(aligned, [&](auto aligned) {
        return launch({blocks, kThreads, shared}, stream, projection_kernel<T, aligned>, p);
      });
    }
  });
  return error ? error : join_parts(p.partials, parts, int64_t(B) * head.d, logit_scale, features, stream);
}

}  // namespace g2rl::cuda::sm80
