// What the passes over the head share: how the vocabulary is cut, and a thread's tile of logits.
#pragma once

#include <vector>

#include "head.h"
#include "panels.h"

namespace g2rl {

// The vocabulary in tiles of equal width, and tiles in slabs: a slab is one task and owns its partial sums. Both depend on V, d and the dtype
// alone, never on the batch or the threads, so that sums have one order.
struct VocabCut {
  int64_t width, tiles, slabs;
  int64_t slab_begin(int64_t s) const { return s * tiles / slabs; }
  int64_t cols(int64_t tile, int64_t V) const { return std::min(width, V - tile * width); }
};

// One call's head and tokens.
struct HeadProblem {
  HeadProblem(const at::Tensor& hidden, const Head& head, const at::Tensor& targets);

  int64_t N, d, V;
  Format format;
  Depth depth;
  VocabCut cut;
  MatrixView hidden, weight;
  const int64_t* targets;
  std::vector<float> bias;   // [tiles * width] times alpha; empty when the logits need no more than alpha
  LogitMap map;
  float alpha;               // what multiplies a tile after finish(): map.alpha, or 1 once logits() has run
  double scale, temperature, cap;
  std::vector<double> raw_bias;

  // u of a raw product, and d z / d raw product without the scale.
  double logit(double acc, int64_t v) const;
  double cap_slope(double acc, int64_t v) const;
};

// A thread's panel of weights and the tile of logits computed from it.
class LogitTile {
 public:
  explicit LogitTile(const HeadProblem& problem);
  void load(int64_t tile, bool straight);
  // Logits of the tokens in a block of `rows`. The targets' columns become -inf, so that every sum below is over the other entries;
  // their raw products go to target_acc[N] if it is not null.
  void compute(const RowPanels& rows, int64_t block, bool want_slope, float* target_acc);

  const Tile& tile() const { return tile_; }
  const float* slope() const { return slope_.floats(); }  // null without a cap
  const ColumnPanels& panel() const { return panel_; }
  int64_t first() const { return first_; }

 private:
  const HeadProblem& problem_;
  ColumnPanels panel_;
  Buffer acc_, slope_;
  Tile tile_{};
  int64_t first_ = 0;
};

}  // namespace g2rl
