// The product that all Hopper kernels of the head share: tiles A B^T of 128 x up to 192 logits, one after another.
//
// A block has three warpgroups. A thread of the first copies, by TMA, 64 columns of a tile of A and of B at a time into
// a ring of stages; the other two multiply, 64 rows of A each. What limits such a product on this chip is the traffic
// from L2, 5.6 TB/s, so blocks of a cluster share tiles: each copies a part of them, to all that work on the same.
//
// Tensor cores truncate what they add up: after k products a logit is 9e-10 k of itself too small (measured on an
// H100). So a chain of kChain stages starts from 0 and is added to the sums in fp32, rounded. That costs registers, 96
// for a chain and 96 for the sums, and is why a tile has 192 columns and not 256. It also buys something: while the
// first chain of the next tile is multiplied, the sums of the last one are still there, and its exponentials are
// computed meanwhile. The two warpgroups take turns in issuing chains, so that one adds while the other multiplies.
#pragma once

#include "sm90.h"

namespace g2rl::cuda::sm90 {

constexpr int kRows = 128;     // of A in a tile
constexpr int kMaxRows = 192;  // of B, at most
constexpr int kStages = 5;
constexpr int kChain = 3;  // stages
constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kBytesA = kRows * kRowBytes, kBytesB = kMaxRows * kRowBytes;
// Of B at a time: full tiles in halves, others in boxes of 64 rows, the rest in boxes of 16.
constexpr int kFullBox = kMaxRows / 2, kBigBox = 64, kSmallBox = 16;

// 64 rows x R / 2 columns of logits of a warpgroup, as `wgmma` lays them out: element 4 j + 2 q + e of a thread is row
// 16 warp + lane / 4 + 8 q, column 8 j + 2 (lane % 4) + e.
constexpr int kSums = kMaxRows / 2;
using Sums = float[kSums];

struct Tile {
  int a_row, b_row;
  int b_rows;  // a multiple of 16; 0: there are no more tiles
  int item;    // what the tile belongs to: the tiles of an item follow each other, `first` to `last`
  bool first, last;
};

// Before the first: an epilogue finds nothing in it that it counts or stores.
constexpr Tile kNoTile = {1 << 30, 1 << 30, 16, 0, true, false};

// Shared memory: stages of A, stages of B, barriers, tiles, and what an epilogue asks for. A tile's place is used again
// after kTiles more: the copying thread is at most kStages tiles ahead, the epilogue one behind.
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
};

// Blocks of a cluster stand in SHARE_B rows and SHARE_A columns: those of a row have the same tile of A, those of a
// column the same tile of B.
template <int SHARE_A, int SHARE_B>
struct Cluster {
  static constexpr int kBlocks = SHARE_A * SHARE_B;
  static constexpr int kShareA = SHARE_A, kShareB = SHARE_B;

  static DEVICE int rank() { return kBlocks > 1 ? int(cluster_rank()) : 0; }
  static DEVICE int row(int rank) { return rank % SHARE_B; }
  static DEVICE int column(int rank) { return rank / SHARE_B; }
  static DEVICE int row() { return row(rank()); }
  static DEVICE int column() { return column(rank()); }
  static DEVICE int index() { return int(blockIdx.x) / kBlocks; }
  static DEVICE int count() { return int(gridDim.x) / kBlocks; }

  static DEVICE uint16_t same_row() {
    uint16_t blocks = 0;
    UNROLL for (int c = 0; c < SHARE_A; ++c) blocks |= 1 << (c * SHARE_B);
    return uint16_t(blocks << row());
  }
  static DEVICE uint16_t same_column() { return uint16_t(((1 << SHARE_B) - 1) << (column() * SHARE_B)); }
};

template <class C>
DEVICE void initialise(Ring ring, Tile* queue) {
  if (threadIdx.x == 0) {
    queue[kTiles - 1] = kNoTile;
    for (int s = 0; s < kStages; ++s, ring.advance()) {
      barrier_init(ring.full(), 1);
      // Of all blocks whose copies go to this one's stage, or its to theirs.
      barrier_init(ring.empty(), kConsumers * (C::kShareA + C::kShareB - 1));
    }
    barrier_init_done();
  }
  __syncthreads();
  if (C::kBlocks > 1) cluster_barrier();
}

// Maps of a matrix that serves as B.
struct Boxes {
  TensorMap big, small;
};

template <bool SHARED_BY_MANY>
DEVICE void load(const TensorMap& map, const Ring& ring, uint32_t to, int column, int row, uint16_t blocks) {
  if (SHARED_BY_MANY) {
    tma_load_all(map, ring.full(), to, column, row, blocks);
  } else {
    tma_load(map, ring.full(), to, column, row);
  }
}

// The copying thread. `Walk` has `bool next(Tile&)`, with as many tiles for all blocks of a cluster. BIG: rows of
// b.big. A tile is told to the others with its first stage.
template <class C, int BIG, class Walk>
DEVICE void produce(Ring ring, Tile* queue, const TensorMap& a, const Boxes& b, int steps, Walk walk) {
  constexpr int kPartOfA = kRows / C::kShareA;
  const int row = C::row(), column = C::column();
  const uint16_t same_row = C::same_row(), same_column = C::same_column();
  Tile tile;
  int place = 0;
  for (; walk.next(tile); place = (place + 1) % kTiles) {
    const int big = tile.b_rows / BIG, boxes = big + tile.b_rows % BIG / kSmallBox;
    UNROLL_1 for (int k = 0; k < steps; ++k, ring.advance()) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
      if (k == 0) queue[place] = tile;
      barrier_expect(ring.full(), kBytesA + tile.b_rows * kRowBytes);
      load<(C::kShareA > 1)>(a, ring, ring.a() + column * kPartOfA * kRowBytes, k * kColumns,
                             tile.a_row + column * kPartOfA, same_row);
      UNROLL_1 for (int i = row; i < boxes; i += C::kShareB) {
        const int from = i < big ? i * BIG : big * BIG + (i - big) * kSmallBox;
        load<(C::kShareB > 1)>(i < big ? b.big : b.small, ring, ring.b() + from * kRowBytes, k * kColumns,
                               tile.b_row + from, same_column);
      }
    }
  }
  barrier_wait(ring.empty(), ring.parity ^ 1);
  queue[place].b_rows = 0;
  barrier_expect(ring.full(), 0);
}

// One warpgroup's turn to issue products. The other's follows.
struct Turn {
  int consumer;

  DEVICE void take() const { named_barrier(1 + consumer, kConsumers * kWarpgroup); }
  DEVICE void pass() const { named_barrier_arrive(2 - consumer, kConsumers * kWarpgroup); }
};

// Tells the copying threads of all blocks that copy to a stage of this one that this warpgroup has done with it.
template <class C>
DEVICE void release(const Ring& ring) {
  const int thread = threadIdx.x % kWarpgroup;
  if (C::kBlocks == 1) {
    if (thread == 0) barrier_arrive(ring.empty());
  } else if (thread < C::kBlocks && ((C::same_row() | C::same_column()) >> thread & 1)) {
    barrier_arrive_at(ring.empty(), thread);
  }
}

// Issues a chain of `stages` stages, whose products are under way afterwards.
template <class T, int COLUMNS>
DEVICE void issue_chain(Ring& ring, int consumer, int stages, Sums& chain) {
  wgmma_fence();
  UNROLL_1 for (int i = 0; i < stages; ++i, ring.advance()) {
    barrier_wait(ring.full(), ring.parity);
    const uint64_t a = operand(ring.a() + consumer * (kBytesA / kConsumers)), b = operand(ring.b());
    UNROLL for (int k = 0; k < kColumns / 16; ++k) wgmma<T, COLUMNS>(chain, a + 2 * k, b + 2 * k, i + k > 0);
  }
  wgmma_commit();
}

// The same for tiles of fewer columns.
template <class T>
DEVICE void issue_ragged_chain(Ring& ring, int consumer, int stages, int columns, Sums& chain) {
  switch (columns) {
#define G2RL_CASE(N)                                  \
  case N:                                             \
    issue_chain<T, N>(ring, consumer, stages, chain); \
    break;
    G2RL_CASE(16)
    G2RL_CASE(32)
    G2RL_CASE(48)
    G2RL_CASE(64)
    G2RL_CASE(80)
    G2RL_CASE(96)
    G2RL_CASE(112)
    G2RL_CASE(128)
    G2RL_CASE(144)
    G2RL_CASE(160)
    G2RL_CASE(176)
    G2RL_CASE(192)
#undef G2RL_CASE
  }
}

// A multiplying warpgroup. `Epilogue` has `void operator()(const Tile&, Sums&)`, which may change the sums. RAGGED:
// tiles have fewer than 192 columns now and then.
//
// One loop over chains, so that products are issued at one place of the program: of several, the compiler would wait
// between them. The epilogue is called for the tile before the first, too: a branch around it would cost copies of all
// sums. What a thread needs to know of tiles stays in shared memory: registers are full.
template <class T, class C, bool RAGGED, class Epilogue>
DEVICE void consume(Ring ring, const Tile* queue, int steps, Epilogue& epilogue) {
  const int consumer = threadIdx.x / kWarpgroup - 1;
  const Turn turn{consumer};
  Sums sums = {}, chain;
  int tiles = 0;  // begun so far
  if (consumer == 1) turn.pass();
  for (int k = 0;; k = k + kChain < steps ? k + kChain : 0) {
    if (k == 0) {
      barrier_wait(ring.full(), ring.parity);
      if (queue[tiles % kTiles].b_rows == 0) break;
      ++tiles;
    }
    const int stages = steps - k < kChain ? steps - k : kChain;
    Ring first = ring;
    turn.take();
    if constexpr (RAGGED) {
      issue_ragged_chain<T>(ring, consumer, stages, queue[(tiles - 1) % kTiles].b_rows, chain);
    } else {
      issue_chain<T, kMaxRows>(ring, consumer, stages, chain);
    }
    turn.pass();
    if (k == 0) {
      epilogue(queue[(tiles + kTiles - 2) % kTiles], sums);
      UNROLL for (int i = 0; i < kSums; ++i) sums[i] = 0.f;
    }
    wgmma_wait<0>();
    UNROLL for (int i = 0; i < kSums; ++i) sums[i] += chain[i];
    UNROLL_1 for (int i = 0; i < stages; ++i, first.advance()) release<C>(first);
  }
  epilogue(queue[(tiles + kTiles - 1) % kTiles], sums);
  if (consumer == 0) turn.take();
}

// What every kernel does: one thread copies, two warpgroups multiply.
template <class T, class C, bool RAGGED, class Walk, class Epilogue>
DEVICE void run(uint8_t* shared, const TensorMap& a, const Boxes& b, int d, const Walk& walk, Epilogue& epilogue) {
  const Ring ring{shared_address(shared)};
  Tile* queue = reinterpret_cast<Tile*>(shared + kQueue);
  const int steps = int(ceil_div(d, kColumns));
  initialise<C>(ring, queue);
  if (threadIdx.x < kWarpgroup) {
    registers_fewer<40>();
    if (threadIdx.x == 0) produce<C, RAGGED ? kBigBox : kFullBox>(ring, queue, a, b, steps, walk);
  } else {
    registers_more<232>();
    consume<T, C, RAGGED>(ring, queue, steps, epilogue);
  }
  // A block that has left can receive neither copies nor arrivals.
  if (C::kBlocks > 1) cluster_barrier();
}

}  // namespace g2rl::cuda::sm90
