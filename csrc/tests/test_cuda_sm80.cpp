// The head's CUDA kernels for chips since Ampere, on a CPU, from hidden states to residuals, against float64.
#include <algorithm>

#include "cuda_problem.h"

using namespace g2rl::cuda;
using namespace g2rl::cuda::testing;

namespace {

// Results of one way from inputs to R.
struct Found {
  explicit Found(const Problem& p)
      : results(3 * size_t(p.N), NAN), R(size_t(p.B) * p.c.V, NAN), inverse(p.B, NAN), flags(p.B, -1), terms(p.N) {}
  Floats results, R, inverse;
  std::vector<int> flags;
  OwnTerms terms;
};

// Statistics, then residuals from recomputed logits.
Found in_two_passes(Problem& p, const Kept& kept) {
  Found found(p);
  const int parts = sm80::splits(p.c.V);
  Floats planes(4 * size_t(parts) * p.N, NAN);
  sm80::statistics(p.head(), p.tokens(), {planes.data(), parts}, kept, nullptr);
  merge(p.head(), {planes.data(), parts}, p.N, nullptr, p.a.data(), found.results.data(), p.N, found.terms.terms,
        nullptr);
  sm80::residuals(p.head(), p.tokens(), p.responses(), found.terms.terms, nullptr, nullptr, found.R.data(), nullptr);
  return found;
}

// One pass, with lse given.
Found in_one_pass(Problem& p) {
  Found found(p);
  const int parts = sm80::residual_splits(p.c.V);
  const Floats lse(p.lse.begin(), p.lse.end());
  Floats planes(4 * size_t(parts) * p.N, NAN);
  sm80::residuals_and_statistics(p.head(), p.tokens(), p.responses(), lse.data(), p.a.data(), nullptr, found.R.data(),
                                 {planes.data(), parts}, nullptr);
  merge(p.head(), {planes.data(), parts}, p.N, lse.data(), p.a.data(), found.results.data(), p.N, found.terms.terms,
        nullptr);
  responses(p.responses(), p.a.data(), found.terms.terms.S, lse.data(), found.inverse.data(), found.flags.data(),
            nullptr);
  add_targets(p.targets.data(), p.N, p.responses(), found.terms.terms, found.flags.data(), p.c.V, found.R.data(),
              nullptr);
  // As callers do: responses whose lse was too far off are summed again, with the shift and S that were found.
  sm80::residuals(p.head(), p.tokens(), p.responses(), found.terms.terms, found.flags.data(), nullptr, found.R.data(),
                  nullptr);
  return found;
}

void test_sure_tokens(Dtype dtype) {
  Problem p = sure_tokens(dtype);
  const Found found = in_one_pass(p);
  expect(found.flags == std::vector<int>(p.B, 0), "sure tokens: their lse was not believed", 1, 0);
  check_rows(p, found.R, p.R, p.c.V, "sure tokens, dtype " + std::to_string(int(dtype)));
}

// G [N, columns] of a strip, as `grad_logits` should give it: without rounding to the head's dtype.
std::vector<double> expected_gradients(const Problem& p, const Floats& rows_in, int v_start, int columns) {
  std::vector<double> G(size_t(p.N) * columns);
  for (int n = 0; n < p.N; ++n) {
    for (int i = 0; i < columns; ++i) {
      const int v = v_start + i;
      const size_t at = size_t(n) * p.c.V + v;
      const double H = rows_in[p.N + n], g = rows_in[2 * p.N + n], g_entropy = rows_in[3 * p.N + n];
      const double others = p.p[at] == 0 ? 0 : -p.p[at] * (g + g_entropy * (std::log(p.p[at]) + H));
      G[size_t(n) * columns + i] = p.slope[at] * (v == p.targets[n] ? rows_in[4 * p.N + n] : others);
    }
  }
  return G;
}

void check_gradients(Problem& p, const std::string& what) {
  const int v_start = 3, v_end = p.c.V - 2, columns = v_end - v_start;
  Floats rows_in(6 * size_t(p.N));
  for (int n = 0; n < p.N; ++n) {
    const float values[6] = {float(p.lse[n]), float(p.entropy[n]), n % 3 - 1.f, 0.3f, 0.7f, 1.f + n % 2};
    for (int row = 0; row < 6; ++row) rows_in[size_t(row) * p.N + n] = values[row];
  }
  const int64_t stride = columns + 3;
  Numbers G(p.c.dtype, p.N * stride), even(p.c.dtype, p.N * stride);
  const bool scaled = p.c.dtype == Dtype::fp16;
  const float even_scale = 4.f;
  sm80::grad_logits(p.head(), p.tokens(), rows_in.data(), p.N,
                    {G.data(), scaled ? even.data() : nullptr, &even_scale, stride, v_start, v_end}, nullptr);
  const std::vector<double> expected = expected_gradients(p, rows_in, v_start, columns);
  const double rounding = p.c.dtype == Dtype::fp32 ? 0 : p.c.dtype == Dtype::fp16 ? 0x1p-11 : 0x1p-8;
  for (int n = 0; n < p.N; ++n) {
    for (int i = 0; i < columns; ++i) {
      const double x = expected[size_t(n) * columns + i], scale = scaled ? rows_in[5 * p.N + n] : 1;
      // log p may be off by 1e-5, and p by as much of itself: that shows, times g', where g + g' (log p + H) cancels.
      const double limit = std::fabs(x) * (rounding + 2e-5) + 0.3 * kBound;
      expect_below(std::fabs(G[n * stride + i] / scale - x), limit, what + ": gradient of a logit");
      if (scaled) expect_below(std::fabs(even[n * stride + i] / 4 - x), limit, what + ": evenly scaled gradient");
    }
  }
}

void test_head(const Case& c, const std::string& what) {
  Problem p(c);
  const int64_t stride = sm80::kept_bytes(p.head());
  Floats logits(p.N * stride / 4, NAN);
  const Kept kept{logits.data(), stride, sm80::kept_roots(p.head())};
  const Found two = in_two_passes(p, kept), one = in_one_pass(p);
  check_tokens(p, two.results, what + ", two passes");
  check_rows(p, two.R, p.R, c.V, what + ": R of two passes");
  check_tokens(p, one.results, what + ", one pass");
  check_rows(p, one.R, p.R, c.V, what + ": R of one pass");
  for (int b = 0; b < p.B && c.dtype != Dtype::fp32; ++b) expect(one.flags[b] == 0, what + ": flag", b, 0);

  Floats R(size_t(p.B) * c.V, 0.f);
  add_kept(p.head(), kept, p.targets.data(), p.responses(), two.terms.terms, {}, 0, p.N, R.data(), nullptr);
  check_rows(p, R, p.R, c.V, what + ": R from kept logits");
  check_gradients(p, what);
}

// The third response of a batch has the same bits alone, with other neighbours and elsewhere in memory.
void test_moved() {
  Problem p({.lengths = {5, 130, 17, 9}, .d = 72, .V = 140, .bias = true, .spread = 3});
  const Found all = in_two_passes(p, {}), again = in_two_passes(p, {}), all_given = in_one_pass(p);
  expect(again.R == all.R && again.results == all.results, "other bits the second time", 1, 0);
  const int start = p.cu[2], length = 17, N = p.N;
  Problem q = p;
  q.cu = {0, length}, q.B = 1, q.N = length;
  q.targets.assign(p.targets.begin() + start, p.targets.begin() + start + length);
  q.a.assign(p.a.begin() + start, p.a.begin() + start + length);
  q.lse.assign(p.lse.begin() + start, p.lse.begin() + start + length);
  for (int n = 0; n < length; ++n) {
    for (int k = 0; k < p.c.d; ++k) q.hidden.set(n * q.stride + k, float(p.hidden[(start + n) * p.stride + k]));
  }
  const Found alone = in_two_passes(q, {}), alone_given = in_one_pass(q);
  const auto same_rows = [&](const Found& one, const Found& of_all, const std::string& what) {
    expect(std::equal(one.R.begin(), one.R.end(), of_all.R.begin() + 2 * p.c.V), what + ": R of a moved response", 1,
           0);
    for (int row = 0; row < 3; ++row) {
      const bool same = std::equal(one.results.begin() + row * length, one.results.begin() + (row + 1) * length,
                                   of_all.results.begin() + row * N + start);
      expect(same, what + ": results of a moved response", row, 0);
    }
  };
  same_rows(alone, all, "two passes");
  same_rows(alone_given, all_given, "one pass");
}

// NaN in a token's hidden state stays in its results and in its response.
void test_nan(double softcap) {
  Problem p({.lengths = {5, 7, 130}, .d = 72, .V = 140, .softcap = softcap});
  const int bad = 5;  // the first of the second response
  p.hidden.set(bad * p.stride + 2, NAN);
  const Floats lse(p.lse.begin(), p.lse.end());
  const Found two = in_two_passes(p, {}), one = in_one_pass(p);
  for (const Found* found : {&two, &one}) {
    const std::string what = found == &two ? "two passes" : "one pass";
    for (int i = 0; i < 3 * p.N; ++i) {
      expect(std::isnan(found->results[i]) == (i % p.N == bad), what + ": NaN of token " + std::to_string(i % p.N), i,
             bad);
    }
    for (int b = 0; b < p.B; ++b) {
      const auto* row = &found->R[b * p.c.V];
      const int count = int(std::count_if(row, row + p.c.V, [](float x) { return std::isnan(x); }));
      expect(b == 1 ? count >= p.c.V - 1 : count == 0, what + ": NaN in R of response " + std::to_string(b), count, 0);
    }
  }
}

// What takes little time where every access is watched.
void test_for_races() {
  for (const Dtype dtype : {Dtype::bf16, Dtype::fp32}) {
    test_head({.lengths = {5, 0, 130}, .d = 63, .V = 205, .dtype = dtype, .padding = 1}, "for races");
  }
  test_head({.lengths = {3, 20}, .d = 129, .V = 130, .softcap = 20, .padding = 7}, "for races, soft cap");
  on_cpu::by_chance(1, [] { test_head({.lengths = {5, 0, 1, 17}, .d = 72, .V = 205}, "for races, by chance"); });
}

}  // namespace

int main() {
  if (on_cpu::races::kWatched) {
    test_for_races();
    return outcome();
  }
  // Responses of no, one and few tokens, and of a tile and a bit; a part of the vocabulary and a bit; odd everything.
  test_head({.lengths = {5, 0, 1, 17, 130}, .d = 136, .V = 1105, .bias = true, .spread = 2}, "bf16");
  for (const Dtype dtype : {Dtype::bf16, Dtype::fp16, Dtype::fp32}) {
    const std::string what = "dtype " + std::to_string(int(dtype));
    test_head({.lengths = {5, 0, 1, 17}, .d = 63, .V = 385, .dtype = dtype, .temperature = 0.7, .padding = 1}, what);
    test_head({.lengths = {3, 20},
               .d = 129,
               .V = 130,
               .dtype = dtype,
               .bias = true,
               .softcap = 20,
               .logit_scale = 1.5,
               .spread = 8,
               .padding = 7},
              what + ", soft cap");
  }
  // Logits up to 105. In fp32, where products are not exact, sums of 40 of them round by more than log p may be off.
  test_head({.lengths = {3, 9}, .d = 40, .V = 130, .spread = 30}, "peaked");
  test_head({.lengths = {3, 9}, .d = 300, .V = 130, .dtype = Dtype::fp32, .spread = 10}, "peaked, fp32");
  test_moved();
  for (const Dtype dtype : {Dtype::bf16, Dtype::fp32}) test_sure_tokens(dtype);
  const Problem long_one({{16384}, 8, 40});
  check_long_response(long_one, of_statistics(sm80::residuals), "residuals");
  check_long_response(long_one, of_given_lse(sm80::residuals_and_statistics, sm80::residual_splits(40)), "lse given");
  test_nan(0);
  test_nan(30);
  on_cpu::by_chance(2, [] { test_head({.lengths = {5, 0, 1, 17}, .d = 136, .V = 385}, "by chance"); });
  return outcome();
}
