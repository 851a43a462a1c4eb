// Element-wise work on tiles of logits that sit in cache, the layouts that products read, and the products themselves.
// One table of functions per instruction set; `rowwise()` returns the one for this machine.
//
// A product and the element-wise work on the tile before it go on at the same time where there is AMX: its matrix unit
// and the vector units are different parts of a core, and either alone leaves the other idle. So functions that work on
// a tile also take the next tile's product. Without AMX both need the vector units and come one after the other.
//
// Letters: acc = raw products W h, u = logits / temperature as softmax sees them, y = target, lse = log sum exp u.
#pragma once

#include <cstdint>

#include "dots.h"
#include "matrix.h"

namespace g2rl {

constexpr int kLanes = 16;
constexpr int kUnit = 4 * kLanes;  // columns worked on at a time
constexpr int kMaxWidth = 256;     // of a tile
constexpr int64_t kRows = 64;      // of a tile, at most

// `rows` tokens by `cols` vocabulary entries, rows `ld` apart; `width` is cols rounded up to kUnit. Columns in
// cols..width hold -inf.
struct Tile {
  float* acc;
  int64_t ld;
  int rows;
  int cols;
  int width;
};

// How a raw product becomes a logit: z = scale * (acc + bias), then cap * tanh(z / cap) if cap > 0, and u = z /
// temperature.
struct LogitMap {
  float alpha;        // scale / temperature; with a cap, scale / cap
  const float* bias;  // [width], already times alpha
  float cap_over_t;   // cap / temperature; 0 = no cap
};

// Exponentials in 16 bits: q = round(65535 exp((u - m) / 2)) with m the row's maximum in this tile, so exp(u - m) = (q
// / 65535)^2. The square root spends the bits where they count: the error of a square grows with its root, so all
// entries of a row together are off by at most 8e-6 of their sum, whether one dominates or many share it. (Half
// precision is off by up to 2.4e-4 where one dominates.)
struct Kept {
  uint16_t* data;  // null: nothing is kept
  int64_t ld;
};
constexpr float kKeptMax = 65535.0f;

// Cache lines of what is needed next.
struct Soon {
  const char* data = nullptr;
  int64_t lines = 0;
  Soon share(int64_t i, int64_t of) const {
    const int64_t begin = lines * i / of;
    return {data + begin * 64, lines * (i + 1) / of - begin};
  }
};

// out[rows, cols] (+)= the sum over pairs of parts (i, j) that count in fp32 of A_i B_j. Counted in 32-bit units: two
// bf16 neighbours along the summed dimension, or a float, of which A has two for each pair in B where only B has pairs.
// AMX has pairs on both sides and any number of parts; others have one part, and pairs if `bf16_parts` says so.
struct TileProduct {
  int rows = 0, cols = 0;  // no rows: nothing to do; AMX computes and writes whole sixteens. cols is a multiple of 16,
                           // for AMX of 32
  int64_t steps = 0;       // of 16 units of B
  bool a_pairs = false, b_pairs = false;
  int a_parts = 1, b_parts = 1;
  const uint32_t* a = nullptr;  // row r of part i at a + i * a_part + r * a_stride
  int64_t a_part = 0, a_stride = 0;
  const uint32_t* b = nullptr;  // unit k of sixteen columns c of part j at b + j * b_part + c * b_block + k * 16
  int64_t b_part = 0, b_block = 0;
  float* out = nullptr;
  int64_t ld = 0;
  bool add = false;
  Soon soon{};  // to fetch into L2 meanwhile
};

// Adds a tile to running sums of e = exp(u - ref[row]) and of e (u - ref[row]), 16 lanes of each per row. ref is the
// row's maximum in the first tile's first kUnit columns and moves, with the sums, when a later entry is far above it;
// far below it is harmless.
struct StatsJob {
  Tile tile{};
  float alpha = 1;
  bool first = false;
  float *ref = nullptr, *sum = nullptr, *sum_x = nullptr;
  float *tile_ref = nullptr, *tile_top = nullptr;  // if wanted, get the tile's reference and largest (u - ref) / 2
  Kept kept{};                                     // if wanted, gets the tile in 16 bits; only with tile_top
};

// out[row] [col] += coef[row] exp(u - ref[row]) slope[row, col], rows in order.
struct ResidualJob {
  Tile tile{};
  float alpha = 1;
  const float* ref = nullptr;
  const float* slope = nullptr;  // null: no cap
  bool rounded = false;          // exponentials as StatsJob would have kept them; unit and coef are then kept_scales'
  bool first = false;
  float *sum = nullptr, *sum_x = nullptr;  // if wanted, get the tile's statistics too, by whatever ref is
  float coef[kRows], unit[kRows];
  float* out[kRows];
};

// out[row] [col] += coef[row] q^2 for kept rows, in order: to the bit what a rounded ResidualJob adds.
struct KeptJob {
  Kept kept{};
  int rows = 0, width = 0;
  float coef[kRows];
  float* out[kRows];
};

// acc <- exp(u - lse[row]) (c0[row] + c1[row] (u - lse[row])) slope[row, col]. slope may be null.
struct GradientJob {
  Tile tile{};
  float alpha = 1;
  const float *lse = nullptr, *c0 = nullptr, *c1 = nullptr, *slope = nullptr;
};

struct RowKernels {
  int bf16_parts[3];  // by Dtype: how many bf16 numbers a number is the sum of in products; 0: products of floats

  // A thread calls these before its first and after its last product on AMX; they do nothing elsewhere.
  void (*enter)();
  void (*leave)();

  // Each does its job and the product.
  void (*multiply)(const TileProduct& meanwhile);
  void (*stats)(const StatsJob&, const KeptJob& before,
                const TileProduct& meanwhile);  // `before` comes first and may lie where `kept` will
  void (*residual)(const ResidualJob&, const TileProduct& meanwhile);
  void (*gradient)(const GradientJob&, const TileProduct& meanwhile);

  // acc <- u in place, and dcap[row, col] <- 1 - tanh^2 when there is a cap (dcap may be null). Only for a bias, a cap
  // or alpha <= 0: a positive alpha alone is folded into the functions above, which then see u = alpha * acc.
  void (*logits)(const Tile&, const LogitMap&, float* dcap);
  // unit = what makes the tile's largest exp((u - ref) / 2) kKeptMax, and coef = value exp(u - lse) / q^2 of every
  // entry, per row.
  void (*kept_scales)(int rows, const float* ref, const float* top, const float* lse, const float* value, float* unit,
                      float* coef);
  // out[col] += sum over rows of acc[row, col], rows in order.
  void (*column_sums)(const Tile&, float* out);

  // n numbers -> `parts` bf16 rows whose sum is the number to 8 bits per part: 1 of bf16, 2 of fp16, 1 to 3 of fp32.
  void (*split)(const void* src, Dtype dtype, int64_t n, int parts, uint16_t* const* dst);
  void (*widen)(const void* src, Dtype dtype, int64_t n, float* dst);
  void (*narrow)(const float* src, Dtype dtype, int64_t n, void* dst);
  // dst[c * ld + r] = src[r][c] for 16 rows of `n` 32-bit units, n a multiple of 16.
  void (*transpose16)(const uint32_t* const* src, int64_t n, uint32_t* dst, int64_t ld);
  // Sums of 16 lanes each, n of them, the same order of additions on every target.
  void (*lane_sums)(const float* lanes, int64_t n, float* out);
  // Two rows of n numbers, n a multiple of 16, to pairs (a[i], b[i]), as the right operand of a bf16 product wants
  // them: sixteen pairs c are at dst + c * ld.
  void (*interleave)(const uint16_t* a, const uint16_t* b, int64_t n, uint32_t* dst, int64_t ld);

  DotKernels dots;
};

const RowKernels& rowwise();

}  // namespace g2rl
