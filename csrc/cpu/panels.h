// Operands of the matrix products, and the products themselves.
//
// Two formats, chosen once per call by what the instruction set has for a dtype:
//   pairs of bf16  A number is a sum of bf16 parts: 1 for bf16, and on AMX 2 for fp16 (exact) and 3 for fp32 (24 bits).
//                  A product of two numbers is the products of their parts that matter in fp32, each at bf16 speed,
//                  summed in fp32.
//   floats         One fp32 part.
// Storage is counted in 32-bit units: a pair of bf16 neighbours along the summed dimension, or one float.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "rowwise.h"

namespace g2rl {

constexpr int64_t kRowStep = 16;  // rows of an AMX tile

// Rows that a product of so many writes.
int64_t product_rows(int64_t rows);

struct Format {
  bool pairs;
  int parts;
  Dtype dtype;
  int64_t per_unit() const { return pairs ? 2 : 1; }
  // Rows of the caller's matrix are stored as they are.
  bool as_is() const { return parts == 1 && (dtype == Dtype::kFloat || (pairs && dtype == Dtype::kBFloat16)); }
  int64_t element_size() const { return dtype == Dtype::kFloat ? 4 : 2; }
};

Format choose_format(Dtype dtype);

// Uninitialised memory on a cache line boundary. Large blocks come from the system and go back to it at once: malloc
// would hold on to them, and the next plan's would lie beside them.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes);
  uint32_t* units() const { return static_cast<uint32_t*>(data_.get()); }
  float* floats() const { return static_cast<float*>(data_.get()); }
  uint16_t* halves() const { return static_cast<uint16_t*>(data_.get()); }

 private:
  struct Free {
    int64_t mapped_bytes;  // 0: from malloc
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> data_{nullptr, Free{0}};
};

// How far apart rows of so many units lie: high powers of two would put them all in one cache set.
inline int64_t row_stride(int64_t units) { return units + 16; }

// The summed dimension of length d.
struct Depth {
  Depth(int64_t d, const Format& format);
  int64_t units;   // whole steps of 16
  int64_t stride;  // between rows of the left operand
};

// Left operand of the logits for `count` rows of m from `first` on: [block of 64 rows][part][64][stride], missing rows
// zero.
class RowPanels {
 public:
  RowPanels(const Matrix& m, const Format& format, const Depth& depth, int64_t first, int64_t count);
  const uint32_t* block(int64_t i) const { return data_.units() + i * block_units_; }
  int64_t blocks() const { return blocks_; }
  int64_t count() const { return count_; }
  int64_t first(int64_t block) const { return first_ + block * kRows; }
  int64_t rows(int64_t block) const { return std::min(kRows, count_ - block * kRows); }

 private:
  int64_t first_, count_, blocks_, block_units_;
  Buffer data_;
};

// Right operands made from `width` rows of a matrix, for one thread at a time; rows past the end of the matrix are
// zero. Both layouts at once take twice the memory.
class ColumnPanels {
 public:
  ColumnPanels(const Format& format, const Depth& depth, int64_t width);
  void pack(const Matrix& m, int64_t first, bool transposed, bool straight);
  // The product's columns are the matrix's rows: [part][block of 16 columns][units][16].
  const uint32_t* transposed() const { return transposed_; }
  // [part][block of 16 columns][width / per_unit][16]: the product's columns are the matrix's columns. Only if asked
  // for.
  const uint32_t* straight() const { return straight_; }
  int64_t width() const { return width_; }
  const Format& format() const { return format_; }
  int64_t part_units() const { return width_ * row_units_; }

 private:
  Format format_;
  int64_t width_, row_units_, bytes_;
  Buffer first_, second_, stage_;
  uint32_t *transposed_ = nullptr, *straight_ = nullptr;
};

// out[rows, width] = the first rows of a block times the transposed panel, for one of the row kernels to do; rows of
// out are ld apart.
TileProduct rows_product(const Format& format, const Depth& depth, const uint32_t* row_block, int64_t rows,
                         const ColumnPanels& panel, float* out, int64_t ld);

// A left operand computed in fp32: row r of part p at data + p * part_units + r * stride.
struct LeftParts {
  LeftParts(const Format& format, int64_t rows, int64_t cols);
  Format format;
  Buffer data;
  int64_t part_units, stride;
  void fill(const float* src, int64_t row, int64_t col, int64_t n) const;
};

struct RowRange {
  int64_t first, count;
};

// Some columns of a product, and how far apart its rows are.
struct Columns {
  int64_t first, count, stride;
};

// out[rows of a, columns] += a [rows, depth] b [depth, columns], b a straight panel, whose first `depth` rows count.
// Fetches `soon` meanwhile.
void multiply_straight(const LeftParts& a, RowRange rows, const ColumnPanels& b, int64_t depth, const Columns& columns,
                       float* out, const Soon& soon = {});

}  // namespace g2rl
