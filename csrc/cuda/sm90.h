// What kernels ask of Hopper: barriers that count bytes, TMA copies, products of warpgroups, clusters. PTX for nvcc;
// for a CPU the same semantics in C++, barrier phases, byte counts, zero fill, swizzle and matrix descriptors included.
// Products and copies happen on a CPU as late as the chip may let them, so that a missing wait shows.
//
// PTX ISA: https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions
#pragma once

#include "head.h"
#include "wgmma.h"

namespace g2rl::cuda::sm90 {

// Rows of a tile in shared memory are 128 bytes, 64 numbers of 16 bits; groups of eight rows (1024 bytes) are swizzled:
// 16-byte chunk c of row r lies at c ^ (r % 8).
constexpr int kRowBytes = 128;
constexpr int kColumns = 64;
constexpr int kWarpgroup = 128;

#ifdef __CUDACC__

using TensorMap = CUtensorMap;

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// After `barrier_init`, before other threads, the copy engine or the cluster use the barrier.
DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives, and makes the phase wait for so many bytes.
DEVICE void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives at the same barrier of another block of the cluster.
DEVICE void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Waits until the phase of this parity is over.
DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred over;\n"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%0], %1;\n"
      "@over bra done;\n"
      "bra again;\n"
      "done: }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies the map's box at (row, column) to shared memory; its bytes count at `barrier`.
DEVICE void tma_load(const TensorMap& map, uint32_t barrier, uint32_t to, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// The same into every block of the cluster whose bit is set, at the same address and barrier of each.
DEVICE void tma_load_all(const TensorMap& map, uint32_t barrier, uint32_t to, int column, int row, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}
DEVICE void tma_prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Barriers among some of a block's threads, by number from 1 on; `named_barrier_arrive` does not wait.
DEVICE void named_barrier(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers of a thread, for a whole warpgroup; kernels start with an equal share for all.
template <int N>
DEVICE void registers_more() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void registers_fewer() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until no more than `N` groups are under way.
template <int N>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#else  // a CPU

struct TensorMap {
  const uint8_t* base;
  int64_t rows, columns, stride;  // stride in bytes
  int box_rows;
};

namespace emulated {

// In shared memory, as the chip's barrier is: eight bytes.
struct Barrier {
  int16_t arrivals, pending;
  int32_t bytes_and_parity;  // 2 * bytes still expected + parity of the current phase
};

inline uint8_t* shared(uint32_t address, uint32_t rank) { return on_cpu::state().blocks[rank].shared + address; }
inline Barrier& barrier(uint32_t address, uint32_t rank) { return *reinterpret_cast<Barrier*>(shared(address, rank)); }
inline void settle(Barrier& b) {
  if (b.pending == 0 && b.bytes_and_parity >> 1 == 0) {
    b.bytes_and_parity ^= 1;
    b.pending = b.arrivals;
  }
}
inline void arrive(Barrier& b, int bytes) {
  if (b.pending <= 0) {
    std::fprintf(stderr, "more arrivals at a barrier than it was made for\n");
    std::abort();
  }
  b.bytes_and_parity += 2 * bytes;
  --b.pending;
  settle(b);
}
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline void copy(const TensorMap& map, uint32_t barrier_address, uint32_t to, int column, int row, uint32_t rank) {
  if (to % 1024) {
    std::fprintf(stderr, "TMA to an address that is no multiple of 1024\n");
    std::abort();
  }
  uint8_t* memory = shared(0, rank);
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      const bool inside = row + r < map.rows && column + c < map.columns;
      uint16_t value = 0;
      if (inside) std::memcpy(&value, map.base + (row + r) * map.stride + 2 * (column + c), 2);
      std::memcpy(memory + swizzled(to + r * kRowBytes + 2 * c), &value, 2);
    }
  }
  Barrier& b = barrier(barrier_address, rank);
  b.bytes_and_parity -= 2 * map.box_rows * kRowBytes;
  settle(b);
}

// Element (row, k) of the operand that a descriptor points to.
template <class T>
float element(uint64_t descriptor, int row, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, step = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) {
    std::fprintf(stderr, "a matrix descriptor without the 128-byte swizzle\n");
    std::abort();
  }
  T value;
  const uint32_t at = swizzled(start + row / 8 * step + row % 8 * kRowBytes + 2 * k);
  std::memcpy(&value, on_cpu::self().block->shared + at, 2);
  return to_float(value);
}

}  // namespace emulated

inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const uint8_t*>(p) - on_cpu::self().block->shared);
}
inline uint32_t cluster_rank() { return on_cpu::self().block->rank; }
inline void barrier_init(uint32_t barrier, int arrivals) {
  emulated::barrier(barrier, cluster_rank()) = {int16_t(arrivals), int16_t(arrivals), 0};
}
inline void barrier_init_done() {}
inline void barrier_expect(uint32_t barrier, int bytes) {
  emulated::arrive(emulated::barrier(barrier, cluster_rank()), bytes);
}
inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  emulated::arrive(emulated::barrier(barrier, rank), 0);
}
inline void barrier_arrive(uint32_t barrier) { barrier_arrive_at(barrier, cluster_rank()); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  emulated::Barrier& b = emulated::barrier(barrier, cluster_rank());
  on_cpu::wait_until([&b, parity] { return uint32_t(b.bytes_and_parity & 1) != parity; });
}
inline void tma_load(const TensorMap& map, uint32_t barrier, uint32_t to, int column, int row) {
  on_cpu::later([=, rank = cluster_rank()] { emulated::copy(map, barrier, to, column, row, rank); });
}
inline void tma_load_all(const TensorMap& map, uint32_t barrier, uint32_t to, int column, int row, uint16_t blocks) {
  for (uint32_t rank = 0; rank < on_cpu::state().blocks.size(); ++rank) {
    if (blocks >> rank & 1) on_cpu::later([=] { emulated::copy(map, barrier, to, column, row, rank); });
  }
}
inline void tma_prefetch(const TensorMap&) {}
inline void cluster_barrier() { on_cpu::cluster_barrier(); }
inline void named_barrier(int id, int threads) { on_cpu::block_barrier(id, threads); }
inline void named_barrier_arrive(int id, int) { ++on_cpu::self().barriers[id]; }
template <int N>
void registers_more() {}
template <int N>
void registers_fewer() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {
  auto& self = on_cpu::self();
  self.late.push_back([group = std::move(self.issued)] {
    for (const auto& product : group) product();
  });
  self.issued.clear();
}
template <int N>
void wgmma_wait() {
  // Other threads go on first: a stage that was released too early is overwritten by now.
  for (int i = 0; i < 4; ++i) on_cpu::give_way();
  auto& late = on_cpu::self().late;
  for (; late.size() > N; late.pop_front()) late.front()();
}

template <class T, int N>
void multiply_now(float* d, uint64_t a, uint64_t b, bool add) {
  const int thread = on_cpu::thread_index() % kWarpgroup, warp = thread / kWarp, lane = thread % kWarp;
  float x[2][16];
  for (int h = 0; h < 2; ++h) {
    for (int k = 0; k < 16; ++k) x[h][k] = emulated::element<T>(a, warp * 16 + lane / 4 + 8 * h, k);
  }
  for (int j = 0; j < N / 8; ++j) {
    for (int e = 0; e < 2; ++e) {
      float sums[2] = {0, 0};
      for (int k = 0; k < 16; ++k) {
        const float y = emulated::element<T>(b, 8 * j + 2 * (lane % 4) + e, k);
        for (int h = 0; h < 2; ++h) sums[h] += x[h][k] * y;
      }
      for (int h = 0; h < 2; ++h) {
        float& out = d[4 * j + 2 * h + e];
        out = sums[h] + (add ? out : 0.f);
      }
    }
  }
}

template <class T, int N, int REGISTERS>
void wgmma(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool add) {
  on_cpu::self().issued.push_back([=, out = &d[0]] { multiply_now<T, N>(out, a, b, add); });
}

#endif

// An operand for `wgmma`: rows of 128 bytes from `address` on, swizzled, k along the row. Sixteen columns further on is
// +2, whatever the row.
DEVICE uint64_t operand(uint32_t address) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// How TMA sees a matrix [rows, columns] of 16-bit numbers whose rows lie `stride` numbers apart: boxes of `box_rows`
// rows and 64 columns, 0 beyond its edges. 0 or an error code.
int make_tensor_map(TensorMap& map, const void* base, Dtype dtype, int64_t rows, int64_t columns, int64_t stride,
                    int box_rows);

}  // namespace g2rl::cuda::sm90
