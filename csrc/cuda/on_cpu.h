// CUDA's execution model on one CPU thread, so that kernels run, and are tested, on a machine without a GPU.
//
// Every CUDA thread is a fibre. Those of a block run in turn and give way where CUDA threads wait for each
// other: at barriers, exchanges between the lanes of a warp, and whatever else calls `wait_until`. Shared memory is
// poisoned before a block starts, and a block that writes more of it than its launch asked for ends the process. What
// the chip does beside its threads (copies into shared memory) is put off with `later` until no thread can go on: as
// late as a chip may, so that a missing wait shows. A launch in which nothing can go on ends the process with
// "deadlock". A test may make one thread the last that ever goes on (`slow`), or have it all go by chance (`chance`):
// blocks and warps in any order, some warps far behind, copies early, late and out of order.
//
// What PTX leaves undefined, or a chip refuses, ends the process where it can be seen: a launch beyond a chip's limits,
// lanes of a warp that meet at different instructions, threads that count a named barrier's visitors differently.
//
// Not modelled: most fences, speed. Which accesses to memory nothing orders is told by a build for Clang's
// ThreadSanitizer (on_cpu/races.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <source_location>
#include <utility>
#include <vector>

#include "on_cpu/fibre.h"

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace on_cpu {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kSharedMemory = 232448;  // as a block has at most on sm_90
constexpr unsigned kRegisters = 65536;    // of a multiprocessor
using Where = std::source_location;

template <class... A>
[[noreturn]] void refuse(const char* what, A... numbers) {
  if constexpr (sizeof...(numbers) == 0)
    std::fputs(what, stderr);
  else
    std::fprintf(stderr, what, numbers...);
  std::fputc('\n', stderr);
  std::abort();
}

struct Thread {
  std::function<bool()> ready;  // empty: can go on
  Fibre fibre;
  bool done = false;
  uint64_t slot = 0;           // what it shows to other lanes
  unsigned barriers[18] = {};  // how often it came to each named barrier; its warp's, its warpgroup's
  Where exchanges[2];          // where it came to its warp's last two times
  unsigned registers = 0;
  std::vector<std::function<void()>> issued;  // asynchronous products of the group that is being issued,
  std::deque<std::function<void()>> late;     // and groups that this thread has not waited for
  bool fenced = false;                        // registers may be written by products
};

// Hardware's: it opens for those who have come when they are as many as they say, whoever they are.
struct NamedBarrier {
  unsigned count = 0, arrived = 0, phase = 0;
  char ends[2] = {};  // of even and odd phases, for races.h: who leaves late does not know what came after
};

// One launch's state; the process has one launch at a time.
struct State {
  std::vector<Thread> threads;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<uint8_t> storage = std::vector<uint8_t>(kSharedMemory + 1024);
  std::vector<uint8_t> copied = std::vector<uint8_t>(kSharedMemory);  // shared memory, as the copy engine left it
  std::vector<NamedBarrier> named;
  unsigned free_registers = 0;
  bool barriers_told = true;  // to the copy engine
  std::deque<std::function<void()>> pending;
  std::function<void()> body;
  unsigned now = 0, block = 0, grid = 0;
  unsigned slow = ~0u;  // a thread that goes on only when nothing else can: a chip promises no more to any
  std::optional<std::minstd_rand> chance;  // empty: threads and blocks by their numbers, copies last of all

  // Aligned to 1024 bytes, as dynamic shared memory is asked to be.
  uint8_t* shared() {
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(storage.data()) + 1023) / 1024 * 1024);
  }
};

inline State the_state;
inline State& state() { return the_state; }
inline Thread& self() { return state().threads[state().now]; }
inline unsigned thread_index() { return state().now; }
inline uint8_t* shared() { return state().shared(); }

inline void entry() {
  races::acquire(&state().body);
  state().body();
  races::release(&state().grid);  // and not what other blocks' threads acquire
  self().done = true;
  self().fibre.leave();
}

// Gives way until `ready` holds.
inline void wait_until(std::function<bool()> ready) {
  const races::Hidden hidden;
  if (ready()) return;
  self().ready = std::move(ready);
  self().fibre.leave();
}

// Lets every other thread that can go on do so once.
inline void give_way() {
  bool first = true;
  self().ready = [first]() mutable { return !std::exchange(first, false); };
  self().fibre.leave();
}

inline void later(std::function<void()> action) {
  const races::Hidden hidden;
  state().pending.push_back(std::move(action));
}

inline void tell_of_barriers(bool told) { state().barriers_told = told; }

constexpr int kOfWarp = 16, kOfWarpgroup = 17;

// Waits until `count` threads of [first, last) have come to this barrier as often as this one has. Where all are meant,
// those that have ended count as well.
inline void barrier(int id, unsigned first, unsigned last, unsigned count) {
  const unsigned mine = ++self().barriers[id];
  const bool all = count == last - first;
  wait_until([=] {
    unsigned here = 0;
    for (unsigned i = first; i < last; ++i) {
      const Thread& t = state().threads[i];
      const bool counts = t.barriers[id] >= mine || (all && t.done);
      if (all && !counts) return false;
      here += counts;
    }
    return here >= count;
  });
}

inline void block_barrier() {
  const unsigned all = unsigned(state().threads.size());
  char* end = &state().named[0].ends[self().barriers[0] % 2];
  races::release(end);
  barrier(0, 0, all, all);
  races::acquire(end);
}

// Comes to a named barrier; what its phase was.
inline unsigned arrive(int id, unsigned count) {
  NamedBarrier& b = state().named[id];
  if (count % kWarp != 0) refuse("barrier %d: %u threads are no whole warps", id, count);
  if (b.arrived > 0 && b.count != count) refuse("barrier %d: is for %u threads and for %u", id, b.count, count);
  if (std::exchange(self().barriers[id], b.phase + 1) == b.phase + 1) refuse("barrier %d: a thread comes twice", id);
  const unsigned phase = b.phase;
  races::release(&b.ends[phase % 2]);
  b.count = count;
  if (++b.arrived == count) b.arrived = 0, ++b.phase;
  return phase;
}

inline void named_barrier(int id, unsigned count) {
  NamedBarrier& b = state().named[id];
  const unsigned phase = arrive(id, count);
  wait_until([&b, phase] { return b.phase != phase; });
  races::acquire(&b.ends[phase % 2]);
}

// All lanes come to the same one.
inline void warp_barrier(const Where& at) {
  const unsigned first = state().now / kWarp * kWarp, mine = self().barriers[kOfWarp] + 1;
  self().exchanges[mine % 2] = at;
  barrier(kOfWarp, first, first + kWarp, kWarp);
  for (unsigned i = first; i < first + kWarp; ++i) {
    const Thread& t = state().threads[i];
    const auto& other = t.exchanges[mine % 2];
    if (t.barriers[kOfWarp] < mine) refuse("line %u: a lane has ended that others wait for", at.line());
    if (other.line() != at.line() || other.column() != at.column()) {
      refuse("lanes of a warp meet at lines %u of %s and %u of %s", at.line(), at.file_name(), other.line(),
             other.file_name());
    }
  }
}

// Calls f with a function that has, by lane, what each lane of this warp shows.
template <class T, class F>
void with_lanes(T mine, F f, const Where& at = Where::current()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::memcpy(&self().slot, &mine, sizeof mine);
  warp_barrier(at);
  f([first = state().now / kWarp * kWarp](unsigned lane) {
    T value;
    std::memcpy(&value, &state().threads[first + lane].slot, sizeof value);
    return value;
  });
  warp_barrier(at);
}

// Registers of a thread: of a block's there are no more than its launch has taken.
inline void change_registers(unsigned count) {
  const unsigned before = std::exchange(self().registers, count);
  if (count > before) wait_until([more = count - before] { return state().free_registers >= more; });
  state().free_registers += before - count;
}

// Adds sixteen products, which fp32 holds exactly, to a sum as Hopper's tensor cores do: each is cut off two bits below
// fp32's last of the largest, and what they add up to after 24 bits. By arXiv:2512.07004, whose models are right to the
// bit; a chain loses as much of a logit as was measured. Not where anything is infinite or NaN.
inline float add_products(const float (&x)[16], const float (&y)[16], float sum) {
  float products[16], largest = std::fabs(sum), plain = sum;
  for (int k = 0; k < 16; ++k) {
    products[k] = x[k] * y[k];
    plain += products[k];
    largest = std::max(largest, std::fabs(products[k]));
  }
  if (!(std::fabs(plain) < INFINITY) || largest == 0) return plain;
  const double unit = std::ldexp(1., std::ilogb(largest) - 25), per_unit = 1 / unit;
  int64_t total = int64_t(sum * per_unit);
  for (const float product : products) total += int64_t(product * per_unit);
  int64_t last = 1;  // of 24 bits
  while (std::abs(total) >= last << 24) last *= 2;
  return float(double(total / last * last) * unit);
}

constexpr uint8_t kPoison = 0xff;  // NaN in every floating-point format

inline void start(unsigned block, unsigned block_size) {
  State& s = state();
  s.block = block;
  s.threads = std::vector<Thread>(block_size);
  for (Thread& t : s.threads) t.registers = kRegisters / block_size / 8 * 8;
  s.free_registers = 0;
  s.barriers_told = true;
  s.named = std::vector<NamedBarrier>(16);
  if (races::kWatched) {  // blocks are to share nothing
    s.stacks.clear();
    s.storage = std::vector<uint8_t>(s.storage.size());
  }
  std::memset(s.shared(), kPoison, kSharedMemory);
  std::fill(s.copied.begin(), s.copied.end(), kPoison);
  while (s.stacks.size() < s.threads.size()) s.stacks.emplace_back(new char[kStack]);
}

// Does one thing that was put off.
inline void do_pending() {
  State& s = state();
  const auto one = s.pending.begin() + (s.chance ? (*s.chance)() % s.pending.size() : 0);
  const auto action = std::move(*one);
  s.pending.erase(one);
  action();
}

inline void finish(size_t shared_bytes) {
  State& s = state();
  while (!s.pending.empty()) do_pending();  // copies that nobody waited for
  for (size_t i = shared_bytes; i < kSharedMemory; ++i) {
    if (s.shared()[i] == kPoison) continue;
    refuse("block %u wrote byte %zu of shared memory, of which its launch asked for %zu", s.block, i, shared_bytes);
  }
  for (int id = 1; id < 16; ++id) {
    if (s.named[id].arrived > 0) refuse("barrier %d: a block ends, and %u threads came", id, s.named[id].arrived);
  }
}

// Which of the numbers below `count` come in a round, and in which order: some, by chance.
class Order {
 public:
  // One is left out of no round, of most, or of nearly all.
  explicit Order(unsigned count) : numbers_(count), every_(count, 1) {
    std::iota(numbers_.begin(), numbers_.end(), 0);
    if (auto& chance = state().chance)
      for (unsigned& every : every_) every = 1 << 3 * ((*chance)() % 3);
  }
  template <class F>
  void for_each(bool all, const F& f) {
    auto& chance = state().chance;
    if (chance) std::shuffle(numbers_.begin(), numbers_.end(), *chance);
    for (const unsigned i : numbers_)
      if (all || !chance || (*chance)() % every_[i] == 0) f(i);
  }

 private:
  std::vector<unsigned> numbers_, every_;
};

// Lets a thread go on if it can.
inline bool step(Thread& t, size_t& left) {
  State& s = state();
  if (t.done || (t.ready && !t.ready())) return false;
  t.ready = nullptr;
  t.fibre.resume(s.stacks[s.now].get(), kStack, entry);
  left -= t.done;
  return true;
}

// Lets every thread of a warp go on that can; whether one could.
inline bool step_warp(unsigned warp, size_t& left) {
  State& s = state();
  const unsigned first = warp * kWarp, lanes = std::min<unsigned>(kWarp, unsigned(s.threads.size()) - first);
  const unsigned leader = s.chance ? (*s.chance)() % lanes : 0;
  bool moved = false;
  for (unsigned i = 0; i < lanes; ++i) {
    s.now = first + (leader + i) % lanes;
    if (s.now != s.slow) moved |= step(s.threads[s.now], left);
  }
  return moved;
}

inline void run_block() {
  State& s = state();
  Order warps((unsigned(s.threads.size()) + kWarp - 1) / kWarp);
  const unsigned copies_every = s.chance ? 1 << 3 * ((*s.chance)() % 3) : 0;
  int idle = 0;  // rounds in which nothing moved
  for (size_t left = s.threads.size(); left > 0;) {
    bool moved = false;
    warps.for_each(idle > 0, [&](unsigned warp) { moved |= step_warp(warp, left); });
    if (s.chance && !s.pending.empty() && (*s.chance)() % copies_every == 0) {
      do_pending();
      moved = true;
    }
    idle = moved ? 0 : idle + 1;
    if (moved) continue;
    if (!s.pending.empty()) {
      do_pending();
      continue;
    }
    if (idle < (s.chance ? 3 : 2)) continue;  // threads that gave way, or were left out, go on now
    s.now = s.slow;
    const auto slow_moves = [&] { return s.now < s.threads.size() && step(s.threads[s.now], left); };
    if (slow_moves() || slow_moves()) {  // where it gave way, the second time
      idle = 0;
      continue;
    }
    refuse("deadlock: block %u, %zu threads wait for ever", s.block, left);
  }
}

template <class... P, class... A>
void launch(unsigned grid, unsigned block_size, size_t shared_bytes, void (*kernel)(P...), const A&... arguments) {
  State& s = state();
  if (block_size > 1024 || block_size % kWarp != 0 || shared_bytes > kSharedMemory) {
    refuse("a launch of blocks of %u threads and %zu bytes", block_size, shared_bytes);
  }
  s.grid = grid;
  s.body = [&] { kernel(arguments...); };
  {
    const races::Hidden hidden;
    Order(grid).for_each(true, [&](unsigned block) {
      start(block, block_size);
      races::release(&s.body);
      run_block();
      finish(shared_bytes);
    });
  }
  races::acquire(&s.grid);
}

// Runs tests with some orders of blocks, warps and copies.
template <class F>
void by_chance(int orders, const F& tests) {
  for (int seed = 1; seed <= orders; ++seed) {
    state().chance.emplace(seed);
    tests();
  }
  state().chance.reset();
}

// threadIdx and its like read as variables.
template <unsigned (*X)()>
struct Index {
  struct Member {
    operator unsigned() const { return X(); }
  };
  [[no_unique_address]] Member x;
};
inline unsigned block_index() { return state().block; }
inline unsigned block_size() { return unsigned(state().threads.size()); }
inline unsigned grid_size() { return state().grid; }

}  // namespace on_cpu

inline constexpr on_cpu::Index<on_cpu::thread_index> threadIdx{};
inline constexpr on_cpu::Index<on_cpu::block_index> blockIdx{};
inline constexpr on_cpu::Index<on_cpu::block_size> blockDim{};
inline constexpr on_cpu::Index<on_cpu::grid_size> gridDim{};

inline void __syncthreads() { on_cpu::block_barrier(); }
inline void __syncwarp(unsigned = ~0u, const on_cpu::Where& at = on_cpu::Where::current()) {
  on_cpu::Thread& first = on_cpu::state().threads[threadIdx.x / on_cpu::kWarp * on_cpu::kWarp];
  void* end = &first.exchanges[on_cpu::self().barriers[on_cpu::kOfWarp] % 2];  // as those of NamedBarrier
  on_cpu::races::release(end);
  on_cpu::warp_barrier(at);
  on_cpu::races::acquire(end);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, const on_cpu::Where& at = on_cpu::Where::current()) {
  on_cpu::with_lanes(value, [&](auto of) { value = of(on_cpu::thread_index() % on_cpu::kWarp ^ unsigned(mask)); }, at);
  return value;
}
inline unsigned __ballot_sync(unsigned, bool predicate, const on_cpu::Where& at = on_cpu::Where::current()) {
  unsigned bits = 0;
  on_cpu::with_lanes(
      predicate,
      [&](auto of) {
        for (unsigned lane = 0; lane < on_cpu::kWarp; ++lane) bits |= unsigned(of(lane)) << lane;
      },
      at);
  return bits;
}
inline bool __any_sync(unsigned mask, bool predicate, const on_cpu::Where& at = on_cpu::Where::current()) {
  return __ballot_sync(mask, predicate, at) != 0;
}
