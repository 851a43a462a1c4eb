// Sums over the vocabulary, slab by slab, and the tokens' results from them.
#pragma once

#include "head_tiles.h"

namespace g2rl {

// What the features need of a token besides its exponentials.
struct Token {
  double lse;
  double rest;   // 1 - p_y
  double slope;  // D_y
};

// What a pass over the vocabulary finds of `count` tokens from `first` on. Per slab and token: a reference m and sums
// of exp(u - m) and exp(u - m) (u - m) over the slab without the target. Per token: the target's raw product.
class Partials {
 public:
  Partials(int64_t slabs, int64_t first, int64_t count)
      : first_(first), count_(count), data_((1 + 3 * slabs) * count * sizeof(float)) {}
  float* target(int64_t t) const { return at(0, t); }
  float* ref(int64_t slab, int64_t t) const { return at(1 + 3 * slab, t); }
  float* sum(int64_t slab, int64_t t) const { return at(2 + 3 * slab, t); }
  float* sum_x(int64_t slab, int64_t t) const { return at(3 + 3 * slab, t); }

 private:
  float* at(int64_t row, int64_t t) const { return data_.floats() + row * count_ + t - first_; }
  int64_t first_, count_;
  Buffer data_;
};

// The same sums while a slab is under way, 16 lanes each, for `tokens` of them.
class RunningSums {
 public:
  explicit RunningSums(int64_t tokens) : tokens_(tokens), data_(2 * tokens * kLanes * sizeof(float)) {}
  float* sum(int64_t i) const { return data_.floats() + i * kLanes; }
  float* sum_x(int64_t i) const { return data_.floats() + (tokens_ + i) * kLanes; }
  // Results of tokens begin..end, `first` being the token these sums start with.
  void fold(const Partials& out, int64_t slab, int64_t begin, int64_t end, int64_t first) const;

 private:
  int64_t tokens_;
  Buffer data_;
};

// Per tile and token of a block: the reference the tile's exponentials had and the largest of them, from which their
// rounding to 16 bits follows.
class TileScales {
 public:
  TileScales(int64_t tiles, int64_t tokens) : tokens_(tokens), data_(tiles * 2 * tokens * sizeof(float)) {}
  float* ref(int64_t tile, int64_t i) const { return data_.floats() + tile * 2 * tokens_ + i; }
  float* top(int64_t tile, int64_t i) const { return data_.floats() + (tile * 2 + 1) * tokens_ + i; }

 private:
  int64_t tokens_;
  Buffer data_;
};

// One slab's statistics of the tokens in `rows`, the first of them the first of `sums`, `partials` and `scales` (which
// may be null). Keeper says what becomes of the exponentials: open(tile) before a tile's products, before(tile, block)
// what to add up of what is kept where this block will be, kept(tile, i) where token i's go, close(tile, blocks) after
// them.
template <typename Keeper>
void slab_statistics(const HeadProblem& p, const RowPanels& rows, int64_t slab, LogitTile& logits,
                     const RunningSums& sums, const Partials& partials, const TileScales* scales,
                     const Keeper& keeper) {
  const int64_t first_tile = p.cut.slab_begin(slab), begin = rows.first(0);
  StatsJob pending;
  for (int64_t tile = first_tile; tile < p.cut.slab_begin(slab + 1); ++tile) {
    keeper.open(tile);
    logits.load(tile, /*straight=*/false);
    for (int64_t b = 0; b < rows.blocks(); ++b) {
      const int64_t t = rows.first(b), i = t - begin;
      rowwise().stats(pending, keeper.before(tile, b), logits.start(rows, b));
      pending = {.tile = logits.finish(/*want_slope=*/false, partials.target(t)),
                 .alpha = p.alpha,
                 .first = tile == first_tile,
                 .ref = partials.ref(slab, t),
                 .sum = sums.sum(i),
                 .sum_x = sums.sum_x(i),
                 .tile_ref = scales ? scales->ref(tile, i) : nullptr,
                 .tile_top = scales ? scales->top(tile, i) : nullptr,
                 .kept = keeper.kept(tile, i)};
    }
    keeper.close(tile, rows.blocks());
  }
  rowwise().stats(pending, {}, {});
  sums.fold(partials, slab, begin, begin + rows.count(), begin);
}

struct KeepNothing {
  void open(int64_t) const {}
  KeptJob before(int64_t, int64_t) const { return {}; }
  Kept kept(int64_t, int64_t) const { return {}; }
  void close(int64_t, int64_t) const {}
};

// Sums of all slabs -> results of tokens begin..end. `tokens` may be null.
void merge_slabs(const HeadProblem& p, const Partials& partials, int64_t begin, int64_t end, const TokenStats& stats,
                 Token* tokens);
// Sums of all slabs -> sums [4, N] of a part of the vocabulary, see `token_sums`.
void sum_slabs(const HeadProblem& p, const Partials& partials, float* sums);
// Sums [4, parts, N] of all parts -> results of all tokens.
void merge_parts(const HeadProblem& p, const float* sums, int64_t parts, const TokenStats& stats, Token* tokens);

}  // namespace g2rl
