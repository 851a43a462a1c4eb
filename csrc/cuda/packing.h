// Tokens of a batch as columns or rows of tiles, for kernels that sum over each response's tokens.
//
// Every response starts a group of 8 or 16 tokens of its own, so that a thread meets the tokens of a response in the
// same way wherever it lies in the batch: sums do not depend on its neighbours. Where all of the weight's tiles that
// are in use at one time would not fit the L2 cache, the groups are cut in ranges of whole responses, and tiles of the
// weight are taken through one range after another.
#pragma once

#include "head.h"

namespace g2rl::cuda {

constexpr int kLeastGroup = 8;

struct Group {
  int token;     // its first
  int count;     // tokens of the response in it; 0 for a response without any
  int run;       // groups of the response from this one on, which hold consecutive tokens
  int response;  // whose last group this is; -1 otherwise
};

// In memory of `packing_bytes`: a header of kMaxRanges + 2 numbers (how many ranges, where each begins, where the last
// ends, in groups), then the groups.
constexpr int kMaxRanges = 62;
struct Packing {
  int* memory;

  HOST_DEVICE int* ranges() const { return memory; }
  HOST_DEVICE Group* groups() const { return reinterpret_cast<Group*>(memory + kMaxRanges + 2); }
};

// Groups of `group` tokens in at most `ranges` ranges, none of them of less than `least` groups where responses are
// short.
struct Grouping {
  int group, ranges, least;
};

// Packs all responses, or those whose flag is not 0.
int pack(const Responses&, const int* flags, const Grouping&, const Packing&, Stream);

}  // namespace g2rl::cuda
