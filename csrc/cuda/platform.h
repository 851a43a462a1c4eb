// What kernels are written in: CUDA where nvcc compiles, C++ on a CPU elsewhere (on_cpu.h), with the same meaning.
//
// Rules that keep one source right on both: shared memory is dynamic (SHARED), grids and blocks have one dimension, and
// every launch goes through `launch`.
#pragma once

#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_runtime.h>
#else
#include "on_cpu.h"
#endif

#include <cstdint>
#include <type_traits>

namespace g2rl::cuda {

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define SHARED(name) extern __shared__ __align__(1024) uint8_t name[]
#define UNROLL _Pragma("unroll")
#define UNROLL_1 _Pragma("unroll 1")
using Stream = cudaStream_t;
#else
#define DEVICE inline
#define HOST_DEVICE inline
#define SHARED(name) uint8_t* name = on_cpu::shared()
#define UNROLL
#define UNROLL_1
using Stream = void*;
#endif

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = ~0u;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 16-bit numbers as memory holds them.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

HOST_DEVICE float from_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

HOST_DEVICE uint32_t to_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
#endif
}

// Of `low` and, above it, of `high`.
HOST_DEVICE uint32_t low_halves(uint32_t low, uint32_t high) {
#ifdef __CUDA_ARCH__
  return __byte_perm(low, high, 0x5410);  // one instruction, which the compiler does not find
#else
  return (low & 0xffff) | high << 16;
#endif
}

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return from_bits(uint32_t(x.bits) << 16); }
DEVICE float to_float(fp16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return from_bits(sign | to_bits(float(fraction) * 0x1p-24f));
  return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
#endif
}

// Rounded to the nearest, ties to even.
template <class T>
DEVICE T round_to(float x);
template <>
DEVICE float round_to<float>(float x) {
  return x;
}
template <>
DEVICE bf16 round_to<bf16>(float x) {
#ifdef __CUDA_ARCH__
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = to_bits(x);
  if (x != x) return {uint16_t(bits >> 16 | 64)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}
template <>
DEVICE fp16 round_to<fp16>(float x) {
#ifdef __CUDA_ARCH__
  fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (x != x) return {uint16_t(sign | 0x7e00)};
  if (size >= 65520.f) return {uint16_t(sign | 0x7c00)};
  // Below 2^-14 units are 2^-24; from there on one keeps eleven digits.
  if (size < 0x1p-14f) return {uint16_t(sign | uint32_t(std::nearbyint(size * 0x1p24f)))};
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return {uint16_t(sign | ((rounded >> 13) - (112 << 10)))};
#endif
}

// Two numbers, the first in the low half of a word.
template <class T>
DEVICE uint32_t round_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  // One instruction, F2FP. Alone, nvcc 13.0 rounds bf16 by F2F, which may have to share the pipe of exponentials.
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  return low_halves(round_to<T>(low).bits, round_to<T>(high).bits);
#endif
}
template <class T>
DEVICE float number_of_pair(uint32_t pair, int which) {
  return to_float(T{uint16_t(pair >> 16 * which)});
}

// 2^x, to two units in the last place; subnormal results are 0.
DEVICE float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// 1 / x, to one unit in the last place.
DEVICE float reciprocal_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}

// Of 2 HALF numbers keeps HALF, and adds to them those of the lane OTHER away, which keeps the others. Whether it kept
// the upper.
template <int HALF, int OTHER>
DEVICE bool exchange(float* x) {
  const bool upper = threadIdx.x & OTHER;
  UNROLL for (int i = 0; i < HALF; ++i) {
    const float mine = upper ? x[HALF + i] : x[i], theirs = upper ? x[i] : x[HALF + i];
    x[i] = mine + __shfl_xor_sync(kAllLanes, theirs, OTHER);
  }
  return upper;
}

// Four numbers that are read once: they need not stay in a cache.
template <class Four>
DEVICE Four load_once(const Four* at) {
#ifdef __CUDA_ARCH__
  return __ldcs(at);
#else
  return *at;
#endif
}

// The same for numbers that are written.
template <class Four>
DEVICE void store_once(Four* at, const Four& x) {
#ifdef __CUDA_ARCH__
  __stcs(at, x);
#else
  *at = x;
#endif
}

HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Grid and block size, dynamic shared memory in bytes.
struct Launch {
  int64_t grid;
  int block;
  int shared = 0;
};

// 0, or CUDA's error code. Errors of a kernel's run come with a later call, as everywhere in CUDA.
template <class... P, class... A>
int launch(const Launch& at, Stream stream, void (*kernel)(P...), const A&... arguments) {
  if (at.grid == 0) return 0;
#ifdef __CUDACC__
  if (at.shared > 48 << 10) {
    const auto error =
        cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, at.shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(at.grid));
  config.blockDim = dim3(at.block);
  config.dynamicSmemBytes = at.shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, P(arguments)...);
#else
  (void)stream;
  on_cpu::launch(unsigned(at.grid), at.block, size_t(at.shared), kernel, arguments...);
  return 0;
#endif
}

}  // namespace g2rl::cuda
