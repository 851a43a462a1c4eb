// Features from residuals, what both generations of kernels share.
//
//   features[b] = logit_scale * (R[b] * inverse[b]) W          [B, V] x [V, d] -> [B, d]
//
// R stays fp32: for weights of 16 bits an entry is split into terms of 16 bits, each of which meets W on tensor cores.
// These truncate what they add up, so sums over 64 words start from 0 and are added up in fp32, rounded.
// Parts of the vocabulary are fixed and joined by a second kernel in order: no atomics.
#pragma once

#include "head.h"

namespace g2rl::cuda {

constexpr int kWordsOfPart = 1536;
HOST_DEVICE int projection_parts(int V) { return int(ceil_div(V, kWordsOfPart)); }

// How a number is split: for bf16 weights into three terms of 8 bits each, for fp16 into two of 11 bits.
template <class T>
struct Split;
template <>
struct Split<bf16> {
  static constexpr int kTerms = 3;
  static constexpr float kRange = 1.f, kDigits = 1.f;
};
template <>
struct Split<fp16> {
  // R * inverse lies in [-1, 1], with many entries around 1 / V. The second term is kept kDigits times too large.
  static constexpr int kTerms = 2;
  static constexpr float kRange = 0x1p15f, kDigits = 0x1p11f;
};

// Terms of two neighbours, which are kRange times too large already.
template <class T>
DEVICE void split(float (&x)[2], uint32_t (&terms)[Split<T>::kTerms]) {
  UNROLL for (int term = 0; term < Split<T>::kTerms; ++term) {
    terms[term] = round_pair<T>(x[0], x[1]);
    UNROLL for (int e = 0; e < 2; ++e) x[e] = (x[e] - number_of_pair<T>(terms[term], e)) * Split<T>::kDigits;
  }
}

// features [B, d] = logit_scale * sum of partials [parts, B, d].
int join_parts(const float* partials, int parts, int64_t count, float logit_scale, float* features, Stream stream);

}  // namespace g2rl::cuda
