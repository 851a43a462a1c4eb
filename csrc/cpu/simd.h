// Sixteen floats at a time: one register of 512 bits, two of 256, or four. Included only by rowwise_impl.h, which is
// compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_FMA)
#include <arm_neon.h>
#endif

#include "rowwise.h"

#define G2RL_ALWAYS_INLINE __attribute__((always_inline))

namespace g2rl {
namespace {

// Lanes of one register.
#if defined(__AVX512F__)
constexpr int kVector = 16;
#elif defined(__AVX2__)
constexpr int kVector = 8;
#else
constexpr int kVector = 4;
#endif
constexpr int kVectors = kLanes / kVector;

using Vector = float __attribute__((vector_size(kVector * 4)));
using VectorInts = int32_t __attribute__((vector_size(kVector * 4)));
using VectorBits = uint32_t __attribute__((vector_size(kVector * 4)));
using VectorHalves = uint16_t __attribute__((vector_size(kVector * 2)));

// Calls f(0), ..., f(n - 1). A loop would be unrolled too late for GCC to keep arrays of registers in registers.
template <int n, typename F>
G2RL_ALWAYS_INLINE inline void unrolled(const F& f) {
  if constexpr (n > 0) {
    unrolled<n - 1>(f);
    f(n - 1);
  }
}

template <typename To>
G2RL_ALWAYS_INLINE inline To read(const void* p) {
  To x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

template <typename T>
G2RL_ALWAYS_INLINE inline void write(void* p, T x) {
  std::memcpy(p, &x, sizeof(x));
}

// Not one vector_size(64): GCC takes comparisons of vectors wider than a register apart, lane by lane.
struct f32x16 {
  Vector r[kVectors];

  f32x16() = default;
  f32x16(float x) {
    // Folded to a broadcast; x + 0 would not be, since it is 0 for x = -0.
    unrolled<kVectors>([&](int i) G2RL_ALWAYS_INLINE { r[i] = x - Vector{}; });
  }
  f32x16& operator+=(f32x16 b);
  f32x16& operator*=(f32x16 b);
};

// One register after the other.
template <typename F>
G2RL_ALWAYS_INLINE inline f32x16 each(const F& f) {
  f32x16 out;
  unrolled<kVectors>([&](int i) G2RL_ALWAYS_INLINE { out.r[i] = f(i); });
  return out;
}

inline f32x16 operator+(f32x16 a, f32x16 b) {
  return each([&](int i) G2RL_ALWAYS_INLINE { return a.r[i] + b.r[i]; });
}
inline f32x16 operator-(f32x16 a, f32x16 b) {
  return each([&](int i) G2RL_ALWAYS_INLINE { return a.r[i] - b.r[i]; });
}
inline f32x16 operator*(f32x16 a, f32x16 b) {
  return each([&](int i) G2RL_ALWAYS_INLINE { return a.r[i] * b.r[i]; });
}
inline f32x16 operator/(f32x16 a, f32x16 b) {
  return each([&](int i) G2RL_ALWAYS_INLINE { return a.r[i] / b.r[i]; });
}
inline f32x16 operator-(f32x16 a) {
  return each([&](int i) G2RL_ALWAYS_INLINE { return -a.r[i]; });
}
inline f32x16& f32x16::operator+=(f32x16 b) { return *this = *this + b; }
inline f32x16& f32x16::operator*=(f32x16 b) { return *this = *this * b; }

inline f32x16 splat(float x) { return x; }

inline f32x16 load(const float* p) {
  return each([&](int i) G2RL_ALWAYS_INLINE { return read<Vector>(p + i * kVector); });
}

inline void store(float* p, f32x16 v) {
  unrolled<kVectors>([&](int i) G2RL_ALWAYS_INLINE { write(p + i * kVector, v.r[i]); });
}

inline f32x16 load_u16(const uint16_t* p) {
  return each([&](int i) G2RL_ALWAYS_INLINE {
    const auto v = read<VectorHalves>(p + i * kVector);
    return __builtin_convertvector(__builtin_convertvector(v, VectorInts), Vector);
  });
}

// The low 16 bits of every lane.
inline void store_low16(uint16_t* p, f32x16 v) {
  unrolled<kVectors>([&](int i) G2RL_ALWAYS_INLINE {
    write(p + i * kVector, __builtin_convertvector((VectorBits)v.r[i], VectorHalves));
  });
}

// Of max and min: where one of two numbers is NaN, b.
inline Vector max(Vector a, Vector b) {
#if defined(__AVX512F__)
  return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

inline Vector min(Vector a, Vector b) {
#if defined(__AVX512F__)
  return (Vector)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

// a b + c, rounded once where the instruction set has that. Said outright where results depend on it: compilers fuse
// only when they optimize, and the same formula in two places not always alike.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_FEATURE_FMA)
  return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 c) {
  return each([&](int i) G2RL_ALWAYS_INLINE { return multiply_add(a.r[i], b.r[i], c.r[i]); });
}

inline f32x16 max(f32x16 a, f32x16 b) {
  return each([&](int i) G2RL_ALWAYS_INLINE { return max(a.r[i], b.r[i]); });
}

inline f32x16 min(f32x16 a, f32x16 b) {
  return each([&](int i) G2RL_ALWAYS_INLINE { return min(a.r[i], b.r[i]); });
}

inline f32x16 abs(f32x16 a) {
  return each([&](int i) G2RL_ALWAYS_INLINE { return (Vector)((VectorInts)a.r[i] & 0x7fffffff); });
}

// `a` where `x` is a number, elsewhere NaN.
inline f32x16 unless_nan(f32x16 a, f32x16 x) {
  return each([&](int i) G2RL_ALWAYS_INLINE { return x.r[i] == x.r[i] ? a.r[i] : x.r[i]; });
}

// Magnitude of `a`, sign of `s`.
inline f32x16 copysign(f32x16 a, f32x16 s) {
  return each([&](int i) G2RL_ALWAYS_INLINE {
    return (Vector)(((VectorInts)a.r[i] & 0x7fffffff) | ((VectorInts)s.r[i] & (int32_t)0x80000000));
  });
}

// Halving tree: the same order of additions on every target.
inline float sum(f32x16 v) {
  float x[kLanes];
  store(x, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

inline float max_lane(f32x16 v) {
  Vector most = v.r[0];
  for (int i = 1; i < kVectors; ++i) most = max(most, v.r[i]);
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)most);
#else
  float m = most[0];
  for (int i = 1; i < kVector; ++i) m = most[i] > m ? most[i] : m;
  return m;
#endif
}

inline bool any_above(f32x16 v, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v.r[0], _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#else
  return max_lane(v) > limit;
#endif
}

// exp(x) for x <= 88, relative error below 1.3e-7 + 3e-9 |x|. Arguments under -87.3 (the mask, -inf, included)
// give 1.2e-38, which no sum of exponentials here can see: a result of zero would need a further instruction, a
// subnormal one a slow path of the processor. What is multiplied by one must not be as large as the distance to a mask.
constexpr float kExpMin = -87.3f;

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits

// kExpMin <= x <= 88; any bits for NaN.
inline f32x16 exp_in_range(f32x16 x) {
  constexpr float kLog2e = 1.44269504088896341f;
  const f32x16 shifted = multiply_add(x, kLog2e, kRound);
  const f32x16 n = shifted - kRound;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const f32x16 r = multiply_add(n, -0.693147180559945286f, x);  // one rounding; ln 2 itself is off by 2e-9 per n
#else
  const f32x16 r = (x - n * 0.693359375f) - n * -2.12194440054690583e-4f;  // n times 9 bits is exact
#endif
  f32x16 p = multiply_add(r, 1.3836794532e-3f, 8.3748567849e-3f);  // minimax of relative error, 1.9e-9 before rounding
  p = multiply_add(p, r, 4.1668228805e-2f);
  p = multiply_add(p, r, 1.6666419804e-1f);
  p = multiply_add(p, r, 4.9999991059e-1f);
  p = multiply_add(p, r, 1.0f);
  p = multiply_add(p, r, 1.0f);
  return each([&](int i)
                  G2RL_ALWAYS_INLINE { return (Vector)((VectorBits)p.r[i] + ((VectorBits)shifted.r[i] << 23)); });
}

inline f32x16 exp(f32x16 x) { return exp_in_range(max(splat(kExpMin), x)); }

}  // namespace
}  // namespace g2rl
