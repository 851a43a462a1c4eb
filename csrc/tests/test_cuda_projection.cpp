// The CUDA kernels that make features of residuals, on a CPU, against float64.
#include <algorithm>

#include "cuda_problem.h"

using namespace g2rl::cuda;
using namespace g2rl::cuda::testing;

namespace {

struct Generation {
  const char* name;
  decltype(&sm80::projection_bytes) bytes;
  decltype(&sm80::project) project;

  Floats features(Problem& p, const float* R, const float* inverse, int B) const {
    const Head head = p.head();
    Floats memory(bytes(head, B) / sizeof(float), NAN), out(size_t(B) * p.c.d, NAN);
    project(head, R, inverse, B, float(p.c.logit_scale), memory.data(), out.data(), nullptr);
    return out;
  }
};
constexpr Generation kSm80{"sm80", sm80::projection_bytes, sm80::project};
constexpr Generation kSm90{"sm90", sm90::projection_bytes, sm90::project};

// R in fp32 by float64, then features of it. One response has a hundredth of the others' residuals, one none. What rows
// of W have in `common`, in units of their spread, leaves nothing but what sums are rounded, or cut off, by.
void test_projection(const Generation& of, const Case& c, const std::string& name, double common = 0) {
  const std::string what = std::string(of.name) + ", dtype " + std::to_string(int(c.dtype)) + ", " + name;
  Problem p(c);
  for (int v = 0; v < c.V && common > 0; ++v) {
    for (int k = 0; k < c.d; ++k) {
      const double more = common * c.spread / std::sqrt(c.d) * std::sqrt(2) * std::sin(1 + 2.4 * k);
      p.weight.set(v * p.stride + k, float(p.weight[v * p.stride + k] + more));
    }
  }
  Floats R(p.R.begin(), p.R.end()), inverse(p.B, 0.f);
  for (int b = 0; b < p.B; ++b) {
    for (int n = p.cu[b]; n < p.cu[b + 1]; ++n) inverse[b] += p.a[n];
    inverse[b] = inverse[b] > 0 ? 1 / inverse[b] : 0;
    for (int v = 0; v < c.V && b % 5 == 1; ++v) R[size_t(b) * c.V + v] *= 0.01f;
  }
  const Floats features = of.features(p, R.data(), inverse.data(), p.B);
  std::vector<double> expected(size_t(p.B) * c.d, 0);
  for (int b = 0; b < p.B; ++b) {
    for (int v = 0; v < c.V; ++v) {
      const double r = c.logit_scale * inverse[b] * double(R[size_t(b) * c.V + v]);
      for (int k = 0; k < c.d; ++k) expected[size_t(b) * c.d + k] += r * p.weight[v * p.stride + k];
    }
  }
  check_rows(p, features, expected, c.d, what);
  expect(features == of.features(p, R.data(), inverse.data(), p.B), what + ": other bits the second time", 1, 0);
  const Floats alone = of.features(p, &R[size_t(p.B - 1) * c.V], &inverse[p.B - 1], 1);
  expect(std::equal(alone.begin(), alone.end(), features.end() - c.d), what + ": other bits alone", 1, 0);
}

// NaN in R stays in its response, and NaN in W is in all.
void test_nan(const Generation& of) {
  const std::string what = std::string(of.name) + ", NaN";
  Problem p({.lengths = {5, 3, 7}, .d = 64, .V = 1600});
  Floats R(p.R.begin(), p.R.end()), inverse(p.B, 0.1f);
  R[size_t(p.c.V) + 7] = NAN;
  Floats features = of.features(p, R.data(), inverse.data(), p.B);
  for (int i = 0; i < p.B * p.c.d; ++i) expect(std::isnan(features[i]) == (i / p.c.d == 1), what + " in R", i, 0);
  p.weight.set(1599 * p.stride + 3, NAN);
  features = of.features(p, R.data(), inverse.data(), 1);
  for (int k = 0; k < p.c.d; ++k) expect(std::isnan(features[k]) == (k == 3), what + " in W", k, 3);
}

void projection_tests() {
  const std::vector<int> some{5, 0, 1, 7};
  std::vector<int> many(100, 1);  // more than a tile has
  for (const Dtype dtype : {Dtype::bf16, Dtype::fp16, Dtype::fp32}) {
    test_projection(kSm80, {.lengths = some, .d = 64, .V = 1600, .dtype = dtype, .logit_scale = 1.3}, "plain");
    test_projection(kSm80, {.lengths = some, .d = 63, .V = 1105, .dtype = dtype, .padding = 1}, "odd");
    test_projection(kSm80, {.lengths = many, .d = 136, .V = 130, .dtype = dtype, .spread = 3}, "many");
    if (dtype == Dtype::fp32) continue;
    test_projection(kSm90, {.lengths = some, .d = 136, .V = 1600, .dtype = dtype, .logit_scale = 1.3}, "plain");
    test_projection(kSm90, {.lengths = some, .d = 60, .V = 1105, .dtype = dtype, .padding = 4}, "odd");
    test_projection(kSm90, {.lengths = many, .d = 136, .V = 130, .dtype = dtype, .spread = 3}, "many");
  }
  const Case common{.lengths = {1, 1, 5, 1, 1, 60}, .d = 72, .V = 1600, .spread = 3};
  test_projection(kSm90, common, "rows of W have much in common", 10);
  test_nan(kSm80);
  test_nan(kSm90);
}

// What takes little time where every access is watched.
void test_for_races() {
  for (const Dtype dtype : {Dtype::bf16, Dtype::fp32}) {
    test_projection(kSm80, {.lengths = {5, 0, 1, 7}, .d = 63, .V = 305, .dtype = dtype, .padding = 1}, "for races");
  }
  test_projection(kSm90, {.lengths = {5, 0, 1, 7}, .d = 60, .V = 305, .padding = 4}, "for races");
}

}  // namespace

int main() {
  if (on_cpu::races::kWatched) {
    test_for_races();
    return outcome();
  }
  projection_tests();
  on_cpu::by_chance(2, [] {
    for (const Generation& each : {kSm80, kSm90}) test_projection(each, {{5, 0, 7}, 136, 1600}, "by chance");
  });
  return outcome();
}
