// Products of every kind that the instruction set has, against sums in fp64.
#include <cmath>
#include <cstring>
#include <exception>
#include <random>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/rowwise.h"
#include "expect.h"

namespace {

using g2rl::TileProduct;
using g2rl::testing::expect;

std::string description(const TileProduct& p) {
  return std::string(" (") + g2rl::isa_name(g2rl::isa()) + ", " + std::to_string(p.rows) + " x " +
         std::to_string(p.cols) + ", " + std::to_string(p.steps) + " steps, pairs " + std::to_string(p.a_pairs) + " " +
         std::to_string(p.b_pairs) + ")";
}

// A [rows, K] and B [K, cols] as numbers that bf16 holds, so that every kind of product sees the same.
struct Operands {
  int rows, cols, K;
  std::vector<float> a, b;

  Operands(int rows_, int cols_, int K_, float smallest = 0) : rows(rows_), cols(cols_), K(K_) {
    std::mt19937 random(rows + 31 * cols + 977 * K);
    std::normal_distribution<float> normal;
    for (int i = 0; i < rows * K; ++i) a.push_back(bf16(normal(random)));
    for (int i = 0; i < K * cols; ++i) b.push_back(bf16(normal(random)));
    if (smallest > 0)
      for (float& x : a) x = smallest;
  }

  static float bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    bits &= 0xffff0000u;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }

  // Units of a row of A or, in blocks of sixteen columns, of B.
  std::vector<uint32_t> left(bool pairs) const {
    return units(pairs, [&](int r, int k) { return a[r * K + k]; }, rows, 1);
  }
  std::vector<uint32_t> right(bool pairs) const {
    return units(pairs, [&](int c, int k) { return b[k * cols + c]; }, cols, 16);
  }

 private:
  template <typename At>
  std::vector<uint32_t> units(bool pairs, const At& at, int n, int block) const {
    const int per_unit = pairs ? 2 : 1, width = K / per_unit;
    std::vector<uint32_t> out((n + 15) / 16 * 16 * width);
    for (int i = 0; i < n; ++i) {
      for (int u = 0; u < width; ++u) {
        const float low = at(i, u * per_unit), high = pairs ? at(i, u * per_unit + 1) : 0;
        uint32_t bits[2];
        std::memcpy(&bits[0], &low, 4);
        std::memcpy(&bits[1], &high, 4);
        out[(i / block) * block * width + u * block + i % block] = pairs ? bits[0] >> 16 | bits[1] : bits[0];
      }
    }
    return out;
  }
};

std::vector<float> multiply(const Operands& o, bool a_pairs, bool b_pairs, bool add, TileProduct& p) {
  const std::vector<uint32_t> a = o.left(a_pairs), b = o.right(b_pairs);
  std::vector<float> out((o.rows + 15) / 16 * 16 * o.cols, 1.0f);
  const int64_t units = o.K / (b_pairs ? 2 : 1);
  p = {.rows = o.rows,
       .cols = o.cols,
       .steps = units / 16,
       .a_pairs = a_pairs,
       .b_pairs = b_pairs,
       .a = a.data(),
       .a_stride = o.K / (a_pairs ? 2 : 1),
       .b = b.data(),
       .b_block = units * 16,
       .out = out.data(),
       .ld = o.cols,
       .add = add};
  g2rl::rowwise().enter();
  g2rl::rowwise().multiply(p);
  g2rl::rowwise().leave();
  return out;
}

// Every product and every addition rounds once: K of them are off by at most K 2^-24 of the sum of magnitudes, and a
// result that is flushed to zero by 2^-126.
void check(const Operands& o, bool a_pairs, bool b_pairs, bool add) {
  TileProduct p;
  const std::vector<float> out = multiply(o, a_pairs, b_pairs, add, p);
  const std::string product = "product" + description(p);
  for (int r = 0; r < o.rows; ++r) {
    for (int c = 0; c < o.cols; ++c) {
      double sum = add, size = add, flushed = 0;
      for (int k = 0; k < o.K; ++k) {
        const double x = o.a[r * o.K + k], y = o.b[k * o.cols + c];
        sum += x * y;
        size += std::abs(x * y);
        // A subnormal operand counts as zero, and so does a sum.
        flushed += std::abs(x) < 0x1p-126 || std::abs(y) < 0x1p-126 ? std::abs(x * y) : 0;
        flushed += 0x1p-126;
      }
      const double error = std::abs(out[r * o.cols + c] - sum), limit = (2.0 * o.K + 1) * 0x1p-24 * size + flushed;
      expect(error <= limit, product, error, limit);
    }
  }
  // Bits do not hang on how many rows there are.
  if (o.rows == 1) return;
  Operands first = o;
  first.rows = 1;
  const std::vector<float> alone = multiply(first, a_pairs, b_pairs, add, p);
  expect(std::memcmp(alone.data(), out.data(), o.cols * sizeof(float)) == 0, "a row alone" + description(p), 1, 0);
}

void check_kind(bool a_pairs, bool b_pairs) {
  for (int rows = 1; rows <= 13; ++rows) check({rows, 64, 64}, a_pairs, b_pairs, rows % 2);
  // Narrow, wide and ragged strips of columns; one chunk of the summed dimension, several, and unequal ones.
  for (const int cols : {32, 96, 224})
    for (const int K : {32, 256, 288, 1088}) check({17, cols, K}, a_pairs, b_pairs, false);
  check({64, 256, 576}, a_pairs, b_pairs, true);
  check({3, 32, 64, 0x1p-130f}, a_pairs, b_pairs, false);  // subnormal operands
  check({3, 32, 64, 0x1p-126f}, a_pairs, b_pairs, false);  // subnormal sums
}

}  // namespace

int main() try {
  const int* parts = g2rl::rowwise().bf16_parts;
  const bool floats = parts[static_cast<int>(g2rl::Dtype::kFloat)] == 0;
  const bool pairs = parts[static_cast<int>(g2rl::Dtype::kBFloat16)] > 0;
  if (floats) check_kind(false, false);
  if (pairs) check_kind(true, true);
  if (floats && pairs) check_kind(false, true);
  return g2rl::testing::outcome();
} catch (const std::exception& error) {
  std::puts(error.what());
  return 1;
}
