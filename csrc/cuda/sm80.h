// What kernels ask of chips since Ampere: asynchronous copies of 16 bytes, fragments of matrices from shared memory,
// products of warps. PTX for nvcc; for a CPU the same semantics in C++, where copies happen when they are waited for.
//
// PTX ISA: https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-mma
#pragma once

#include "platform.h"

namespace g2rl::cuda::sm80 {

#ifdef __CUDACC__

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Copies `bytes` (0 to 16) to shared memory and fills up 16 with zeros. Both addresses are multiples of 16.
DEVICE void copy_async(uint8_t* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until no more than `N` of this thread's groups are under way.
template <int N>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four matrices of 8 x 8 numbers of 16 bits: lane l names the address of row l % 8 of matrix l / 8, and gets of each
// matrix two numbers: row l / 4, columns 2 (l % 4) and the next.
DEVICE void load_matrices(const uint8_t* row, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices: column l / 4, rows 2 (l % 4) and the next.
DEVICE void load_matrices_transposed(const uint8_t* row, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// d [16, 8] += a [16, 16] b [8, 16]^T. d[2 q + e] is row l / 4 + 8 q, column 2 (l % 4) + e.
#define G2RL_MMA(TYPE, NAME)                                                               \
  DEVICE void multiply(TYPE, float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                             \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"                               \
        "{%0, %1, %2, %3};"                                                                \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                   \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                   \
  }
G2RL_MMA(bf16, "bf16")
G2RL_MMA(fp16, "f16")
#undef G2RL_MMA

#else  // a CPU

inline void copy_async(uint8_t* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    on_cpu::refuse("an asynchronous copy from or to an address that is no multiple of 16");
  }
  on_cpu::self().late.push_back([=] {
    std::memset(to, 0, 16);
    if (bytes) std::memcpy(to, from, bytes);
  });
}
// An empty function ends a group.
inline void copy_commit() { on_cpu::self().late.emplace_back(); }
template <int N>
void copy_wait() {
  auto& late = on_cpu::self().late;
  int groups = 0;
  for (const auto& copy : late) groups += !copy;
  for (; groups > N; late.pop_front()) {
    if (late.front()) {
      late.front()();
    } else {
      --groups;
    }
  }
}

namespace emulated {

struct Operands {
  uint32_t a[4], b[2];
};

}  // namespace emulated

inline void load_matrices(const uint8_t* row, uint32_t (&x)[4]) {
  const int lane = threadIdx.x % kWarp;
  on_cpu::with_lanes(row, [&](auto of) {
    for (int i = 0; i < 4; ++i) std::memcpy(&x[i], of(8 * i + lane / 4) + lane % 4 * 4, 4);
  });
}
inline void load_matrices_transposed(const uint8_t* row, uint32_t (&x)[4]) {
  const int lane = threadIdx.x % kWarp;
  on_cpu::with_lanes(row, [&](auto of) {
    for (int i = 0; i < 4; ++i) {
      uint16_t numbers[2];
      for (int e = 0; e < 2; ++e) std::memcpy(&numbers[e], of(8 * i + lane % 4 * 2 + e) + lane / 4 * 2, 2);
      x[i] = low_halves(numbers[0], numbers[1]);
    }
  });
}

template <class T>
void multiply(T, float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = threadIdx.x % kWarp;
  const on_cpu::races::Hidden hidden;
  const emulated::Operands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  on_cpu::with_lanes(&mine, [&](auto of) {
    for (int q = 0; q < 2; ++q) {
      for (int e = 0; e < 2; ++e) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) {
          const auto& of_row = *of(lane / 4 * 4 + k % 8 / 2);
          const auto& of_column = *of((lane % 4 * 2 + e) * 4 + k % 8 / 2);
          sum += number_of_pair<T>(of_row.a[q + k / 8 * 2], k % 2) * number_of_pair<T>(of_column.b[k / 8], k % 2);
        }
        d[2 * q + e] += sum;
      }
    }
  });
}

#endif

// Rows in shared memory are 128 bytes (or multiples of that) and swizzled: their 16-byte chunk c lies at c ^ (row % 8),
// so that neither eight rows of a column nor a row of eight chunks meet in a bank.
template <int ROW_BYTES = 128>
DEVICE int swizzled(int row, int chunk) {
  return row * ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}

// 16 bytes of numbers from memory of any alignment, by ordinary loads; 0 from number `count` on.
template <class T>
DEVICE void copy_numbers(uint8_t* to, const T* from, int count) {
  constexpr int kCount = 16 / sizeof(T);
  struct alignas(16) Chunk {
    T numbers[kCount];
  } chunk;
  UNROLL for (int i = 0; i < kCount; ++i) chunk.numbers[i] = i < count ? from[i] : T{};
  *reinterpret_cast<Chunk*>(to) = chunk;
}

// The same by an asynchronous copy where rows are aligned.
template <class T, bool ALIGNED>
DEVICE void copy_chunk(uint8_t* to, const T* from, int count) {
  constexpr int kCount = 16 / sizeof(T);
  if (ALIGNED) {
    copy_async(to, from, (count < 0 ? 0 : count > kCount ? kCount : count) * int(sizeof(T)));
  } else {
    copy_numbers(to, from, count);
  }
}

}  // namespace g2rl::cuda::sm80
