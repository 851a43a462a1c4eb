// What the epilogues of pipeline_sm90.h's product share: where sums lie, the bias, what other warps hand over,
// launching.
#pragma once

#include "choices.h"
#include "options.h"
#include "order.h"
#include "pipeline_sm90.h"

namespace g2rl::cuda::sm90 {

// Where a thread's sums lie in a tile: rows `row` and `row + 8`, columns `column` and `column + 1` of every eight.
struct Place {
  int row, column;

  static DEVICE Place here() {
    const int thread = threadIdx.x - kWarpgroup, lane = thread % kWarp;
    return {thread / kWarp * 16 + lane / 4, lane % 4 * 2};
  }
};

// No branch for each word: the loads need not wait for each other.
template <class T>
DEVICE void add_words(const T* words, int count, int first, Sums& z) {
  UNROLL for (int i = 0; i < kSums / 2; ++i) {
    const int v = first + i / 2 * 8 + i % 2;
    const float word = to_float(words[v < count ? v : 0]), bias = v < count ? word : 0.f;
    UNROLL for (int q = 0; q < 2; ++q) z[i / 2 * 4 + 2 * q + i % 2] += bias;
  }
}

DEVICE void add_bias_of_columns(const Head& head, int v0, const Place& at, Sums& z) {
  if (!head.bias) return;
  if (head.bias_dtype == Dtype::fp32) {
    add_words(static_cast<const float*>(head.bias), head.V, v0 + at.column, z);
  } else if (head.bias_dtype == Dtype::bf16) {
    add_words(static_cast<const bf16*>(head.bias), head.V, v0 + at.column, z);
  } else {
    add_words(static_cast<const fp16*>(head.bias), head.V, v0 + at.column, z);
  }
}

// Four words of each of the four threads of a row, exchanged: thread l has word l of each afterwards.
template <class Word>
DEVICE void transpose(Word (&x)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  UNROLL for (int i = 0; i < 4; i += 2) {
    const Word other = __shfl_xor_sync(kAllLanes, odd ? x[i] : x[i + 1], 1);
    (odd ? x[i] : x[i + 1]) = other;
  }
  UNROLL for (int i = 0; i < 2; ++i) {
    const Word other = __shfl_xor_sync(kAllLanes, upper ? x[i] : x[i + 2], 2);
    (upper ? x[i] : x[i + 2]) = other;
  }
}

// The warps that neither copy nor multiply write what an epilogue needs to know of a tile's tokens, a tile ahead. For
// two tiles in turn: a barrier for "written" and one for "read", at which every writer and every reader arrives.
constexpr int kWriters = kWarpgroup - kWarp;
struct Handover {
  uint64_t written[2], read[2];

  DEVICE void initialise() {
    if (threadIdx.x != 0) return;
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared_address(&written[i]), kWriters);
      barrier_init(shared_address(&read[i]), kConsumers * kWarpgroup);
    }
  }

  // Of the tile that is the i-th in the order of the epilogue's calls, the one before the first included.
  DEVICE void wait_to_write(int i) const { barrier_wait(shared_address(&read[i % 2]), (i / 2 & 1) ^ 1); }
  DEVICE void wait_to_read(int i) const { barrier_wait(shared_address(&written[i % 2]), i / 2 & 1); }
  DEVICE void was_written(int i) const { barrier_arrive(shared_address(&written[i % 2])); }
  DEVICE void was_read(int i) const { barrier_arrive(shared_address(&read[i % 2])); }

  // Has `write` write each tile that the walk comes to, and before them kNoTile, to one of two places in turn.
  template <class Walk, class Written, class Write>
  DEVICE void write_all(Walk tiles, Written (&of_tiles)[2], const Write& write) const {
    Tile tile = kNoTile;
    for (int i = 0;; ++i) {
      wait_to_write(i);
      write(tile, of_tiles[i % 2]);
      was_written(i);
      if (!tiles.next(tile)) return;
    }
  }
};

// Calls f with a number of the type of 16 bits that the head has.
template <class F>
int choose_half(Dtype dtype, F&& f) {
  return dtype == Dtype::bf16 ? f(bf16{}) : f(fp16{});
}

// Launches one block a multiprocessor, or as many as there are items.
template <class... P, class... A>
int launch_persistent(int64_t items, int scratch, Stream stream, void (*kernel)(P...), const A&... arguments) {
  int processors = 3;
#ifdef __CUDACC__
  int device = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
#endif
  return launch({items < processors ? items : processors, kThreads, kScratch + scratch}, stream, kernel, arguments...);
}

inline int map_matrix(TensorMap& map, const void* base, int64_t rows, int64_t stride, const Head& head, int box_rows) {
  return make_tensor_map(map, base, head.dtype, rows, head.d, stride, box_rows);
}

// Tiles of hidden states as A and of the weight as B.
inline int map_hidden_and_weight(TensorMap& hidden, TensorMap& weight, const Head& head, const Tokens& tokens) {
  const int error = map_matrix(hidden, tokens.hidden, tokens.N, tokens.stride, head, kRows);
  return error ? error : map_matrix(weight, head.weight, head.V, head.stride, head, kColumnsOfTile);
}

}  // namespace g2rl::cuda::sm90
