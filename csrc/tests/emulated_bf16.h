// The instructions for bf16 in software, with the results that Intel's manual states for them: those that amx.h takes,
// and vdpbf16ps. Included before the sources of a build with G2RL_EMULATE_BF16, whose kernels for bf16 then run on any
// processor with AVX-512.
//
// Stricter than a chip in one thing: a thread that configures its tiles must have released them. Tiles of other sizes
// than 16 rows of 64 bytes, which amx.h has no use for, are refused.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_bf16 {

struct Tiles {
  bool configured = false;
  alignas(64) uint32_t data[8][16][16];
};
inline thread_local Tiles tiles;

inline void require(bool fine, const char* otherwise) {
  if (fine) return;
  std::fprintf(stderr, "AMX: %s\n", otherwise);
  std::abort();
}

inline auto& tile(int t) {
  require(tiles.configured, "a tile of a thread that has not configured its tiles");
  return tiles.data[t];
}

inline void loadconfig(const void* config) {
  constexpr int kRowBytes = 16, kRows = 48;  // where they are
  require(!tiles.configured, "a thread configures its tiles anew without having released them");
  for (int t = 0; t < 8; ++t) {
    uint16_t row_bytes;
    uint8_t rows;
    std::memcpy(&row_bytes, static_cast<const char*>(config) + kRowBytes + 2 * t, sizeof(row_bytes));
    std::memcpy(&rows, static_cast<const char*>(config) + kRows + t, sizeof(rows));
    require(row_bytes == 64 && rows == 16, "expected tiles of 16 rows of 64 bytes");
  }
  std::memset(tiles.data, 0, sizeof(tiles.data));
  tiles.configured = true;
}

inline void release() { tiles.configured = false; }

inline void zero(int t) { std::memset(tile(t), 0, sizeof(tile(t))); }

inline void load(int t, const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(tile(t)[row], static_cast<const char*>(from) + row * stride, 64);
}

inline void store(int t, void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(to) + row * stride, tile(t)[row], 64);
}

inline __m512 flushed(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), sign = _mm512_set1_epi32(INT32_MIN);
  const __mmask16 subnormal = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
  return _mm512_castsi512_ps(_mm512_mask_and_epi32(bits, subnormal, bits, sign));
}

// The lower and the upper numbers of sixteen pairs.
struct Numbers {
  __m512 low, high;

  explicit Numbers(__m512i pairs)
      : low(flushed(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)))),
        high(flushed(_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000))))) {}
};

inline __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return flushed(_mm512_fmadd_ps(a, b, c)); }

// Lower and upper numbers have a chain of their own each, which starts at zero.
inline void multiply(int out_tile, int left, int right) {
  auto& out = tile(out_tile);
  const auto &a = tile(left), &b = tile(right);
  float a_low[16][16], a_high[16][16];
  for (int row = 0; row < 16; ++row) {
    const Numbers x(_mm512_load_si512(a[row]));
    _mm512_storeu_ps(a_low[row], x.low);
    _mm512_storeu_ps(a_high[row], x.high);
  }
  __m512 low[16] = {}, high[16] = {};
  for (int k = 0; k < 16; ++k) {
    const Numbers y(_mm512_load_si512(b[k]));
    for (int row = 0; row < 16; ++row) {
      low[row] = multiply_add(_mm512_set1_ps(a_low[row][k]), y.low, low[row]);
      high[row] = multiply_add(_mm512_set1_ps(a_high[row][k]), y.high, high[row]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    const __m512 sum = flushed(_mm512_add_ps(low[row], high[row]));
    _mm512_store_ps(out[row], flushed(_mm512_add_ps(flushed(_mm512_load_ps(out[row])), sum)));
  }
}

// vdpbf16ps: one chain, the upper numbers first.
inline __m512 multiply_pairs(__m512 sum, __m512i a, __m512i b) {
  const Numbers x(a), y(b);
  return multiply_add(x.low, y.low, multiply_add(x.high, y.high, flushed(sum)));
}

}  // namespace emulated_bf16

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated_bf16::loadconfig(config)
#define _tile_release() emulated_bf16::release()
#define _tile_zero(tile) emulated_bf16::zero(tile)
#define _tile_loadd(tile, from, stride) emulated_bf16::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated_bf16::store(tile, to, stride)
#define _tile_dpbf16ps(out, left, right) emulated_bf16::multiply(out, left, right)

// A source that is not for AMX is for vdpbf16ps.
#if !defined(__AMX_BF16__)
#define __AVX512BF16__ 1
#define _mm512_dpbf16_ps(sum, a, b) emulated_bf16::multiply_pairs(sum, (__m512i)(a), (__m512i)(b))
#endif
