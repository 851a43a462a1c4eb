// In which order blocks take their work.
#pragma once

#include "platform.h"

namespace g2rl::cuda {

// Items of rows x columns in an order in which neighbours share few rows and columns, so that both stay in L2.
struct Order {
  int rows, columns;
  static constexpr int kGroup = 8;

  HOST_DEVICE int64_t items() const { return int64_t(rows) * columns; }

  DEVICE void find(int item, int& row, int& column) const {
    const int group = item / (kGroup * columns), within = item - group * kGroup * columns;
    const int size = rows - group * kGroup < kGroup ? rows - group * kGroup : kGroup;
    row = group * kGroup + within % size;
    column = within / size;
  }
};

}  // namespace g2rl::cuda
