// What kernels ask of Hopper: barriers that count bytes, TMA copies, products of warpgroups. PTX for nvcc;
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
// After `barrier_init`, before other threads and the copy engine use the barrier.
DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives, and makes the phase wait for so many bytes.
DEVICE void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Waits until the phase of this parity is over.
DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred over;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
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

  // For races.h, as those of on_cpu::NamedBarrier.
  void* end(uint32_t parity) { return reinterpret_cast<char*>(this) + (parity & 1); }
};

inline Barrier& barrier(uint32_t address) { return *reinterpret_cast<Barrier*>(on_cpu::shared() + address); }
inline void settle(Barrier& b) {
  if (b.pending == 0 && b.bytes_and_parity >> 1 == 0) {
    b.bytes_and_parity ^= 1;
    b.pending = b.arrivals;
  }
}
inline void arrive(Barrier& b, int bytes) {
  if (b.pending <= 0) on_cpu::refuse("more arrivals at a barrier than it was made for");
  b.bytes_and_parity += 2 * bytes;
  --b.pending;
  settle(b);
}
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// What the copy engine writes or products read is nothing that threads have written: those are different ways to
// memory, and a fence between them that is not modelled.
inline void as_copied(uint32_t address, size_t size) {
  if (std::memcmp(on_cpu::shared() + address, &on_cpu::state().copied[address], size) == 0) return;
  on_cpu::refuse("byte %u of shared memory is a thread's, without fence.proxy.async", address);
}

inline void copy(const TensorMap& map, Barrier& barrier, uint8_t* memory, uint32_t to, int column, int row) {
  if (to % 1024) on_cpu::refuse("TMA to an address that is no multiple of 1024");
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      const bool inside = row + r < map.rows && column + c < map.columns;
      uint16_t value = 0;
      if (inside) std::memcpy(&value, map.base + (row + r) * map.stride + 2 * (column + c), 2);
      const uint32_t at = swizzled(to + r * kRowBytes + 2 * c);
      as_copied(at, 2);
      std::memcpy(memory + at, &value, 2);
      std::memcpy(&on_cpu::state().copied[at], &value, 2);
    }
  }
  barrier.bytes_and_parity -= 2 * map.box_rows * kRowBytes;
  settle(barrier);
}

// What a descriptor points to: rows of 128 bytes, in groups of eight that lie `step` bytes apart.
struct Operand {
  uint32_t start, step;

  explicit Operand(uint64_t descriptor) : start((descriptor & 0x3fff) << 4), step((descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1) on_cpu::refuse("a matrix descriptor without the 128-byte swizzle");
  }

  // So many neighbours of a row, within 16 bytes.
  template <class T, int COUNT>
  void read(int row, int column, float* x) const {
    T numbers[COUNT];
    const uint32_t at = swizzled(start + row / 8 * step + row % 8 * kRowBytes + 2 * column);
    as_copied(at, sizeof numbers);
    std::memcpy(numbers, on_cpu::shared() + at, sizeof numbers);
    for (int i = 0; i < COUNT; ++i) x[i] = to_float(numbers[i]);
  }
};

// The sixteen numbers of one row of a product's operand, which may be a column in memory.
template <class T, bool BY_COLUMNS>
void sixteen(const Operand& of, int row, float (&x)[16]) {
  if (BY_COLUMNS) {
    for (int k = 0; k < 16; ++k) of.read<T, 1>(k, row, &x[k]);
  } else {
    for (int k = 0; k < 16; k += 8) of.read<T, 8>(row, k, &x[k]);
  }
}

}  // namespace emulated

inline uint32_t shared_address(const void* p) { return uint32_t(static_cast<const uint8_t*>(p) - on_cpu::shared()); }
inline void barrier_init(uint32_t barrier, int arrivals) {
  emulated::barrier(barrier) = {int16_t(arrivals), int16_t(arrivals), 0};
  on_cpu::tell_of_barriers(false);
}
inline void barrier_init_done() { on_cpu::tell_of_barriers(true); }
inline void barrier_expect(uint32_t barrier, int bytes) {
  emulated::Barrier& b = emulated::barrier(barrier);
  on_cpu::races::release(b.end(b.bytes_and_parity));
  emulated::arrive(b, bytes);
}
inline void barrier_arrive(uint32_t barrier) { barrier_expect(barrier, 0); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  emulated::Barrier& b = emulated::barrier(barrier);
  on_cpu::wait_until([&b, parity] { return uint32_t(b.bytes_and_parity & 1) != parity; });
  on_cpu::races::acquire(b.end(parity));
}
inline void tma_load(const TensorMap& map, uint32_t barrier, uint32_t to, int column, int row) {
  if (!on_cpu::state().barriers_told) on_cpu::refuse("TMA before the fence that tells it of barriers");
  on_cpu::later([=, &b = emulated::barrier(barrier), memory = on_cpu::shared()] {
    emulated::copy(map, b, memory, to, column, row);
  });
}
inline void named_barrier(int id, int threads) { on_cpu::named_barrier(id, threads); }
inline void named_barrier_arrive(int id, int threads) { on_cpu::arrive(id, threads); }
template <int N>
void registers_more() {
  static_assert(N % 8 == 0 && N <= 256);
  if (on_cpu::self().registers > N) on_cpu::refuse("%d registers are fewer", N);
  on_cpu::change_registers(N);
}
template <int N>
void registers_fewer() {
  static_assert(N % 8 == 0 && N >= 24);
  if (on_cpu::self().registers < N) on_cpu::refuse("%d registers are more", N);
  on_cpu::change_registers(N);
}
inline void wgmma_fence() { on_cpu::self().fenced = true; }
inline void wgmma_commit() {
  auto& self = on_cpu::self();
  self.late.push_back([group = std::move(self.issued)] {
    for (const auto& product : group) product();
  });
  self.issued.clear();
}
template <int N>
void wgmma_wait() {
  const on_cpu::races::Hidden hidden;
  // Other threads go on first: a stage that was released too early is overwritten by now.
  for (int i = 0; i < 4; ++i) on_cpu::give_way();
  auto& late = on_cpu::self().late;
  for (; late.size() > N; late.pop_front()) late.front()();
  if (N == 0) on_cpu::self().fenced = false;  // the thread has its registers again
  // Products are the warpgroup's: they have ended for no thread before they have for all.
  const unsigned first = on_cpu::thread_index() / kWarpgroup * kWarpgroup;
  on_cpu::barrier(on_cpu::kOfWarpgroup, first, first + kWarpgroup, kWarpgroup);
}

template <class T, bool A_BY_COLUMNS>
void multiply_now(float* d, const emulated::Operand& a, const emulated::Operand& b, bool add) {
  const int thread = on_cpu::thread_index() % kWarpgroup, warp = thread / kWarp, lane = thread % kWarp;
  float x[2][16];
  for (int h = 0; h < 2; ++h) emulated::sixteen<T, A_BY_COLUMNS>(a, warp * 16 + lane / 4 + 8 * h, x[h]);
  for (int i = 0; i < 48; ++i) {
    float y[16];
    emulated::sixteen<T, false>(b, i / 2 * 8 + lane % 4 * 2 + i % 2, y);
    for (int h = 0; h < 2; ++h) {
      float& out = d[i / 2 * 4 + 2 * h + i % 2];
      out = on_cpu::add_products(x[h], y, add ? out : 0.f);
    }
  }
}

template <class T, bool A_BY_COLUMNS>
void wgmma(float (&d)[96], uint64_t a, uint64_t b, bool add) {
  if (!on_cpu::self().fenced) on_cpu::refuse("a product whose registers no wgmma.fence has handed over");
  on_cpu::self().issued.push_back(
      [=, out = &d[0]] { multiply_now<T, A_BY_COLUMNS>(out, emulated::Operand(a), emulated::Operand(b), add); });
}

#endif

// An operand for `wgmma`: rows of 128 bytes from `address` on, swizzled. Where k runs along a row, sixteen of it
// further on is +2, whatever the row; where rows are k, as A's may be, it is +128. The leading offset, 1, is not read
// in either form: A has no more than 64 columns.
DEVICE uint64_t operand(uint32_t address) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// How TMA sees a matrix [rows, columns] of 16-bit numbers whose rows lie `stride` numbers apart: boxes of `box_rows`
// rows and 64 columns, 0 beyond its edges. 0 or an error code.
int make_tensor_map(TensorMap& map, const void* base, Dtype dtype, int64_t rows, int64_t columns, int64_t stride,
                    int box_rows);

}  // namespace g2rl::cuda::sm90
