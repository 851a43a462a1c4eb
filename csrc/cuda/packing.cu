// Packs the tokens of a batch into groups: see packing.h. One block, for there is little to do: four numbers for 8 or
// 16 tokens.
#include "packing.h"

namespace g2rl::cuda {

namespace {

constexpr int kThreads = 512;

DEVICE int groups_of(const Responses& responses, const int* flags, int group, int b) {
  if (b >= responses.B || (flags && flags[b] == 0)) return 0;
  const int length = responses.cu_seqlens[b + 1] - responses.cu_seqlens[b];
  return length > 0 ? int(ceil_div(length, group)) : 1;
}

// The sum over all threads before this one, and over all, by way of `shared` [kThreads].
DEVICE int sum_before(int value, int* shared, int& all) {
  const int thread = threadIdx.x;
  shared[thread] = value;
  __syncthreads();
  for (int step = 1; step < kThreads; step *= 2) {
    const int other = thread >= step ? shared[thread - step] : 0;
    __syncthreads();
    shared[thread] += other;
    __syncthreads();
  }
  const int before = shared[thread] - value;
  all = shared[kThreads - 1];
  __syncthreads();
  return before;
}

__global__ void __launch_bounds__(kThreads)
    pack_kernel(Responses responses, const int* flags, Grouping grouping, Packing packing) {
  const int group = grouping.group;
  SHARED(shared_bytes);
  int* shared = reinterpret_cast<int*>(shared_bytes);

  // Ranges begin with the first response after each equal share of all groups.
  int total = 0;
  for (int b0 = 0; b0 < responses.B; b0 += kThreads) {
    int all;
    sum_before(groups_of(responses, flags, group, b0 + int(threadIdx.x)), shared, all);
    total += all;
  }
  int count = total / grouping.least < grouping.ranges ? total / grouping.least : grouping.ranges;
  count = count < 1 ? 1 : count > kMaxRanges ? kMaxRanges : count;
  for (int i = threadIdx.x; i <= count; i += kThreads) packing.ranges()[1 + i] = i == 0 ? 0 : total;
  if (threadIdx.x == 0) packing.ranges()[0] = total > 0 ? count : 0;

  int offset = 0;
  for (int b0 = 0; b0 < responses.B; b0 += kThreads) {
    const int b = b0 + int(threadIdx.x), groups = groups_of(responses, flags, group, b);
    int all;
    const int first = offset + sum_before(groups, shared, all);  // by now all have written their ranges
    offset += all;
    if (groups == 0) continue;
    const int start = responses.cu_seqlens[b], end = responses.cu_seqlens[b + 1];
    for (int i = 1; i < count; ++i) {
      const int share = int(int64_t(total) * i / count);
      if (first < share && share <= first + groups) packing.ranges()[1 + i] = first + groups;
    }
    for (int g = 0; g < groups; ++g) {
      const int token = start + g * group, left = end - token;
      packing.groups()[first + g] = {token, left < group ? left : group, groups - g, g + 1 == groups ? b : -1};
    }
  }
}

}  // namespace

int64_t packing_bytes(int N, int B) {
  return (kMaxRanges + 2) * 4 + (N / kLeastGroup + B + 1) * int64_t(sizeof(Group));
}

int pack(const Responses& responses, const int* flags, const Grouping& grouping, const Packing& packing,
         Stream stream) {
  return launch({1, kThreads, kThreads * int(sizeof(int))}, stream, pack_kernel, responses, flags, grouping, packing);
}

}  // namespace g2rl::cuda
