// What the passes over the head share: how the vocabulary is cut, and a thread's tile of logits.
#pragma once

#include <vector>

#include "head.h"
#include "panels.h"
#include "tasks.h"

namespace g2rl {

// The vocabulary in tiles of equal width, and tiles in slabs: a slab is one task and owns its partial sums. Both depend
// on V, d and the dtype alone, never on the batch or the threads, so that sums have one order.
struct VocabCut {
  int64_t width, tiles, slabs;
  int64_t slab_begin(int64_t s) const { return s * tiles / slabs; }
  int64_t cols(int64_t tile, int64_t V) const { return std::min(width, V - tile * width); }
  int64_t whole_units(int64_t tile, int64_t V) const { return (cols(tile, V) + kUnit - 1) / kUnit * kUnit; }
  int64_t padded() const { return tiles * width; }
};

// One call's head and tokens.
struct HeadProblem {
  HeadProblem(const Tokens& tokens, const Head& head, bool whole = true);

  bool whole;  // the vocabulary; a part of it lacks targets, which are -1 then
  int64_t N, d, V;
  Format format;
  Depth depth;
  VocabCut cut;
  Matrix hidden, weight;
  const int64_t* targets;
  std::vector<float> bias;  // [tiles * width] times alpha; empty when the logits need no more than alpha
  LogitMap map;
  float alpha;  // what multiplies a tile after finish(): map.alpha, or 1 once logits() has run
  double scale, temperature, cap;
  std::vector<double> raw_bias;

  int64_t padded_d() const { return depth.units * format.per_unit(); }
  // `count` tokens from `first` on, for products with tiles of W.
  RowPanels rows(int64_t first, int64_t count) const { return {hidden, format, depth, first, count}; }
  // What a plan may allocate: so much, or if that is 0, a share of fp32 logits and no less than a fixed amount.
  int64_t allowed_bytes(int64_t workspace_bytes) const;
  // Rows of W from `first` on, at most `count`, for a product to fetch. None if they are too many for L2.
  Soon rows_soon(int64_t first, int64_t count) const;
  // W h + b of a raw product; from that u, and d z / d raw product without the scale.
  double raw(double acc, int64_t v) const { return acc + (raw_bias.empty() ? 0.0 : raw_bias[v]); }
  double logit(double raw) const;
  double cap_slope(double raw) const;
};

// A thread's panel of weights and the tiles of logits computed from it. Two take turns: while one is multiplied, the
// one before it is worked on.
//
//   pending = {};
//   for each block of tokens:
//     product = logits.start(rows, block)
//     a row kernel does `pending` and `product`
//     pending = the job on logits.finish(...)
//   a row kernel does `pending` alone
class LogitTile {
 public:
  explicit LogitTile(const HeadProblem& problem);
  void load(int64_t tile, bool straight);
  // The loaded rows of W as a straight panel alone: the next product needs a load().
  void straighten();
  // The raw products of a block of `rows`, for a row kernel to compute.
  TileProduct start(const RowPanels& rows, int64_t block);
  // The logits, once the products are there. The targets' columns become -inf, so that every sum is over the other
  // entries; their raw products go to `targets`, of the block's tokens, if it is not null.
  Tile finish(bool want_slope, float* targets);

  const float* slope() const { return slope_.floats(); }  // of the last tile finished; null without a cap
  const ColumnPanels& panel() const { return panel_; }
  int64_t first() const { return first_; }
  int cols() const { return tile_.cols; }
  int width() const { return tile_.width; }

 private:
  const HeadProblem& problem_;
  ColumnPanels panel_;
  Buffer acc_, slope_;
  Tile tile_{};
  int64_t first_ = 0, first_token_ = 0;
  int turn_ = 0;
};

}  // namespace g2rl
