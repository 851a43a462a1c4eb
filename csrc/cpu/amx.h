// Products of bf16 tiles on AMX with other work in their gaps. Included by rowwise_impl.h for the instruction set that
// has it.
//
// A tile product occupies the matrix unit for sixteen cycles, in which the core can issue some sixty other
// instructions. So after every four of them comes a piece of work on vectors, short enough that the next four are in
// the core's window before the last are done: products and exponentials then take little more time than the longer of
// the two.
#pragma once

#include <immintrin.h>

#include "rowwise.h"

namespace g2rl {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kAllTiles;

void enter() { _tile_loadconfig(&kAllTiles); }
void leave() { _tile_release(); }

// What goes on between a product's steps, spread evenly over them: units of some work, and fetching what is needed
// soon.
template <typename Work>
class Meanwhile {
 public:
  Meanwhile(const TileProduct& p, Work& work, int64_t steps)
      : work_(work),
        units_(work.left()),
        steps_(steps),
        soon_(p.soon.data),
        lines_(p.soon.lines),
        lines_per_step_((p.soon.lines + steps - 1) / steps) {}
  G2RL_ALWAYS_INLINE void step() {
    for (due_ += units_; due_ >= steps_; due_ -= steps_) work_.step();
    if (lines_ <= 0) return;
    for (int64_t i = 0; i < lines_per_step_; ++i) _mm_prefetch(soon_ + i * 64, _MM_HINT_T1);
    soon_ += lines_per_step_ * 64;
    lines_ -= lines_per_step_;
  }

 private:
  Work& work_;
  const int64_t units_, steps_;
  int64_t due_ = 0;
  const char* soon_;
  int64_t lines_;
  const int64_t lines_per_step_;
};

// Calls f(i, j) for the products of parts i and j that count in fp32, small ones first. A part is 2^-8 of the one
// before it: fp32 (three parts) drops what is 2^-24 of the whole.
template <typename F>
G2RL_ALWAYS_INLINE inline void for_part_pairs(int left, int right, const F& f) {
  for (int order = left + right - 2 < 2 ? left + right - 2 : 2; order >= 0; --order)
    for (int i = 0; i < left; ++i)
      if (order - i >= 0 && order - i < right) f(i, order - i);
}

inline int64_t part_pairs(int left, int right) {
  int64_t count = 0;
  for_part_pairs(left, right, [&](int, int) { ++count; });
  return count;
}

// 32 columns of 32 rows, or of the last 16: four sums in tiles 0-3, two rows' operands in 4 and 5, two columns' in 6
// and 7.
template <bool kBothRows, typename Work>
G2RL_ALWAYS_INLINE inline void multiply_block(const TileProduct& p, int64_t r, int64_t c, Meanwhile<Work>& meanwhile) {
  float *upper = p.out + r * p.ld + c, *lower = upper + 16 * p.ld;
  const int64_t out_bytes = p.ld * 4, a_bytes = p.a_stride * 4, b_bytes = 64;
  if (p.add) {
    _tile_loadd(0, upper, out_bytes);
    _tile_loadd(1, upper + 16, out_bytes);
    if constexpr (kBothRows) {
      _tile_loadd(2, lower, out_bytes);
      _tile_loadd(3, lower + 16, out_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for_part_pairs(p.a_parts, p.b_parts, [&](int i, int j) G2RL_ALWAYS_INLINE {
    const uint32_t* a = p.a + i * p.a_part + r * p.a_stride;
    const uint32_t* b = p.b + j * p.b_part + c / 16 * p.b_block;
    for (int64_t k = 0; k < p.steps; ++k, a += 16, b += 16 * 16) {
      _tile_loadd(4, a, a_bytes);
      _tile_loadd(6, b, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + p.b_block, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kBothRows) {
        _tile_loadd(5, a + 16 * p.a_stride, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      meanwhile.step();
    }
  });
  _tile_stored(0, upper, out_bytes);
  _tile_stored(1, upper + 16, out_bytes);
  if constexpr (kBothRows) {
    _tile_stored(2, lower, out_bytes);
    _tile_stored(3, lower + 16, out_bytes);
  }
}

template <typename Work>
void multiply_while(const TileProduct& p, Work& work) {
  asm volatile("" ::: "memory");  // GCC's tile loads don't tell the compiler that they read memory
  const int64_t blocks = (p.rows + 31) / 32 * (p.cols / 32);
  Meanwhile<Work> meanwhile(p, work, blocks * p.steps * part_pairs(p.a_parts, p.b_parts));
  for (int64_t r = 0; r < p.rows; r += 32) {
    for (int64_t c = 0; c < p.cols; c += 32) {
      if (p.rows - r > 16) {
        multiply_block<true>(p, r, c, meanwhile);
      } else {
        multiply_block<false>(p, r, c, meanwhile);
      }
    }
  }
}

}  // namespace
}  // namespace g2rl
