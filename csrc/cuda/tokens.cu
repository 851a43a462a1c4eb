// What follows a product: a token's sums become its results and its terms, responses get their weight, and residuals
// are added up from logits that were kept. Symbols as in head.h.
#include <algorithm>

#include "choices.h"
#include "options.h"

namespace g2rl::cuda {

namespace {

// ---- merge ----
//
// With m the largest t of a token (or the given lse), S_rest and X_rest sums over v != y, and S = S_rest + e_y:
//
//   log p_y = -log1p(S_rest / e_y)   where e_y > S_rest, else ln 2 (t_y - m) - ln S
//   H       = (S_rest ln S - ln 2 X_rest - e_y log p_y) / S
//   lse     = ln 2 m + ln S
//
// A block has 32 tokens, one a lane. Its warps share the parts, whose sums are joined in the order of warps.

constexpr int kMergeWarps = 8;

struct MergeArguments {
  Head head;
  Partials partials;
  int N;
  const float *lse, *a;
  float* results;
  int64_t stride;
  Terms terms;
};

template <class F>
DEVICE float across_warps(float value, F combine) {
  SHARED(shared);
  float* of_threads = reinterpret_cast<float*>(shared);
  of_threads[threadIdx.x] = value;
  __syncthreads();
  float total = of_threads[threadIdx.x % kWarp];
  UNROLL for (int w = 1; w < kMergeWarps; ++w) total = combine(total, of_threads[w * kWarp + threadIdx.x % kWarp]);
  __syncthreads();
  return total;
}

constexpr float kLeastSum = 1e-30f, kMostLeft = 16.f;

template <bool SOFTCAP>
DEVICE void write_token(const MergeArguments& p, int n, float m, bool likeliest, float z_y, float S_rest,
                        float X_rest) {
  float slope, x_y = exponent_above<SOFTCAP>(m, z_y, Options(p.head), slope);
  // What the rounding of m has left of it: near 1e10 hundreds.
  if (likeliest) x_y = x_y > kMostLeft ? kMostLeft : x_y < -kMostLeft ? -kMostLeft : x_y;
  const float e_y = exp2_fast(x_y);
  float S = S_rest + e_y;
  // No exponential is left where the maximum was rounded up by hundreds, beside which its logarithm is nothing.
  if (p.lse == nullptr && S < kLeastSum) S = kLeastSum;
  // False for NaN, which the logarithm of S carries on.
  const bool confident = e_y > S_rest;
  float log_p, log_S;
  if (confident) {
    log_p = -log1p_of_ratio(S_rest / e_y);
    log_S = fmaf(x_y, kLn2, -log_p);
  } else {
    log_S = logf(S);
    log_p = fmaf(x_y, kLn2, -log_S);
  }
  p.results[n] = log_p;
  p.results[p.stride + n] = (S_rest * log_S - X_rest * kLn2 - e_y * log_p) / S;
  p.results[2 * p.stride + n] = fmaf(m, kLn2, log_S);
  if (p.a == nullptr) return;
  p.terms.shift[n] = m;
  // A token's residuals must add up to 0: near S = 1 a quotient's rounding has one sign, and another quotient's
  // another.
  const float weight = p.a[n] / S;
  p.terms.weight[n] = weight;
  p.terms.target[n] = weight * S_rest * slope;
  p.terms.S[n] = S;
  if (p.lse == nullptr) return;
  p.terms.rest[n] = fmaf(p.a[n] * slope, S_rest, -residual_of_target(p.a[n], slope, e_y));
}

template <bool SOFTCAP>
__global__ void __launch_bounds__(kMergeWarps* kWarp) merge_kernel(const __grid_constant__ MergeArguments p) {
  const int n = blockIdx.x * kWarp + threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t N = p.N, plane = N * p.partials.splits;
  const int parts = n < p.N ? p.partials.splits : 0;
  const float* of_token = p.partials.planes + n;

  float z_y = 0.f, m = kNoMaximum;
  bool likeliest = false;
  for (int s = warp; s < parts && p.lse == nullptr; s += kMergeWarps) {
    z_y += of_token[3 * plane + s * N];
    m = fmaxf(m, of_token[s * N]);  // NaN is no maximum, but shows in S
  }
  if (p.lse != nullptr && n < p.N && warp == 0) z_y = of_token[0];
  z_y = across_warps(z_y, [](float x, float y) { return x + y; });
  if (p.lse == nullptr) {
    float slope;
    const Options options(p.head);
    const float t_y = capped<SOFTCAP>(z_y, options, slope) * options.scale;
    m = fmaxf(across_warps(m, fmaxf), t_y);
    likeliest = m == t_y;
  } else if (n < p.N) {
    m = p.lse[n] * kLog2e;
  }

  float S = 0.f, X = 0.f;
  for (int s = warp; s < parts; s += kMergeWarps) {
    const float S_s = of_token[plane + s * N], X_s = of_token[2 * plane + s * N];
    if (p.lse == nullptr) {
      // Parts without words but the target have S = X = 0 and a large `moved`, but a finite one.
      const float moved = of_token[s * N] - m, factor = exp2_fast(moved);
      S = fmaf(S_s, factor, S);
      X = fmaf(fmaf(S_s, moved, X_s), factor, X);
    } else {
      S += S_s;
      X += X_s;
    }
  }
  S = across_warps(S, [](float x, float y) { return x + y; });
  X = across_warps(X, [](float x, float y) { return x + y; });
  if (n < p.N && warp == 0) write_token<SOFTCAP>(p, n, m, likeliest, z_y, S, X);
}

// ---- responses ----

constexpr int kResponseThreads = 128;

DEVICE float half_ulp(float x) { return from_bits(to_bits(x) & 0x7f800000) * 0x1p-24f; }

// How far from 1 the sum S may be that was made with an lse in fp32 as its shift: by the rounding of lse, by that of
// the shift in units of log 2, and by that of S. Features are then off by as much, and 1e-5 is what they may be.
DEVICE float tolerance(float lse) { return fminf(half_ulp(lse) + kLn2 * half_ulp(lse * kLog2e) + 1e-6f, 9e-6f); }

__global__ void __launch_bounds__(kResponseThreads)
    responses_kernel(const int* cu_seqlens, const float* a, const float* S, const float* lse, float* inverse,
                     int* flags) {
  SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  int* marks = reinterpret_cast<int*>(sums + kResponseThreads);
  const int b = blockIdx.x, thread = threadIdx.x;
  float sum = 0.f;
  bool off = false;
  for (int n = cu_seqlens[b] + thread; n < cu_seqlens[b + 1]; n += kResponseThreads) {
    sum += a[n];
    off |= a[n] > 0.f && !(fabsf(S[n] - 1.f) <= tolerance(lse[n]));
  }
  sums[thread] = sum;
  marks[thread] = off;
  for (int half = kResponseThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      sums[thread] += sums[thread + half];
      marks[thread] |= marks[thread + half];
    }
  }
  if (thread > 0) return;
  inverse[b] = sums[0] == 0.f ? 0.f : 1.f / sums[0];
  flags[b] = marks[0];
}

// ---- residuals from what a chunk of tokens has left ----
//
// A block owns a response and the words of its threads, eight or four each, and adds tokens one by one, so that chunks
// can end anywhere without changing a bit. Eight rows are on their way at a time.

constexpr int kKeptThreads = 96;
constexpr int kKeptTokens = kKeptThreads;  // whose terms are in shared memory
constexpr int kAhead = 8;

struct KeptArguments {
  Head head;
  Kept kept;
  const int64_t* targets;
  const int* cu_seqlens;
  Terms terms;
  Carry carry;
  int first, last;
  float* R;
};

struct TokenTerms {
  float shift, weight, target;
  int y;
};

// Raw logits of four words of a token.
template <bool SOFTCAP>
struct KeptLogits {
  static constexpr int kWords = 4;
  float4 z;

  static DEVICE int word(int thread, int i) { return kWords * thread + i; }
  static DEVICE KeptLogits read(const KeptArguments&, const uint8_t* row, int thread) {
    return {load_once(reinterpret_cast<const float4*>(row) + thread)};
  }
  DEVICE void subtract(const TokenTerms& token, const Options& options, float (&r)[kWords]) const {
    const float of_words[4] = {z.x, z.y, z.z, z.w};
    UNROLL for (int i = 0; i < kWords; ++i) {
      float slope;
      const float e = exp2_fast(exponent_above<SOFTCAP>(token.shift, of_words[i], options, slope));
      r[i] = fmaf(-token.weight * slope, e, r[i]);
    }
  }
};

// Roots of eight.
struct KeptRoots {
  static constexpr int kWords = 8;
  uint4 roots;
  float reference;

  static DEVICE int word(int thread, int i) { return thread / 4 * 32 + i / 2 * 8 + thread % 4 * 2 + i % 2; }
  static DEVICE KeptRoots read(const KeptArguments& p, const uint8_t* row, int thread) {
    const float* references = reinterpret_cast<const float*>(row + bytes_of_roots(p.head.V, p.kept.roots_of));
    return {load_once(reinterpret_cast<const uint4*>(row) + thread), references[kWords * thread / p.kept.roots_of]};
  }
  DEVICE void subtract(const TokenTerms& token, const Options&, float (&r)[kWords]) const {
    const float factor = -token.weight * (kRootUnit * kRootUnit) * exp2_fast(reference - token.shift);
    const uint32_t pairs[4] = {roots.x, roots.y, roots.z, roots.w};
    UNROLL for (int i = 0; i < kWords; ++i) {
      // A number of 16 bits under the exponent of 2^23 is itself above 2^23.
      const uint32_t bits = i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffff;
      const float root = from_bits(0x4b000000 | bits) - 0x1p23f;
      r[i] = fmaf(factor * root, root, r[i]);
    }
  }
};

// The target's residual takes the place of what others would add.
template <class Words>
DEVICE void add_token(const Words& words, const TokenTerms& token, int thread, const Options& options,
                      float (&r)[Words::kWords]) {
  constexpr int kNear = Words::kWords * 4;  // the words of four threads lie together
  if (unsigned(token.y - thread / 4 * kNear) >= kNear) {
    words.subtract(token, options, r);
    return;
  }
  float before[Words::kWords];
  UNROLL for (int i = 0; i < Words::kWords; ++i) before[i] = r[i];
  words.subtract(token, options, r);
  UNROLL for (int i = 0; i < Words::kWords; ++i) {
    if (Words::word(thread, i) == token.y) r[i] = before[i] + token.target;
  }
}

// A thread's, of [V].
template <class Words>
DEVICE void load_words(const float* from, int thread, int V, float (&r)[Words::kWords]) {
  UNROLL for (int i = 0; i < Words::kWords; ++i) {
    const int v = Words::word(thread, i);
    if (v < V) r[i] = from[v];
  }
}

template <class Words>
__global__ void __launch_bounds__(kKeptThreads) add_kept_kernel(const __grid_constant__ KeptArguments p) {
  SHARED(shared);
  TokenTerms* terms = reinterpret_cast<TokenTerms*>(shared);
  constexpr int kWords = Words::kWords;
  const int blocks = int(ceil_div(p.head.V, kWords * kKeptThreads));
  // Of all threads of a response. Those past the vocabulary read its first words, and store nothing.
  const int b = blockIdx.x / blocks, thread = blockIdx.x % blocks * kKeptThreads + threadIdx.x;
  const int reads = thread / 4 * 4 * kWords < p.head.V ? thread : 0;
  const int begin = p.cu_seqlens[b], start = begin > p.first ? begin : p.first;
  const int end = p.cu_seqlens[b + 1] < p.last ? p.cu_seqlens[b + 1] : p.last;
  if (start >= end) return;

  const Options options(p.head);
  for (int n = start, stop; n < end; n = stop) {
    const int of_segment = (n - begin) % kSegment;
    stop = end - n < kSegment - of_segment ? end : n + kSegment - of_segment;
    float r[kWords] = {};
    if (of_segment != 0) load_words<Words>(p.carry.from, thread, p.head.V, r);
    for (int n0 = n; n0 < stop; n0 += kKeptTokens) {
      const int count = stop - n0 < kKeptTokens ? stop - n0 : kKeptTokens;
      // Rows of `kept` and terms count from the chunk's first token.
      const int row = n0 - p.first;
      __syncthreads();
      if (int(threadIdx.x) < count) {
        const int t = row + threadIdx.x;
        const int y = int(p.targets[n0 + threadIdx.x]);
        terms[threadIdx.x] = {p.terms.shift[t], p.terms.weight[t], p.terms.target[t], y};
      }
      __syncthreads();
      const uint8_t* rows = static_cast<const uint8_t*>(p.kept.rows) + row * p.kept.stride;
      for (int t = 0; t < count; t += kAhead) {
        Words words[kAhead];
        UNROLL for (int i = 0; i < kAhead; ++i) {
          const int at = t + i < count ? t + i : count - 1;
          words[i] = Words::read(p, rows + at * p.kept.stride, reads);
        }
        UNROLL for (int i = 0; i < kAhead; ++i) {
          if (t + i < count) add_token(words[i], terms[t + i], thread, options, r);
        }
      }
    }
    const bool whole = stop == p.cu_seqlens[b + 1] || (stop - begin) % kSegment == 0;
    float* to = whole ? p.R + int64_t(b) * p.head.V : p.carry.to;
    float before[kWords] = {};
    if (whole) load_words<Words>(to, thread, p.head.V, before);
    UNROLL for (int i = 0; i < kWords; ++i) {
      const int v = Words::word(thread, i);
      if (v < p.head.V) to[v] = before[i] + r[i];
    }
  }
}

// ---- what a given lse leaves of targets' residuals ----
//
// Not divided by S, as the others' residuals are not: a token's residuals must add up to 0, or what all rows of the
// weight have in common stays behind, which can be far longer than the features.
//
// Every token compares its target with those of its response; the first of a kind adds the terms of all, in order. A
// response of 2^15 tokens needs fewer comparisons for that than a vocabulary would.

constexpr int kTargetThreads = 128;

struct TargetTerm {
  int y;
  float value;
};

__global__ void __launch_bounds__(kTargetThreads)
    add_targets_kernel(const int64_t* targets, const int* cu_seqlens, const float* rest, const int* flags, int V,
                       int blocks_of_response, float* R) {
  SHARED(shared);
  TargetTerm* others = reinterpret_cast<TargetTerm*>(shared);
  const int b = blockIdx.x / blocks_of_response, thread = threadIdx.x;
  const int start = cu_seqlens[b], length = cu_seqlens[b + 1] - start;
  if (flags[b] != 0) return;
  for (int t0 = blockIdx.x % blocks_of_response * kTargetThreads; t0 < length;
       t0 += blocks_of_response * kTargetThreads) {
    const int t = t0 + thread, y = t < length ? int(targets[start + t]) : -1;
    double sum = 0.;  // all of a sure token's residual comes here, and in fp32 thousands of them would lose digits
    bool first = t < length;
    for (int u0 = 0; u0 < length; u0 += kTargetThreads) {
      __syncthreads();
      const int n = start + u0 + thread;
      if (u0 + thread < length) others[thread] = {int(targets[n]), rest[n]};
      __syncthreads();
      const int count = length - u0 < kTargetThreads ? length - u0 : kTargetThreads;
      for (int i = 0; i < count; ++i) {
        if (others[i].y != y) continue;
        first &= u0 + i >= t;
        sum += others[i].value;
      }
    }
    if (first) R[int64_t(b) * V + y] = float(R[int64_t(b) * V + y] + sum);
  }
}

}  // namespace

int merge(const Head& head, const Partials& partials, int N, const float* lse, const float* a, float* results,
          int64_t stride, const Terms& terms, Stream stream) {
  const MergeArguments p{head, partials, N, lse, a, results, stride, terms};
  constexpr int kThreads = kMergeWarps * kWarp;
  return choose(head.softcap, [&](auto softcap) {
    return launch({ceil_div(N, kWarp), kThreads, kThreads * int(sizeof(float))}, stream, merge_kernel<softcap>, p);
  });
}

int responses(const Responses& responses, const float* a, const float* S, const float* lse, float* inverse, int* flags,
              Stream stream) {
  return launch({responses.B, kResponseThreads, 2 * kResponseThreads * int(sizeof(float))}, stream, responses_kernel,
                responses.cu_seqlens, a, S, lse, inverse, flags);
}

int add_kept(const Head& head, const Kept& kept, const int64_t* targets, const Responses& responses, const Terms& terms,
             const Carry& carry, int first, int last, float* R, Stream stream) {
  const KeptArguments p{head, kept, targets, responses.cu_seqlens, terms, carry, first, last, R};
  const auto launch_for = [&](auto words) {
    using Words = decltype(words);
    const int64_t blocks = responses.B * ceil_div(head.V, Words::kWords * kKeptThreads);
    return launch({blocks, kKeptThreads, kKeptTokens * int(sizeof(TokenTerms))}, stream, add_kept_kernel<Words>, p);
  };
  if (kept.roots_of) return launch_for(KeptRoots{});
  return choose(head.softcap, [&](auto softcap) { return launch_for(KeptLogits<softcap>{}); });
}

int add_targets(const int64_t* targets, int N, const Responses& responses, const Terms& terms, const int* flags, int V,
                float* R, Stream stream) {
  if (responses.B == 0) return 0;
  // A response's blocks: of long ones, whose comparisons grow with the square, as many as fill a large chip together.
  constexpr int kBlocks = 8 * 132;
  const int64_t filling = std::max<int64_t>(8, ceil_div(kBlocks, responses.B));
  const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(filling, ceil_div(N, kTargetThreads)));
  const Launch at{responses.B * blocks, kTargetThreads, kTargetThreads * int(sizeof(TargetTerm))};
  return launch(at, stream, add_targets_kernel, targets, responses.cu_seqlens, terms.rest, flags, V, int(blocks), R);
}

}  // namespace g2rl::cuda
