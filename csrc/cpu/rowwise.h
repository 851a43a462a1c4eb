// Element-wise work on tiles of logits that sit in cache, and the layouts that products read.
// One table of functions per instruction set; `rowwise()` returns the one for this machine.
//
// Letters: acc = raw products W h, u = logits / temperature as softmax sees them, y = target, lse = log sum exp u.
#pragma once

#include <cstdint>

namespace g2rl {

constexpr int kLanes = 16;
constexpr int kMaxWidth = 256;  // of a tile

// `rows` tokens by `cols` vocabulary entries, rows `ld` apart; `width` is cols rounded up to 16. Columns in cols..width hold -inf.
struct Tile {
  float* acc;
  int64_t ld;
  int rows;
  int cols;
  int width;
};

// How a raw product becomes a logit: z = scale * (acc + bias), then cap * tanh(z / cap) if cap > 0, and u = z / temperature.
struct LogitMap {
  float alpha;         // scale / temperature; with a cap, scale / cap
  const float* bias;   // [width], already times alpha
  float cap_over_t;    // cap / temperature; 0 = no cap
};

// Exponentials in 16 bits: q = round(65535 exp((u - m) / 2)) with m the row's maximum in this tile, so exp(u - m) = (q / 65535)^2.
// The square root spends the bits where they count: the error of a square grows with its root, so all entries of a row together are off by at most
// 8e-6 of their sum, whether one dominates or many share it. (Half precision is off by up to 2.4e-4 where one dominates.)
struct Kept {
  uint16_t* data;  // null: nothing is kept
  int64_t ld;
};
constexpr float kKeptMax = 65535.0f;

enum class Dtype { kFloat, kBFloat16, kHalf };

struct RowKernels {
  const char* name;

  // acc <- u in place, and dcap[row, col] <- 1 - tanh^2 when there is a cap (dcap may be null). Only for a bias, a cap or alpha <= 0:
  // a positive alpha alone is folded into the functions below, which then see u = alpha * acc.
  void (*logits)(const Tile&, const LogitMap&, float* dcap);
  // Adds a tile to running sums of e = exp(u - ref[row]) and of e (u - ref[row]), 16 lanes of each per row. ref is the row's maximum in the first
  // tile and moves, with the sums, when a later entry is far above it; far below it is harmless.
  // top[row], if wanted, becomes the tile's largest (u - ref) / 2, and `kept`, if wanted, gets the tile in 16 bits.
  void (*stats)(const Tile&, float alpha, bool first, float* ref, float* sum, float* sum_x, float* top, Kept kept);
  // acc <- e = exp(u - ref[row]) in place, and the same running sums.
  void (*exponentials)(const Tile&, float alpha, bool first, const float* ref, float* sum, float* sum_x);
  // out[col] += sum over rows of coef[row] exp(u - ref[row]) dcap[row, col], rows in order. dcap may be null.
  void (*residual)(const Tile&, float alpha, const float* ref, const float* coef, const float* dcap, float* out);
  // The same with exponentials rounded to 16 bits, once from logits and once from what stats() kept: same bits. unit and coef are kept_scales'.
  void (*rounded_residual)(const Tile&, float alpha, const float* ref, const float* unit, const float* coef, float* out);
  void (*kept_residual)(Kept kept, int rows, int width, const float* coef, float* out);
  // unit = what makes the tile's largest exp((u - ref) / 2) kKeptMax, and coef = value exp(u - lse) / q^2 of every entry, per row.
  void (*kept_scales)(int rows, const float* ref, const float* top, const float* lse, const float* value, float* unit, float* coef);
  // out[col] += sum over rows of coef[row] acc[row, col] dcap[row, col], rows in order. dcap may be null.
  void (*weighted_sum)(const Tile&, const float* coef, const float* dcap, float* out);
  // acc <- exp(u - lse[row]) (c0[row] + c1[row] (u - lse[row])) slope[row, col]. slope may be null.
  void (*gradient)(const Tile&, float alpha, const float* lse, const float* c0, const float* c1, const float* slope);

  // n numbers -> `parts` bf16 rows whose sum is the number to 8 bits per part.
  void (*split)(const void* src, Dtype dtype, int64_t n, int parts, uint16_t* const* dst);
  void (*widen)(const void* src, Dtype dtype, int64_t n, float* dst);
  void (*narrow)(const float* src, Dtype dtype, int64_t n, void* dst);
  // dst[c * ld + r] = src[r][c] for 16 rows of `n` 32-bit units, n a multiple of 16.
  void (*transpose16)(const uint32_t* const* src, int64_t n, uint32_t* dst, int64_t ld);
  // Sum of 16 lanes, the same order of additions on every target.
  float (*lane_sum)(const float* lanes);
  // dst[2 i + j] = (j ? b : a)[i]: two rows interleaved, as the second operand of a bf16 product wants them.
  void (*interleave)(const uint16_t* a, const uint16_t* b, int64_t n, uint16_t* dst);
};

const RowKernels& rowwise();

}  // namespace g2rl
