// Tiles of packed tokens (packing.h) and words, for Hopper kernels that sum over each response's tokens. An item is a
// tile's words x a range of responses.
#pragma once

#include "packing.h"
#include "tiles_sm90.h"

namespace g2rl::cuda::sm90 {

// Boxes of 8, 4, 2 and 1 groups of tokens.
constexpr int kBoxes = 4;
struct TokenMaps {
  TensorMap of_groups[kBoxes];
};

inline int map_tokens(TokenMaps& maps, const Tokens& tokens, const Head& head, int group) {
  int error = 0;
  for (int i = 0; i < kBoxes && !error; ++i) {
    error = map_matrix(maps.of_groups[i], tokens.hidden, tokens.N, tokens.stride, head, (8 >> i) * group);
  }
  return error;
}

// A place of a group, and its token where the group has one there.
struct PackedToken {
  Group group;
  int n;
  bool inside;
};

// Words are rows and tokens columns, or the other way round, in groups of GROUP tokens. Of a tile's `row` and `column`
// one is the first word and the other the first group; `item` is where the range ends, in groups.
//
// All threads of a warp walk alike; each loads the tokens of the box that begins at its group, if one does.
template <bool WORDS_ARE_ROWS, int GROUP>
struct PackedWalk {
  static constexpr int kWords = WORDS_ARE_ROWS ? kRows : kColumnsOfTile;
  static constexpr int kGroups = (WORDS_ARE_ROWS ? kColumnsOfTile : kRows) / GROUP;

  const TokenMaps& maps;
  const Packing packing;
  Order order;  // rows: tiles of words; columns: ranges
  int item = blockIdx.x, v0 = 0, group = 0, end = 0;
  int box = kBoxes, token = 0;  // of this thread: the box's map, kBoxes for none, and its first token

  DEVICE PackedWalk(const TokenMaps& maps, const Packing& packing, int V)
      : maps(maps), packing(packing), order{int(ceil_div(V, kWords)), packing.ranges()[0]} {}

  // Ranges such that the tiles of the weight that are in use at one time take a quarter of an H100's L2 cache: with
  // half of it a third of all reads missed. But not of less than ten tiles, the last of which is half empty on average.
  static Grouping grouping_for(int d) {
    constexpr int64_t kInUse = 132 * int64_t(kWords) * 2, kCache = 12 << 20;
    return {GROUP, int(ceil_div(kInUse * d, kCache)), 10 * kGroups};
  }
  static int64_t most_items(int V) { return ceil_div(V, kWords) * kMaxRanges; }

  DEVICE bool next(Tile& tile) {
    bool first = group >= end;
    while (group >= end) {
      if (item >= order.items()) return false;
      int words, range;
      order.find(item, words, range);
      item += gridDim.x;
      v0 = words * kWords;
      group = packing.ranges()[1 + range];
      end = packing.ranges()[2 + range];
    }
    choose_box();
    tile = {WORDS_ARE_ROWS ? v0 : group, WORDS_ARE_ROWS ? group : v0, end, first, group + kGroups >= end};
    group += kGroups;
    return true;
  }

  // The i-th place of the groups from `first` on, in a range that ends at `end`.
  static DEVICE PackedToken token_at(const Packing& packing, int first, int end, int i) {
    const int g = first + i / GROUP, place = i % GROUP;
    const Group group = g < end ? packing.groups()[g] : Group{0, 0, 0, -1};
    return {group, group.token + place, place < group.count};
  }

  // A run of n groups that hold consecutive tokens is loaded in boxes of eight groups, then of 4, 2 and 1.
  DEVICE void choose_box() {
    const int lane = threadIdx.x % kWarp, g = group + lane;
    const Group mine = lane < kGroups && g < end ? packing.groups()[g] : Group{0, 0, kGroups - lane, -1};
    // The first of this tile's groups in my run: the one after the last that ends a run before me.
    const unsigned ends = __ballot_sync(kAllLanes, mine.run == 1) & ((1u << lane) - 1);
    int start = 0;
    for (unsigned rest = ends; rest; rest >>= 1) ++start;
    const int rest_of_tile = kGroups - lane, offset = lane - start;
    const int length = offset + (mine.run < rest_of_tile ? mine.run : rest_of_tile);
    token = mine.token;
    box = kBoxes;
    if (lane >= kGroups) return;
    const int eights = length / 8 * 8, after = offset - eights, odd = length % 8;
    if (after < 0) {
      if (offset % 8 == 0) box = 0;
    } else {
      for (int i = 1, at = 0; i < kBoxes; ++i) {
        const int size = 8 >> i;
        if (!(odd & size)) continue;
        if (after == at) box = i;
        at += size;
      }
    }
  }
};

// The tokens of the tile that a `PackedWalk` has come to, as A or as B.
template <class Walk>
struct PackedTokens {
  static constexpr bool kByColumns = false;
  const Walk& walk;
  static constexpr int kGroupBytes = (Walk::kWords == kRows ? kBytesB : kBytesA) / Walk::kGroups;

  DEVICE void load(uint32_t barrier, uint32_t to, const Tile&, int k) const {
    const int lane = threadIdx.x % kWarp;
    if (walk.box < kBoxes) tma_load(walk.maps.of_groups[walk.box], barrier, to + lane * kGroupBytes, k, walk.token);
  }
};

}  // namespace g2rl::cuda::sm90
