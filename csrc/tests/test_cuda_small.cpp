// The CUDA kernels of csrc/cuda that need no Hopper, on a CPU, against float64.
#include <algorithm>

#include "cuda_problem.h"

using namespace g2rl::cuda;
using namespace g2rl::cuda::testing;

namespace {

// ---- merge, responses, add_kept, add_targets ----

// Raw logits in fp32 as pass 1 keeps them, and the reference from these.
Floats kept_logits(Problem& p, int64_t stride) {
  Floats kept(p.N * stride, NAN);
  for (int n = 0; n < p.N; ++n) {
    for (int v = 0; v < p.c.V; ++v) {
      float& z = kept[n * stride + v];
      z = float(p.z[size_t(n) * p.c.V + v]);
      p.z[size_t(n) * p.c.V + v] = z;
    }
  }
  p.follow();
  return kept;
}

// Partials in parts of `columns` words, by float64; shifted by lse where it is given.
Floats partial_sums(Problem& p, int columns, const float* lse) {
  const int V = p.c.V, splits = int(ceil_div(V, columns));
  const double inner = p.head().inner_scale, scale = p.head().scale / std::log(2.0);
  Floats planes(4 * size_t(splits) * p.N, NAN);
  for (int s = 0; s < splits; ++s) {
    for (int n = 0; n < p.N; ++n) {
      std::vector<double> t;
      double m = kNoMaximum, S = 0, X = 0, z_y = 0;
      for (int v = s * columns; v < std::min(V, (s + 1) * columns); ++v) {
        const double z = p.z[size_t(n) * V + v];
        if (v == p.targets[n]) z_y = z;
        if (v == p.targets[n] && lse) planes[n] = float(z);
        if (v != p.targets[n]) t.push_back(p.c.softcap > 0 ? scale * std::tanh(inner * z) : scale * z);
      }
      for (const double x : t) m = std::max(m, x);
      m = lse ? lse[n] * kLog2e : float(m);
      for (const double x : t) {
        S += std::exp2(x - m);
        X += std::exp2(x - m) * (x - m);
      }
      const double values[4] = {m, S, X, z_y};
      for (int i = 0; i < 4; ++i) {
        if (!lse || i == 1 || i == 2) planes[(size_t(i) * splits + s) * p.N + n] = float(values[i]);
      }
    }
  }
  return planes;
}

Floats add_kept_in(Problem& p, Floats& kept, int64_t stride, const OwnTerms& terms, int chunk) {
  Floats R(size_t(p.B) * p.c.V, 0.f);
  OwnCarry carry(p.c.V);
  for (int first = 0; first < p.N; first += chunk) {
    const Kept of_chunk{kept.data() + first * stride, 4 * stride, 0};
    add_kept(p.head(), of_chunk, p.targets.data(), p.responses(), terms.from(first), carry.next(), first,
             std::min(first + chunk, p.N), R.data(), nullptr);
  }
  return R;
}

void test_tokens(const Case& c, const std::string& what) {
  Problem p(c);
  const int64_t stride = ceil_div(c.V, 128) * 128;
  Floats kept = kept_logits(p, stride), results(3 * size_t(p.N), NAN);
  OwnTerms terms(p.N);
  for (const int columns : {100, c.V}) {
    Floats planes = partial_sums(p, columns, nullptr);
    const Partials partials{planes.data(), int(ceil_div(c.V, columns))};
    merge(p.head(), partials, p.N, nullptr, p.a.data(), results.data(), p.N, terms.terms, nullptr);
    check_tokens(p, results, what);
  }
  const Floats R = add_kept_in(p, kept, stride, terms, p.N);
  check_rows(p, R, p.R, c.V, what + ": R from kept logits");
  expect(R == add_kept_in(p, kept, stride, terms, 37), what + ": chunks change bits", 1, 0);
}

// An lse is given: exact, or off where a response must be told.
void test_given_lse(const Case& c, const std::string& what) {
  Problem p(c);
  kept_logits(p, c.V);
  Floats lse(p.lse.begin(), p.lse.end()), results(3 * size_t(p.N), NAN), inverse(p.B, NAN);
  const int wrong = p.B - 1;
  for (int n = p.cu[wrong]; n < p.N; ++n) lse[n] += 3e-5f * std::max(1.f, std::fabs(lse[n]));
  Floats planes = partial_sums(p, 100, lse.data());
  OwnTerms terms(p.N);
  merge(p.head(), {planes.data(), int(ceil_div(c.V, 100))}, p.N, lse.data(), p.a.data(), results.data(), p.N,
        terms.terms, nullptr);
  check_tokens(p, results, what);

  std::vector<int> flags(p.B, -1);
  responses(p.responses(), p.a.data(), terms.terms.S, lse.data(), inverse.data(), flags.data(), nullptr);
  // What kernels leave in R that take lse for exact.
  Floats R(size_t(p.B) * c.V, 0.f);
  for (int b = 0; b < p.B; ++b) {
    for (int n = p.cu[b]; n < p.cu[b + 1]; ++n) {
      const size_t y = size_t(n) * c.V + p.targets[n];
      R[size_t(b) * c.V + p.targets[n]] += float(p.a[n] * p.slope[y] * (1 - p.p[y] * std::exp(p.lse[n] - lse[n])));
    }
  }
  const Floats before = R;
  add_targets(p.targets.data(), p.N, p.responses(), terms.terms, flags.data(), c.V, R.data(), nullptr);
  for (int b = 0; b < p.B; ++b) {
    double sum = 0;
    std::vector<double> expected(c.V, 0.);
    for (int n = p.cu[b]; n < p.cu[b + 1]; ++n) {
      const size_t y = size_t(n) * c.V + p.targets[n];
      sum += p.a[n];
      expected[p.targets[n]] += p.a[n] * p.slope[y] * (1 - p.p[y]);
    }
    if (b == wrong) expected.assign(&before[size_t(b) * c.V], &before[size_t(b + 1) * c.V]);
    expect(flags[b] == (b == wrong), what + ": flag of response " + std::to_string(b), flags[b], b == wrong);
    expect_below(std::fabs(inverse[b] - (sum > 0 ? 1 / sum : 0)), 1e-6 * (sum > 0 ? 1 / sum : 0), what + ": inverse");
    expect_below(relative_error(&R[size_t(b) * c.V], expected.data(), c.V), 2 * kBound, what + ": targets of R");
  }
}

// Targets of a long response may cancel what the other words left, and their sum must not lose its digits.
void test_targets_of_a_long_response() {
  Problem p({{1, 8192}, 8, 40});
  OwnTerms terms(p.N);
  for (int n = 0; n < p.N; ++n) p.targets[n] = 7, terms.terms.rest[n] = 0.1f;
  const std::vector<int> flags(p.B, 0);
  Floats R(size_t(p.B) * p.c.V, 0.f);
  float& left = R[p.c.V + 7];
  left = float(-8192 * double(0.1f));
  add_targets(p.targets.data(), p.N, p.responses(), terms.terms, flags.data(), p.c.V, R.data(), nullptr);
  expect_below(std::fabs(left), 0x1p-15, "targets of a long response");  // half of what R's numbers there are apart
  expect(R[7] == 0.1f, "targets of a short response", R[7], 0.1);
}

// A token's residuals add up to 0 on average where S, by a given lse, is a little less than 1.
void test_residuals_add_up() {
  const int N = 8192;
  const Head head{nullptr, nullptr, 0, 2, 0, Dtype::fp32, Dtype::fp32, 1, 1, false};
  const Floats lse(N, 0.f), a(N, 1.f);
  Floats planes(4 * size_t(N), std::log(0.5f)), results(3 * size_t(N));
  for (int n = 0; n < N; ++n) planes[N + n] = 0.5f - float(n % 16 + 1) * 0x1p-24f;
  OwnTerms terms(N);
  merge(head, {planes.data(), 1}, N, lse.data(), a.data(), results.data(), N, terms.terms, nullptr);
  double sum = 0;
  for (int n = 0; n < N; ++n) sum += terms.terms.target[n] - double(terms.terms.weight[n]) * planes[N + n];
  expect_below(std::fabs(sum / N), 3e-9, "residuals of a token");
}

// NaN among a token's logits shows in its results and in its response, and nowhere else.
void test_nan_of_tokens() {
  Problem p({{5, 0, 17}, 63, 1105});
  const int bad = 3;
  kept_logits(p, 1152);
  p.z[bad * size_t(p.c.V) + 700] = NAN;
  Floats kept = kept_logits(p, 1152), planes = partial_sums(p, 100, nullptr), results(3 * size_t(p.N));
  OwnTerms terms(p.N);
  merge(p.head(), {planes.data(), 12}, p.N, nullptr, p.a.data(), results.data(), p.N, terms.terms, nullptr);
  for (int i = 0; i < 3 * p.N; ++i) {
    expect(std::isnan(results[i]) == (i % p.N == bad), "NaN of token " + std::to_string(i % p.N), results[i], 0);
  }
  const Floats R = add_kept_in(p, kept, 1152, terms, p.N);
  for (int b = 0; b < p.B; ++b) {
    const bool any = std::any_of(&R[b * p.c.V], &R[(b + 1) * p.c.V], [](float x) { return std::isnan(x); });
    expect(any == (b == 0), "NaN in R of response " + std::to_string(b), any, b == 0);
  }
}

void tokens_tests() {
  const std::vector<int> ragged{5, 0, 1, 17, 130};
  test_tokens({ragged, 63, 1105}, "plain");
  test_tokens({.lengths = ragged, .d = 129, .V = 1105, .bias = true, .temperature = 0.7, .spread = 4}, "temperature");
  test_tokens({.lengths = ragged, .d = 63, .V = 515, .softcap = 30, .logit_scale = 1.5, .spread = 8}, "soft cap");
  test_tokens({.lengths = {3, 9}, .d = 63, .V = 1105, .spread = 40}, "peaked");
  test_tokens({{1100, 40, 512}, 31, 129}, "segments");
  test_given_lse({ragged, 63, 1105}, "given lse");
  test_given_lse({.lengths = ragged, .d = 63, .V = 515, .softcap = 30, .logit_scale = 1.5, .spread = 30}, "given, cap");
  test_residuals_add_up();
  test_targets_of_a_long_response();
  test_nan_of_tokens();
}

}  // namespace

int main() {
  tokens_tests();
  on_cpu::by_chance(1, tokens_tests);
  return outcome();
}
