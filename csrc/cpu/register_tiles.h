// Products by vector instructions, for instruction sets without a matrix unit. Included by rowwise_impl.h.
//
// A tile of kTileRows rows by kTileVectors vectors of columns is summed in registers over a chunk of the summed
// dimension: each entry of A, broadcast, meets as many vectors of B. A chunk of a strip of B stays in the first-level
// cache while all rows pass by. Chunks start from zero and are added to `out`: their sums, added up, round less than
// one long sum. An entry of the result has the same bits whatever the rows and columns around it.
#pragma once

#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#define G2RL_BF16_PAIRS
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#define G2RL_BF16_PAIRS
#endif

#include "rowwise.h"
#include "simd.h"

namespace g2rl {
namespace {

// As many sums as leave registers for kTileVectors vectors of B and one entry of A.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 4;  // 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;  // 16
#else
constexpr int kTileRows = 4, kTileVectors = 2;  // 16, some of them for products not yet added
#endif
constexpr int64_t kChunkSteps = 8;  // of 16 units: 32 KB of a strip of 64 columns, and half the rounding of 16

// What the units of A and B hold, and how they are multiplied: kSteps entries of A for each unit of B.

struct Floats {
  static constexpr int kSteps = 1;
  static Vector right(const uint32_t* b, int) { return read<Vector>(b); }
  static Vector add(Vector sum, const uint32_t* a, Vector b) { return sum + read<float>(a) * b; }
};

#if defined(G2RL_BF16_PAIRS)
// A in fp32, B in pairs of bf16, which the upper halves of floats hold exactly.
struct FloatsByPairs {
  static constexpr int kSteps = 2;
  static Vector right(const uint32_t* b, int step) {
    const VectorBits pairs = read<VectorBits>(b);
    return step == 0 ? (Vector)(pairs << 16) : (Vector)(pairs & 0xffff0000u);
  }
  static Vector add(Vector sum, const uint32_t* a, Vector b) { return Floats::add(sum, a, b); }
};

struct Pairs {
  static constexpr int kSteps = 1;
  static Vector right(const uint32_t* b, int) { return read<Vector>(b); }
  static Vector add(Vector sum, const uint32_t* a, Vector b) {
#if defined(__AVX512BF16__)
    // Two fused multiply-adds, one after the other, each rounded to nearest; subnormal operands and results are zero
    // (Intel's manual, VDPBF16PS).
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(read<int>(a)), (__m512bh)b);
#else
    // Two exact products, their sum, and that and `sum`, both sums rounded to odd; subnormal operands and results are
    // zero (Arm's manual, BFDOT). A pair goes into a lane, as loads that fill a register take a vector unit's time.
    const float32x2_t pair = {read<float>(a), 0.0f};
    return (Vector)vbfdotq_lane_f32((float32x4_t)sum, (bfloat16x8_t)b, vreinterpret_bf16_f32(pair), 0);
#endif
  }
};
#endif

// Where the tiles of a chunk are.
struct TilePlace {
  const uint32_t* a;
  int64_t a_stride;
  const uint32_t* b;
  int64_t b_block;
  int64_t units;
  float* out;
  int64_t ld;
  bool add;
};

template <typename Units, int kTall, int kWide>
void multiply_tile(const TilePlace t) {
  Vector sums[kTall][kWide];
  const auto each_sum = [&](const auto& f) G2RL_ALWAYS_INLINE {
    unrolled<kTall>([&](int r) G2RL_ALWAYS_INLINE { unrolled<kWide>([&](int j) G2RL_ALWAYS_INLINE { f(r, j); }); });
  };
  const auto out = [&](int r, int j) G2RL_ALWAYS_INLINE { return t.out + r * t.ld + j * kVector; };
  each_sum([&](int r, int j) G2RL_ALWAYS_INLINE { sums[r][j] = Vector{}; });
  for (int64_t k = 0; k < t.units; ++k) {
    unrolled<Units::kSteps>([&](int step) G2RL_ALWAYS_INLINE {
      const uint32_t* a = t.a + k * Units::kSteps + step;
      Vector right[kWide];
      unrolled<kWide>([&](int j) G2RL_ALWAYS_INLINE {
        const int col = j * kVector;
        right[j] = Units::right(t.b + col / 16 * t.b_block + k * 16 + col % 16, step);
      });
      each_sum([&](int r, int j)
                   G2RL_ALWAYS_INLINE { sums[r][j] = Units::add(sums[r][j], a + r * t.a_stride, right[j]); });
    });
  }
  if (t.add) each_sum([&](int r, int j) G2RL_ALWAYS_INLINE { sums[r][j] += read<Vector>(out(r, j)); });
  each_sum([&](int r, int j) G2RL_ALWAYS_INLINE { write(out(r, j), sums[r][j]); });
}

// A tile of the first rows, kTall or, if fewer are left, all of them.
template <typename Units, int kWide, int kTall = kTileRows>
G2RL_ALWAYS_INLINE inline void multiply_up_to(int64_t rows, const TilePlace& t) {
  if constexpr (kTall > 1) {
    if (rows < kTall) return multiply_up_to<Units, kWide, kTall - 1>(rows, t);
  }
  multiply_tile<Units, kTall, kWide>(t);
}

template <typename Units>
void multiply_units(const TileProduct& p) {
  // Sixteen columns at a time where fewer than a strip are left.
  constexpr int64_t kStrip = kTileVectors * kVector;
  constexpr int kRest = kStrip > 16 ? 16 / kVector : kTileVectors;
  const int64_t chunks = (p.steps + kChunkSteps - 1) / kChunkSteps;
  const int64_t tiles = chunks * ((p.cols + kStrip - 1) / kStrip) * ((p.rows + kTileRows - 1) / kTileRows);
  const int64_t lines_per_tile = (p.soon.lines + tiles - 1) / tiles;
  int64_t fetched = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t k = chunk * p.steps / chunks * 16, end = (chunk + 1) * p.steps / chunks * 16;
    for (int64_t c = 0; c < p.cols;) {
      const bool whole = p.cols - c >= kStrip;
      for (int64_t r = 0; r < p.rows; r += kTileRows) {
        for (int64_t i = 0; i < lines_per_tile && fetched < p.soon.lines; ++i, ++fetched)
          __builtin_prefetch(p.soon.data + fetched * 64, 0, 2);
        const TilePlace place{p.a + r * p.a_stride + k * Units::kSteps,
                              p.a_stride,
                              p.b + c / 16 * p.b_block + c % 16 + k * 16,
                              p.b_block,
                              end - k,
                              p.out + r * p.ld + c,
                              p.ld,
                              p.add || chunk > 0};
        if (whole) {
          multiply_up_to<Units, kTileVectors>(p.rows - r, place);
        } else {
          multiply_up_to<Units, kRest>(p.rows - r, place);
        }
      }
      c += whole ? kStrip : 16;
    }
  }
}

void multiply_tiles(const TileProduct& p) {
#if defined(G2RL_BF16_PAIRS)
  if (p.b_pairs) return p.a_pairs ? multiply_units<Pairs>(p) : multiply_units<FloatsByPairs>(p);
#endif
  multiply_units<Floats>(p);
}

}  // namespace
}  // namespace g2rl
