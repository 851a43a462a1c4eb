// The last step of features from residuals: parts of the vocabulary are joined.
#include "projection.h"

namespace g2rl::cuda {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    join_kernel(const float* partials, int parts, int64_t count, float logit_scale, float* features) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  float sum = 0.f;
  for (int part = 0; part < parts; ++part) sum += partials[part * count + i];
  features[i] = sum * logit_scale;
}

}  // namespace

int join_parts(const float* partials, int parts, int64_t count, float logit_scale, float* features, Stream stream) {
  return launch({ceil_div(count, kThreads), kThreads}, stream, join_kernel, partials, parts, count, logit_scale,
                features);
}

}  // namespace g2rl::cuda
