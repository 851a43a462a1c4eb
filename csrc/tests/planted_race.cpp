// Kernels with a race that a build for ThreadSanitizer has to end at, and the same without it.
//
//     planted_race [none | block | warp | blocks | barrier]
#include <cstdio>
#include <string>

#include "../cuda/sm90.h"

namespace g2rl::cuda {
namespace {

constexpr int kThreads = 64;

struct Planted {
  bool block, warp, blocks, barrier;  // what comes too late, is left out, is written by all blocks, is not waited for
  float* out;
};

__global__ void race_kernel(const Planted p) {
  SHARED(memory);
  auto* x = reinterpret_cast<float*>(memory);
  const uint32_t full = sm90::shared_address(memory + 1024);
  const unsigned i = threadIdx.x;
  if (i == 0) sm90::barrier_init(full, 32);
  x[i] = float(i);
  if (!p.block) __syncthreads();
  float sum = x[(i + 32) % kThreads];  // of the other warp
  if (p.block) __syncthreads();
  x[128 + i] = sum;
  if (!p.warp) __syncwarp();
  sum += x[128 + (i ^ 1)];  // of another lane
  x[192 + i] = sum;
  if (i < 32) {
    sm90::barrier_arrive(full);
  } else {
    if (!p.barrier) sm90::barrier_wait(full, 0);
    sum += x[192 + i - 32];  // of a thread that does not wait
  }
  p.out[p.blocks ? i : blockIdx.x * kThreads + i] = sum;
}

}  // namespace
}  // namespace g2rl::cuda

int main(int count, char** words) {
  using namespace g2rl::cuda;
  const std::string race = count > 1 ? words[1] : "none";
  float out[2 * kThreads];
  const Planted planted{race == "block", race == "warp", race == "blocks", race == "barrier", out};
  launch({2, kThreads, 2048}, nullptr, race_kernel, planted);
  float sum = 0;
  for (int i = 0; i < (planted.blocks ? kThreads : 2 * kThreads); ++i) sum += out[i];
  std::printf("%g\n", sum);
}
