// AMX in software: the instructions that amx.h takes, with the results that Intel's manual states for them. Included
// before the sources of a build with G2RL_EMULATE_AMX, whose AMX kernels then run on any processor with AVX-512 and
// bf16.
//
// Stricter than a chip in one thing: a thread that configures its tiles must have released them. Tiles of other sizes
// than 16 rows of 64 bytes, which amx.h has no use for, are refused.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_amx {

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

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float number(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return flushed(x);
}

inline float low(uint32_t pair) { return number(pair << 16); }
inline float high(uint32_t pair) { return number(pair & 0xffff0000u); }

// Lower and upper numbers of the pairs have a chain of their own each, which starts at zero.
inline void multiply(int out_tile, int left, int right) {
  auto& out = tile(out_tile);
  const auto &a = tile(left), &b = tile(right);
  float b_low[16][16], b_high[16][16];
  for (int k = 0; k < 16; ++k) {
    for (int col = 0; col < 16; ++col) {
      b_low[k][col] = low(b[k][col]);
      b_high[k][col] = high(b[k][col]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    float lower[16] = {}, upper[16] = {};
    for (int k = 0; k < 16; ++k) {
      const float a_low = low(a[row][k]), a_high = high(a[row][k]);
      for (int col = 0; col < 16; ++col) {
        lower[col] = flushed(std::fma(a_low, b_low[k][col], lower[col]));
        upper[col] = flushed(std::fma(a_high, b_high[k][col], upper[col]));
      }
    }
    for (int col = 0; col < 16; ++col) {
      const float sum = flushed(number(out[row][col]) + flushed(lower[col] + upper[col]));
      std::memcpy(&out[row][col], &sum, sizeof(sum));
    }
  }
}

}  // namespace emulated_amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated_amx::loadconfig(config)
#define _tile_release() emulated_amx::release()
#define _tile_zero(tile) emulated_amx::zero(tile)
#define _tile_loadd(tile, from, stride) emulated_amx::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated_amx::store(tile, to, stride)
#define _tile_dpbf16ps(out, left, right) emulated_amx::multiply(out, left, right)
