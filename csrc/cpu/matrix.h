// Matrices of the caller.
#pragma once

#include <cstdint>

namespace g2rl {

enum class Dtype { kFloat, kBFloat16, kHalf };

// Row-major: rows may be any distance apart, columns are adjacent.
struct Matrix {
  const char* data;
  int64_t rows;
  int64_t cols;
  int64_t row_bytes;
  Dtype dtype;
  const char* row(int64_t r) const { return data + r * row_bytes; }
};

}  // namespace g2rl
