// Sixteen floats at a time, in plain GCC/Clang vector extensions: one 512-bit register, two of 256 bits, or whatever
// the target has. Included only by rowwise_impl.h, which is compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "rowwise.h"

#define G2RL_ALWAYS_INLINE __attribute__((always_inline))

namespace g2rl {
namespace {

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));

inline f32x16 load(const float* p) {
  f32x16 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof(v)); }

using u16x16 = uint16_t __attribute__((vector_size(32)));

inline f32x16 load_u16(const uint16_t* p) {
  u16x16 v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(__builtin_convertvector(v, i32x16), f32x16);
}

// The low 16 bits of every lane.
inline void store_low16(uint16_t* p, f32x16 v) {
  const u16x16 low = __builtin_convertvector((u32x16)v, u16x16);
  std::memcpy(p, &low, sizeof(low));
}

inline f32x16 splat(float x) { return f32x16{} + x; }

inline f32x16 max(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

inline f32x16 min(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

inline f32x16 abs(f32x16 a) { return (f32x16)((i32x16)a & 0x7fffffff); }

// Magnitude of `a`, sign of `s`.
inline f32x16 copysign(f32x16 a, f32x16 s) {
  return (f32x16)(((i32x16)a & 0x7fffffff) | ((i32x16)s & (int32_t)0x80000000));
}

// Halving tree: the same order of additions on every target.
inline float sum(f32x16 v) {
  float x[kLanes];
  std::memcpy(x, &v, sizeof(x));
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

inline float max_lane(f32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

inline bool any_above(f32x16 v, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#else
  return max_lane(v) > limit;
#endif
}

// exp(x) for x <= 88, relative error below 1.3e-7 + 3e-9 |x|. Arguments under -87.3 (the mask, -inf, included)
// give 1.2e-38, which no sum here can see: a result of zero would need a further instruction, a subnormal one a slow
// path of the processor.
constexpr float kExpMin = -87.3f;

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits

// kExpMin <= x <= 88
inline f32x16 exp_in_range(f32x16 x) {
  constexpr float kLog2e = 1.44269504088896341f;
  const f32x16 shifted = x * kLog2e + kRound;
  const f32x16 n = shifted - kRound;
#if defined(__FMA__)
  const f32x16 r = x - n * 0.693147180559945286f;  // one rounding; ln 2 itself is off by 2e-9 per n
#else
  const f32x16 r = (x - n * 0.693359375f) - n * -2.12194440054690583e-4f;  // n times 9 bits is exact
#endif
  f32x16 p = r * 1.3836794532e-3f + 8.3748567849e-3f;  // minimax of relative error, 1.9e-9 before rounding
  p = p * r + 4.1668228805e-2f;
  p = p * r + 1.6666419804e-1f;
  p = p * r + 4.9999991059e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (f32x16)((u32x16)p + ((u32x16)shifted << 23));
}

inline f32x16 exp(f32x16 x) { return exp_in_range(max(x, splat(kExpMin))); }

}  // namespace
}  // namespace g2rl
