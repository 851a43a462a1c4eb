#include "panels.h"

#include "isa.h"
#include "tasks.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__unix__)
#include <sys/mman.h>
#endif

namespace g2rl {
namespace {

constexpr int64_t kColumnBlockUnits = 64 * 1024;  // 256 KB of right operand
constexpr int64_t kBlocksPerTask = 8;
constexpr int64_t kLine = 16;  // 32-bit units per cache line

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// One row of the caller's matrix as parts, zero beyond its columns; part p starts at dst + p * part_units.
void convert_row(const Format& format, const char* src, int64_t n, int64_t padded_units, int64_t part_units,
                 uint32_t* dst) {
  const RowKernels& k = rowwise();
  const int64_t padded = padded_units * format.per_unit();
  if (!format.pairs) {
    float* out = reinterpret_cast<float*>(dst);
    if (n > 0) k.widen(src, format.dtype, n, out);
    std::memset(out + n, 0, (padded - n) * sizeof(float));
    return;
  }
  uint16_t* parts[3];
  for (int p = 0; p < format.parts; ++p) parts[p] = reinterpret_cast<uint16_t*>(dst + p * part_units);
  if (n > 0) k.split(src, format.dtype, n, format.parts, parts);
  for (int p = 0; p < format.parts; ++p) std::memset(parts[p] + n, 0, (padded - n) * sizeof(uint16_t));
}

}  // namespace

int64_t product_rows(int64_t rows) { return isa() == Isa::kAmx ? round_up(rows, kRowStep) : rows; }

Format choose_format(Dtype dtype) {
  const int parts = rowwise().bf16_parts[static_cast<int>(dtype)];
  return {parts > 0, std::max(parts, 1), dtype};
}

Buffer::Buffer(int64_t bytes) {
#if defined(__unix__)
  constexpr int64_t kMappedBytes = 4 << 20;
  if (bytes >= kMappedBytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    madvise(p, bytes, MADV_HUGEPAGE);  // else fresh memory costs a fault every 4 KB, more than filling it
#endif
    data_ = std::unique_ptr<void, Free>(p, Free{bytes});
    return;
  }
#endif
  data_ = std::unique_ptr<void, Free>(std::aligned_alloc(64, round_up(std::max<int64_t>(bytes, 64), 64)), Free{0});
  if (!data_) throw std::bad_alloc();
}

void Buffer::Free::operator()(void* p) const {
#if defined(__unix__)
  if (mapped_bytes) {
    munmap(p, mapped_bytes);
    return;
  }
#endif
  std::free(p);
}

Depth::Depth(int64_t d, const Format& format)
    : units(round_up(d, kLine * format.per_unit()) / format.per_unit()), stride(row_stride(units)) {}

RowPanels::RowPanels(const Matrix& m, const Format& format, const Depth& depth, int64_t first, int64_t count)
    : first_(first),
      count_(count),
      blocks_((count + kRows - 1) / kRows),
      block_units_(format.parts * kRows * depth.stride),
      data_(blocks_ * block_units_ * sizeof(uint32_t)) {
  const auto pack = [&](int64_t i) {
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t row = first_ + i * kRows + r;
      const bool present = row < first_ + count_;
      convert_row(format, present ? m.row(row) : nullptr, present ? m.cols : 0, depth.units, kRows * depth.stride,
                  data_.units() + i * block_units_ + r * depth.stride);
    }
  };
  // A few blocks are packed sooner than a second thread wakes.
  for_tasks((blocks_ + kBlocksPerTask - 1) / kBlocksPerTask, [] { return 0; },
            [&](int, int64_t task) {
              for (int64_t i = task * kBlocksPerTask; i < std::min((task + 1) * kBlocksPerTask, blocks_); ++i) pack(i);
            });
}

ColumnPanels::ColumnPanels(const Format& format, const Depth& depth, int64_t width)
    : format_(format),
      width_(width),
      row_units_(depth.units),
      bytes_(format.parts * part_units() * sizeof(uint32_t)),
      stage_(16 * format.parts * depth.units * sizeof(uint32_t)) {}

void ColumnPanels::pack(const Matrix& m, int64_t first, bool transposed, bool straight) {
  const int64_t cols = row_units_ * format_.per_unit();
  if (!first_.units()) first_ = Buffer(bytes_);
  if (transposed && straight && !second_.units()) second_ = Buffer(bytes_);
  transposed_ = transposed ? first_.units() : nullptr;
  straight_ = !straight ? nullptr : transposed ? second_.units() : first_.units();
  const int64_t block = width_ / format_.per_unit() * 16;  // of a straight panel's columns
  const bool direct = format_.as_is() && m.cols == cols;
  for (int64_t r = 0; r < width_; r += 16) {
    const uint32_t* rows[16][3];
    for (int i = 0; i < 16; ++i) {
      const int64_t row = first + r + i;
      if (direct && row < m.rows) {
        rows[i][0] = reinterpret_cast<const uint32_t*>(m.row(row));
        continue;
      }
      uint32_t* dst = stage_.units() + i * format_.parts * row_units_;
      convert_row(format_, row < m.rows ? m.row(row) : nullptr, row < m.rows ? m.cols : 0, row_units_, row_units_, dst);
      for (int p = 0; p < format_.parts; ++p) rows[i][p] = dst + p * row_units_;
    }
    for (int p = 0; p < format_.parts; ++p) {
      if (transposed) {
        const uint32_t* src[16];
        for (int i = 0; i < 16; ++i) src[i] = rows[i][p];
        rowwise().transpose16(src, row_units_, transposed_ + (p * width_ + r) * row_units_, 16);
      }
      if (!straight) continue;
      for (int i = 0; i < 16; i += static_cast<int>(format_.per_unit())) {
        uint32_t* dst = straight_ + p * part_units() + (r + i) / format_.per_unit() * 16;
        if (format_.pairs) {
          rowwise().interleave(reinterpret_cast<const uint16_t*>(rows[i][p]),
                               reinterpret_cast<const uint16_t*>(rows[i + 1][p]), cols, dst, block);
        } else {
          for (int64_t c = 0; c < cols; c += 16)
            std::memcpy(dst + c / 16 * block, rows[i][p] + c, kLine * sizeof(*dst));
        }
      }
    }
  }
}

TileProduct rows_product(const Format& format, const Depth& depth, const uint32_t* row_block, int64_t rows,
                         const ColumnPanels& panel, float* out, int64_t ld) {
  return {.rows = static_cast<int>(rows),
          .cols = static_cast<int>(panel.width()),
          .steps = depth.units / kLine,
          .a_pairs = format.pairs,
          .b_pairs = format.pairs,
          .a_parts = format.parts,
          .b_parts = format.parts,
          .a = row_block,
          .a_part = kRows * depth.stride,
          .a_stride = depth.stride,
          .b = panel.transposed(),
          .b_part = depth.units * panel.width(),
          .b_block = depth.units * 16,
          .out = out,
          .ld = ld};
}

void multiply_straight(const LeftParts& a, RowRange rows, const ColumnPanels& b, int64_t depth, const Columns& columns,
                       float* out, const Soon& soon) {
  const Format& format = b.format();
  const int64_t depth_units = depth / format.per_unit(), b_units = b.width() / format.per_unit();
  // A block of columns of b stays in L2 while the rows of a pass by.
  const int64_t block = std::max<int64_t>(kColumnBlockUnits / depth_units / 64 * 64, 64);
  const int64_t blocks = (columns.count + block - 1) / block;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t c = columns.first + i * block;
    rowwise().multiply({.rows = static_cast<int>(rows.count),
                        .cols = static_cast<int>(std::min(block, columns.count - i * block)),
                        .steps = depth_units / kLine,
                        .a_pairs = a.format.pairs,
                        .b_pairs = format.pairs,
                        .a_parts = a.format.parts,
                        .b_parts = format.parts,
                        .a = a.data.units() + rows.first * a.stride,
                        .a_part = a.part_units,
                        .a_stride = a.stride,
                        .b = b.straight() + c * b_units,
                        .b_part = b.part_units(),
                        .b_block = b_units * 16,
                        .out = out + c,
                        .ld = columns.stride,
                        .add = true,
                        .soon = soon.share(i, blocks)});
  }
}

LeftParts::LeftParts(const Format& format_, int64_t rows, int64_t cols)
    : format(format_),
      data(format.parts * rows * cols / format.per_unit() * sizeof(uint32_t)),
      part_units(rows * cols / format.per_unit()),
      stride(cols / format.per_unit()) {}

void LeftParts::fill(const float* src, int64_t row, int64_t col, int64_t n) const {
  if (!format.pairs) {
    std::memcpy(data.floats() + row * stride + col, src, n * sizeof(float));
    return;
  }
  uint16_t* dst[3];
  for (int p = 0; p < format.parts; ++p)
    dst[p] = reinterpret_cast<uint16_t*>(data.units() + p * part_units + row * stride) + col;
  rowwise().split(src, Dtype::kFloat, n, format.parts, dst);
}

}  // namespace g2rl
