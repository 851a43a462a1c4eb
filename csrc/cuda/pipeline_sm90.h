// The product that all Hopper kernels of the head share: tiles A B^T of 128 x 192, one after another, of logits or, in
// projection_sm90.cu, of features.
//
// A block has three warpgroups. A warp of the first copies, by TMA, 64 columns of a tile of A and of B at a time into
// a ring of stages; the other two multiply, 64 rows of A each.
//
// Tensor cores truncate what they add up: after k products a logit is 9e-10 k of itself too small (measured on an
// H100). So a chain of a few stages starts from 0 and is added to the sums in fp32, rounded. That costs registers, 96
// for a chain and 96 for the sums, and is why a tile has 192 columns and not 256. It also buys something: while the
// first chain of the next tile is multiplied, the sums of the last one are still there, and its exponentials are
// computed meanwhile. The two warpgroups take turns in issuing chains, so that one adds while the other multiplies.
//
// Blocks do not share tiles by multicast: pairs that do were no faster (benchmarks/NOTES.md).
#pragma once

#include "sm90.h"

namespace g2rl::cuda::sm90 {

constexpr int kRows = 128;           // of A in a tile
constexpr int kColumnsOfTile = 192;  // rows of B
constexpr int kStages = 5;
// Of a chain, in stages. What the tensor cores do while an epilogue computes is the first of the next tile, the longer
// the more.
constexpr int kChain = 3;
constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kBytesA = kRows * kRowBytes, kBytesB = kColumnsOfTile * kRowBytes;
// A thread's part of a warpgroup's 64 rows, as `wgmma` lays them out: element 4 j + 2 q + e is row
// 16 warp + lane / 4 + 8 q, column 8 j + 2 (lane % 4) + e.
constexpr int kSums = kColumnsOfTile / 2;
using Sums = float[kSums];

struct Tile {
  int row, column;  // its first, of A and of B
  int item;         // what the walk and the epilogue agree on; tiles of an item follow each other, `first` to `last`
  bool first, last;
  bool none;  // there are no more
};

// Before the first: an epilogue finds nothing in it that it counts or stores.
constexpr Tile kNoTile = {1 << 30, 1 << 30, 0, true, false, false};

// Shared memory: stages of A, stages of B, barriers, tiles, and what an epilogue asks for. A tile's place is used again
// after kTiles more: the copying warp is at most kStages tiles ahead, the epilogue one behind.
constexpr int kTiles = 8;
static_assert(kTiles >= kStages + 2);
constexpr int kBarriers = kStages * (kBytesA + kBytesB);
constexpr int kQueue = kBarriers + 2 * 8 * kStages;
constexpr int kScratch = (kQueue + kTiles * int(sizeof(Tile)) + 127) / 128 * 128;

// A place in the ring of stages. All who use the ring walk through it in the same order.
struct Ring {
  uint32_t base;
  int stage = 0;
  uint32_t parity = 0;

  DEVICE uint32_t a() const { return base + stage * kBytesA; }
  DEVICE uint32_t b() const { return base + kStages * kBytesA + stage * kBytesB; }
  DEVICE uint32_t full() const { return base + kBarriers + 8 * stage; }
  DEVICE uint32_t empty() const { return full() + 8 * kStages; }
  DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  // The place so many stages before this one; its parity is not told.
  DEVICE Ring back(int stages) const { return {base, stage < stages ? stage - stages + kStages : stage - stages}; }
};

DEVICE void initialise(Ring ring, Tile* queue) {
  if (threadIdx.x == 0) {
    queue[kTiles - 1] = kNoTile;
    for (int s = 0; s < kStages; ++s, ring.advance()) {
      barrier_init(ring.full(), 1);
      barrier_init(ring.empty(), kConsumers);
    }
    barrier_init_done();
  }
  __syncthreads();
}

// Of a tile, 128 rows of a matrix as A and 192 as B: copies columns k to k + 64.
struct RowsAsA {
  static constexpr bool kByColumns = false;  // true: products sum over the rows that A has in memory
  const TensorMap& map;

  DEVICE void load(uint32_t barrier, uint32_t to, const Tile& tile, int k) const {
    if (threadIdx.x == 0) tma_load(map, barrier, to, k, tile.row);
  }
};
struct RowsAsB {
  const TensorMap& map;

  DEVICE void load(uint32_t barrier, uint32_t to, const Tile& tile, int k) const {
    if (threadIdx.x == 0) tma_load(map, barrier, to, k, tile.column);
  }
};

// The copying warp. `A` and `B` are as `RowsAsA` and `RowsAsB`, `Walk` has `bool next(Tile&)`; all lanes call them. A
// tile is told to the others with its first stage.
template <class A, class B, class Walk>
DEVICE void produce(Ring ring, Tile* queue, const A& a, const B& b, int steps, Walk& walk) {
  Tile tile;
  int place = 0;
  for (; walk.next(tile); place = (place + 1) % kTiles) {
    UNROLL_1 for (int k = 0; k < steps; ++k, ring.advance()) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
      __syncwarp();  // or a lane that copies nothing might still wait when the stage is filled and released again
      if (threadIdx.x == 0) {
        if (k == 0) queue[place] = tile;
        barrier_expect(ring.full(), kBytesA + kBytesB);
      }
      a.load(ring.full(), ring.a(), tile, k * kColumns);
      b.load(ring.full(), ring.b(), tile, k * kColumns);
    }
  }
  barrier_wait(ring.empty(), ring.parity ^ 1);
  if (threadIdx.x == 0) {
    queue[place].none = true;
    barrier_expect(ring.full(), 0);
  }
}

// One warpgroup's turn to issue products. The other's follows.
struct Turn {
  int consumer;

  DEVICE void take() const { named_barrier(1 + consumer, kConsumers * kWarpgroup); }
  DEVICE void pass() const { named_barrier_arrive(2 - consumer, kConsumers * kWarpgroup); }
};

// Tells the copying warp that this warpgroup has done with a stage.
DEVICE void release(const Ring& ring) {
  if (threadIdx.x % kWarpgroup == 0) barrier_arrive(ring.empty());
}

// Stages of a chain that is under way, not released yet. All who wait for products wait for them in order.
struct Held {
  const Ring& ring;  // after the last of them
  int stages;

  // Waits until products of at most LEFT stages are under way, and releases the others. The branch keeps the wait where
  // it is: within a block of code nvcc 13.0 moves it up, before the exponentials that it is to come after.
  template <int LEFT>
  DEVICE void at_most() {
    if (LEFT > 0 && stages <= LEFT) return;
    wgmma_wait<LEFT>();
    UNROLL_1 for (; stages > LEFT; --stages) release(ring.back(stages));
  }
};

// Issues a chain of `stages` stages. With `hold`, all of them are held afterwards; otherwise each is released once the
// next is under way, and the last alone is held.
template <class T, bool A_BY_COLUMNS>
DEVICE Held issue_chain(Ring& ring, int stages, bool hold, Sums& chain) {
  constexpr int kStepOfA = A_BY_COLUMNS ? 128 : 2;
  const int consumer = threadIdx.x / kWarpgroup - 1;
  wgmma_fence();
  UNROLL_1 for (int i = 0; i < stages; ++i) {
    barrier_wait(ring.full(), ring.parity);
    const uint64_t a = operand(ring.a() + consumer * (kBytesA / kConsumers)), b = operand(ring.b());
    UNROLL for (int k = 0; k < kColumns / 16; ++k) {
      wgmma<T, A_BY_COLUMNS>(chain, a + kStepOfA * k, b + 2 * k, i + k > 0);
    }
    wgmma_commit();
    if (!hold && i > 0) {
      wgmma_wait<1>();
      release(ring.back(1));
    }
    ring.advance();
  }
  return {ring, hold ? stages : 1};
}

// A multiplying warpgroup. `Epilogue` has `void operator()(const Tile&, Sums&, Held&)`, which may change the sums. Now
// and then it lets go of what is held, late enough not to wait: the first half of its work costs the products of two
// warpgroups.
//
// The compiler keeps all sums in registers only where products are issued at one place of the program, hence one loop
// for all chains, and where no branch leads around the epilogue, hence its call for the tile before the first. What a
// thread needs to know of tiles stays in shared memory.
template <class T, bool A_BY_COLUMNS, int CHAIN, class Epilogue>
DEVICE void consume(Ring ring, const Tile* queue, int steps, Epilogue& epilogue) {
  const int consumer = threadIdx.x / kWarpgroup - 1;
  const Turn turn{consumer};
  // The chain's zeros are read by no product. Without them ptxas before 12.9 sees registers defined while products are
  // under way, and makes each product wait for the one before (C7515).
  Sums sums = {}, chain = {};
  int tiles = 0;  // begun so far
  if (consumer == 1) turn.pass();
  for (int k = 0;;) {
    const bool first = k == 0;
    if (first) {
      barrier_wait(ring.full(), ring.parity);
      if (queue[tiles % kTiles].none) break;
      ++tiles;
    }
    const int stages = steps - k < CHAIN ? steps - k : CHAIN;
    turn.take();
    Held held = issue_chain<T, A_BY_COLUMNS>(ring, stages, first, chain);
    turn.pass();
    if (first) {
      epilogue(queue[(tiles + kTiles - 2) % kTiles], sums, held);
      UNROLL for (int i = 0; i < kSums; ++i) sums[i] = 0.f;
    }
    held.at_most<0>();
    UNROLL for (int i = 0; i < kSums; ++i) sums[i] += chain[i];
    k = k + stages < steps ? k + stages : 0;
  }
  Held held{ring, 0};
  epilogue(queue[(tiles + kTiles - 1) % kTiles], sums, held);
  if (consumer == 0) turn.take();
}

// What every kernel does: one warp copies, two warpgroups multiply, and sum over a length of d. Three warps have
// nothing to do, and may do `aside` meanwhile.
struct Nothing {
  DEVICE void operator()() const {}
};
template <class T, int CHAIN = kChain, class A, class B, class Walk, class Epilogue, class Aside = Nothing>
DEVICE void run(uint8_t* shared, const A& a, const B& b, int d, Walk& walk, Epilogue& epilogue,
                const Aside& aside = {}) {
  const Ring ring{shared_address(shared)};
  Tile* queue = reinterpret_cast<Tile*>(shared + kQueue);
  const int steps = int(ceil_div(d, kColumns));
  initialise(ring, queue);
  if (threadIdx.x < kWarpgroup) {
    registers_fewer<40>();
    if (threadIdx.x < kWarp) {
      produce(ring, queue, a, b, steps, walk);
    } else {
      aside();
    }
  } else {
    registers_more<232>();
    consume<T, A::kByColumns, CHAIN>(ring, queue, steps, epilogue);
  }
}

}  // namespace g2rl::cuda::sm90
