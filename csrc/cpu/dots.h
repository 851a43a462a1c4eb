// Dot products of rows, summed in fp64: a part of `rowwise()`.
#pragma once

#include <cstdint>

namespace g2rl {

struct DotKernels {
  int64_t rows;
  // Products of rows i, i + 1, ... of X [m, d] with rows j, j + 1, ..., `rows` of each or as many as there are, into
  // out[i.., j..]; for i = j at least those on and below the diagonal. A product has the same bits wherever its rows
  // stand and whichever comes first.
  void (*block)(const float* X, int64_t m, int64_t d, int64_t i, int64_t j, double* out, int64_t stride);
};

}  // namespace g2rl
