// The product that all kernels of the head share on chips since Ampere: tiles A B^T of 128 x 128 logits, one after
// another, of 16-bit numbers by mma.sync or of fp32 by FMA.
//
// 128 bytes of each row of a tile are copied at a time, into a ring of three stages that runs on from tile to tile.
// Rows that are aligned to 16 bytes are copied asynchronously, others by ordinary loads at the same place.
//
// Tensor cores truncate what they add up: after k products a logit is 9e-10 k of itself too small (measured on an
// H100). So a chain of two stages starts from 0 and is added to the sums in fp32, rounded. Sums by FMA gain from that,
// too: each addition to a logit of 100 may round by 4e-6. Four products are added up first, then chains of 256, then
// those: of d = 2048, 8 additions are to the whole sum and 64 to an eighth of it.
#pragma once

#include <type_traits>

#include "choices.h"
#include "options.h"
#include "order.h"
#include "sm80.h"

namespace g2rl::cuda::sm80 {

constexpr int kTile = 128;
constexpr int kThreads = 256;
constexpr int kStages = 3;
constexpr int kRowBytes = 128;
constexpr int kOperandBytes = kTile * kRowBytes;
// Behind the stages an epilogue has 3 KiB of its own: 99 KiB in all, what the smallest of these chips gives a block.
constexpr int kScratch = kStages * 2 * kOperandBytes;
constexpr int kScratchBytes = 3 << 10;

// Four warps along rows, two along columns, of 32 x 64 logits each. Element [i][4 j + 2 q + e] of a thread is row
// 16 i + 8 q, column 8 j + e of those that start at its Place.
constexpr int kRowBlocks = 2, kColumnBlocks = 8, kSums = 4 * kColumnBlocks;
using Sums = float[kRowBlocks][kSums];

struct Place {
  int row, column;

  static DEVICE Place here() {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    return {warp / 2 * 32 + lane / 4, warp % 2 * 64 + lane % 4 * 2};
  }
};

template <class T>
struct Matrix {
  const T* base;
  int64_t stride;
  int end;  // rows from here on count as 0
  bool aligned;

  static Matrix of(const void* base, int64_t stride, int end) {
    const bool aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * sizeof(T) % 16 == 0;
    return {static_cast<const T*>(base), stride, end, aligned};
  }
};

template <class T>
DEVICE void load_rows(const Matrix<T>& matrix, int row0, int k0, int d, uint8_t* to) {
  constexpr int kRows = kThreads / 8;
  const int chunk = threadIdx.x % 8, first = threadIdx.x / 8, k = k0 + chunk * int(16 / sizeof(T));
  const T* from = matrix.base + (row0 + first) * matrix.stride + k;
  if (matrix.aligned) {
    UNROLL for (int row = first; row < first + kTile; row += kRows) {
      copy_chunk<T, true>(to + swizzled(row, chunk), from, row0 + row < matrix.end ? d - k : 0);
      from += kRows * matrix.stride;
    }
  } else {
    UNROLL_1 for (int row = first; row < first + kTile; row += kRows) {
      copy_chunk<T, false>(to + swizzled(row, chunk), from, row0 + row < matrix.end ? d - k : 0);
      from += kRows * matrix.stride;
    }
  }
}

template <class T>
DEVICE void multiply_stage(const uint8_t* a, const uint8_t* b, Sums& chain) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, row = warp / 2 * 32, column = warp % 2 * 64;
  UNROLL for (int chunk = 0; chunk < 8; chunk += 2) {
    uint32_t x[kRowBlocks][4];
    UNROLL for (int i = 0; i < kRowBlocks; ++i) {
      load_matrices(a + swizzled(row + 16 * i + lane % 16, chunk + lane / 16), x[i]);
    }
    UNROLL for (int j = 0; j < kColumnBlocks; j += 2) {
      uint32_t y[4];
      load_matrices(b + swizzled(column + 8 * j + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2), y);
      UNROLL for (int i = 0; i < kRowBlocks; ++i) {
        multiply(T{}, &chain[i][4 * j], x[i], y[0], y[1]);
        multiply(T{}, &chain[i][4 * j + 4], x[i], y[2], y[3]);
      }
    }
  }
}

template <>
DEVICE void multiply_stage<float>(const uint8_t* a, const uint8_t* b, Sums& chain) {
  const Place at = Place::here();
  const auto load = [](const uint8_t* from, int row, int chunk) {
    return *reinterpret_cast<const float4*>(from + swizzled(row, chunk));
  };
  UNROLL_1 for (int chunk = 0; chunk < 8; ++chunk) {
    float4 x[kRowBlocks][2];
    UNROLL for (int i = 0; i < kRowBlocks; ++i) {
      UNROLL for (int q = 0; q < 2; ++q) x[i][q] = load(a, at.row + 16 * i + 8 * q, chunk);
    }
    UNROLL for (int j = 0; j < kColumnBlocks; ++j) {
      UNROLL for (int e = 0; e < 2; ++e) {
        const float4 y = load(b, at.column + 8 * j + e, chunk);
        UNROLL for (int i = 0; i < kRowBlocks; ++i) {
          UNROLL for (int q = 0; q < 2; ++q) {
            const float high = fmaf(x[i][q].w, y.w, x[i][q].z * y.z);
            chain[i][4 * j + 2 * q + e] += fmaf(x[i][q].x, y.x, fmaf(x[i][q].y, y.y, high));
          }
        }
      }
    }
  }
}

// The products of rows `a_row` on of a with `tiles` tiles of rows `b_row` on of b. All threads call
// `epilogue(tile, sums)` together for each in turn; it may change the sums.
template <class T, class Epilogue>
DEVICE void multiply_tiles(uint8_t* shared, const Matrix<T>& a, int a_row, const Matrix<T>& b, int b_row, int tiles,
                           int d, Epilogue& epilogue) {
  constexpr int kDepth = kRowBytes / sizeof(T), kChain = sizeof(T) == 2 ? 2 : 8;  // stages
  const int steps = int(ceil_div(d, kDepth));
  int next_tile = 0, next_k = 0;
  const auto load = [&](int stage) {
    if (next_tile < tiles) {
      uint8_t* to = shared + stage * 2 * kOperandBytes;
      load_rows(a, a_row, next_k, d, to);
      load_rows(b, b_row + next_tile * kTile, next_k, d, to + kOperandBytes);
      next_k += kDepth;
      if (next_k >= d) next_k = 0, ++next_tile;
    }
    copy_commit();
  };

  UNROLL for (int s = 0; s < kStages - 1; ++s) load(s);
  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    Sums sums = {};
    for (int step = 0; step < steps;) {
      Sums chain = {};
      const int end = step + kChain < steps ? step + kChain : steps;
      UNROLL_1 for (; step < end; ++step) {
        copy_wait<kStages - 2>();
        __syncthreads();
        load(stage == 0 ? kStages - 1 : stage - 1);
        const uint8_t* from = shared + stage * 2 * kOperandBytes;
        multiply_stage<T>(from, from + kOperandBytes, chain);
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      UNROLL for (int i = 0; i < kRowBlocks; ++i) { UNROLL for (int s = 0; s < kSums; ++s) sums[i][s] += chain[i][s]; }
    }
    epilogue(tile, sums);
  }
  copy_wait<0>();
}

DEVICE void add_bias_of_columns(const Head& head, int v, Sums& z) {
  if (head.bias == nullptr) return;
  UNROLL for (int j = 0; j < kColumnBlocks; ++j) {
    UNROLL for (int e = 0; e < 2; ++e) {
      const float bias = bias_at(head, v + 8 * j + e);
      UNROLL for (int i = 0; i < kRowBlocks; ++i) {
        z[i][4 * j + e] += bias;
        z[i][4 * j + 2 + e] += bias;
      }
    }
  }
}

inline Launch blocks(int64_t count) { return {count, kThreads, kScratch + kScratchBytes}; }

}  // namespace g2rl::cuda::sm80
