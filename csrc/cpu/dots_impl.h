// Bodies of the functions in dots.h. Included by rowwise_impl.h.
#include <cstring>

#include "dots.h"

namespace g2rl {
namespace {
namespace fp64 {

// Lanes of one register, and as many rows on either side as leave their products in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 8, kTile = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 4, kTile = 3;
#else
constexpr int kLanes = 2, kTile = 3;
#endif
constexpr int kTiles = (16 + kTile - 1) / kTile;
constexpr int kBlock = kTiles * kTile;  // rows: a group of 16 is one block
constexpr int kChunk = 128;             // columns at a time: a panel and the block's sums stay in the first-level cache

using Doubles = double __attribute__((vector_size(kLanes * sizeof(double))));
using Panel = double[kBlock][kChunk];
using Sums = Doubles[kTile][kTile];

// `n` columns of up to kBlock rows, in fp64 and with zeros behind them up to whole tiles and vectors.
void fill(Panel& panel, const float* X, int64_t rows, int64_t d, int64_t n, int64_t width) {
  for (int64_t r = 0; r < kBlock; ++r) {
    const int64_t present = r < rows ? n : 0;
    for (int64_t k = 0; k < present; ++k) panel[r][k] = X[r * d + k];
    for (int64_t k = present; k < width; ++k) panel[r][k] = 0.0;
  }
}

inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

inline Doubles load(const double* p) {
  Doubles v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// A tile of products over `width` columns of two panels.
void add_products(const double (*x)[kChunk], const double (*y)[kChunk], int64_t width, Sums& sums) {
  Sums s;
  std::memcpy(&s, &sums, sizeof(s));
  for (int64_t k = 0; k < width; k += kLanes) {
    Doubles right[kTile];
    for (int b = 0; b < kTile; ++b) right[b] = load(y[b] + k);
    for (int a = 0; a < kTile; ++a) {
      const Doubles left = load(x[a] + k);
      for (int b = 0; b < kTile; ++b) s[a][b] += left * right[b];
    }
  }
  std::memcpy(&sums, &s, sizeof(s));
}

void block(const float* X, int64_t m, int64_t d, int64_t i, int64_t j, double* out, int64_t stride) {
  alignas(64) Panel left, right;
  alignas(64) Sums sums[kTiles][kTiles] = {};
  const int64_t rows = at_most(m - i, kBlock), cols = at_most(m - j, kBlock);
  for (int64_t k = 0; k < d; k += kChunk) {
    const int64_t n = at_most(d - k, kChunk), width = (n + kLanes - 1) / kLanes * kLanes;
    fill(left, X + i * d + k, rows, d, n, width);
    if (i != j) fill(right, X + j * d + k, cols, d, n, width);
    const Panel& y = i == j ? left : right;
    for (int a = 0; a * kTile < rows; ++a)
      for (int b = 0; b * kTile < cols && (i != j || b <= a); ++b)
        add_products(left + a * kTile, y + b * kTile, width, sums[a][b]);
  }
  for (int64_t a = 0; a < rows; ++a) {
    for (int64_t b = 0; b < cols && (i != j || b <= a); ++b) {
      double total = 0;
      for (int lane = 0; lane < kLanes; ++lane) total += sums[a / kTile][b / kTile][a % kTile][b % kTile][lane];
      out[(i + a) * stride + j + b] = total;
    }
  }
}

constexpr DotKernels kDots{kBlock, block};

}  // namespace fp64
}  // namespace
}  // namespace g2rl
